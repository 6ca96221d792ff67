"""The registry of presets: a published method is one entry naming its choices and its paper."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from jft.methods.plan import Method
from jft.names import nearest


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered preset: its builder, its paper, and what `jft methods` says of it."""

    name: str
    build: Callable[..., Method]
    paper: str

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def options(self) -> dict[str, Any]:
        """Its arguments and their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: None if p.default is p.empty else p.default for p in parameters}


_ENTRIES: dict[str, Entry] = {}


def register(name: str, *, paper: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Decorator: make ``build(**options) -> Method`` available as ``jft.method(name, **options)``."""

    def add(build: Callable[..., Method]) -> Callable[..., Method]:
        if name in _ENTRIES:
            raise ValueError(f"method {name!r} is registered already")
        if not inspect.getdoc(build):
            raise ValueError(f"method {name!r} has no docstring; `jft methods` prints its first paragraph")
        _ENTRIES[name] = Entry(name, build, paper)
        return build

    return add


def entries() -> dict[str, Entry]:
    """All presets by name."""
    _load()
    return dict(sorted(_ENTRIES.items()))


@functools.cache
def _load() -> None:
    """Import every module of :mod:`jft.presets`, which registers what is there."""
    folder = importlib.import_module("jft.presets")
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")


def method(
    name: str,
    *,
    also: Sequence[str] | str = (),
    freeze: Sequence[str] | str = (),
    forward: Any = None,
    until: str | None = None,
    **options: Any,
) -> Method:
    """The preset ``name`` with ``options``. ``also``, ``freeze``, ``forward``, ``until`` go with all: see :class:`Method`.

    Raises ``ValueError`` for an unknown name or option, with the nearest known one.
    """
    _load()
    if name not in _ENTRIES:
        raise ValueError(f"method {name!r} is unknown{nearest(name, _ENTRIES)}; `jft methods` lists them all")
    entry = _ENTRIES[name]
    for option in options:
        if option not in entry.options:
            known = ", ".join(entry.options) or "none"
            raise ValueError(
                f"method {name!r} has no option {option!r}{nearest(option, entry.options)}; it has: {known}"
            )
    built = entry.build(**options)
    general = {"also": patterns(also), "freeze": patterns(freeze), "forward": forward, "until": until}
    said = {k: v for k, v in general.items() if v}
    return dataclasses.replace(
        built,
        name=name,
        also=built.also + patterns(also),
        freeze=built.freeze + patterns(freeze),
        forward=forward or built.forward,
        until=until or built.until,
        options={**entry.options, **options, **said},
    )


def patterns(value: Sequence[str] | str) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
