"""The registry of presets: a published method is one entry naming its choices and its paper."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jft.methods.card import Card
from jft.methods.plan import Method
from jft.names import nearest
from jft.tree import EVERYTHING, Patterns, patterns


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered preset: its builder, its paper, and what `jft methods` says of it."""

    name: str
    build: Callable[..., Method]
    paper: str
    card: Card | None = None

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def options(self) -> dict[str, Any]:
        """Its arguments and their defaults, with ``include`` and ``exclude``, which go with every preset."""
        return {**self.arguments, **{k: v for k, v in _NARROWING.items() if k not in self.arguments}}

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of its builder and their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: None if p.default is p.empty else p.default for p in parameters}

    # It writes into the instance's __dict__, which a frozen dataclass allows.
    @functools.cached_property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        """What it includes and excludes by itself."""
        try:
            select = self.build().select
        except (TypeError, ValueError):  # an argument without a default
            return _NARROWING
        return {"include": select.include, "exclude": select.exclude}


_ENTRIES: dict[str, Entry] = {}
_NARROWING: dict[str, tuple[str, ...]] = {"include": EVERYTHING, "exclude": ()}


def register(
    name: str, *, paper: str, card: Card | None = None
) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Decorator: make ``build(**options) -> Method`` available as ``jft.method(name, **options)``.

    paper: authors, year and arXiv id, or ``-``. card: how it stands to the paper. Raises ``ValueError`` for a name that is
    taken, a missing docstring, and a card that speaks of options the preset does not have.
    """

    def add(build: Callable[..., Method]) -> Callable[..., Method]:
        if name in _ENTRIES:
            raise ValueError(f"method {name!r} is registered already")
        if not inspect.getdoc(build):
            raise ValueError(f"method {name!r} has no docstring; `jft methods` prints its first paragraph")
        entry = Entry(name, build, paper, card)
        for option in card.defaults if card else ():
            if option not in entry.arguments:
                raise ValueError(f"the card of {name!r} has a default of {option!r}, which is none of its options")
        _ENTRIES[name] = entry
        return build

    return add


def entries() -> dict[str, Entry]:
    """All presets by name."""
    _load()
    return dict(sorted(_ENTRIES.items()))


@functools.cache
def _load() -> None:
    """Import every module of :mod:`jft.presets`, which registers what is there."""
    # On first use, not at import: every preset imports this module.
    folder = importlib.import_module("jft.presets")
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")


def check_names(name: str, options: Iterable[str]) -> Entry:
    """The entry of ``name``; ``ValueError`` where there is none, or it lacks one of the ``options``, with the nearest name."""
    _load()
    if name not in _ENTRIES:
        raise ValueError(f"method {name!r} is unknown{nearest(name, _ENTRIES)}; `jft methods` lists them all")
    entry = _ENTRIES[name]
    for option in options:
        if option not in entry.options:
            known = ", ".join(entry.options)
            raise ValueError(
                f"method {name!r} has no option {option!r}{nearest(option, entry.options)}; it has: {known}"
            )
    return entry


GENERAL = ("also", "freeze", "forward", "until")  # options of every method beside a preset's own


def method(
    name: str,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    also: Patterns = (),
    freeze: Patterns = (),
    forward: Any = None,
    until: str | None = None,
    **options: Any,
) -> Method:
    """The preset ``name`` with ``options``, and what goes with all presets.

    include narrows what the preset selects to paths that match one of these patterns as well (a preset with an argument of
    that name takes it instead of its own); exclude is added to what it excludes. ``also``, ``freeze``, ``forward``, ``until``:
    see :class:`Method`. Raises ``ValueError`` for an unknown name or option, with the nearest known one.
    """
    entry = check_names(name, options)
    narrowing = {k: v for k, v in (("include", include), ("exclude", exclude)) if v is not None}
    # A preset with an ``include`` of its own takes it as an option; then it must not narrow the result a second time.
    options |= {k: narrowing.pop(k) for k in list(narrowing) if k in entry.arguments}
    built = entry.build(**options)
    select = dataclasses.replace(
        built.select,
        within=patterns(narrowing.get("include", built.select.within)),
        exclude=built.select.exclude + patterns(narrowing.get("exclude", ())),
    )
    general = {"also": patterns(also), "freeze": patterns(freeze), "forward": forward, "until": until}
    # Only what was set: a manifest should not list defaults that every preset shares.
    changed = {k: v for k, v in general.items() if v} | narrowing
    return dataclasses.replace(
        built,
        select=select,
        name=name,
        also=built.also + patterns(also),
        freeze=built.freeze + patterns(freeze),
        forward=forward or built.forward,
        until=until or built.until,
        options={**entry.arguments, **options, **changed},
    )


def comparable(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts of a run with all options of its method: ``include`` and ``exclude`` the preset's own where not given, None for
    others, which a preset may have got since the facts were written.
    """
    method = identity.get("method")
    if not isinstance(method, Mapping) or "options" not in method or method.get("name") not in entries():
        return identity
    entry = _ENTRIES[method["name"]]
    options = {**dict.fromkeys(entry.arguments), **entry.patterns, **method["options"]}
    # Lists: what was read from JSON has no tuples.
    options |= {k: list(patterns(options[k])) for k in entry.patterns}
    return {**identity, "method": {**method, "options": options}}
