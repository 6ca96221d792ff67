"""`DataError`, and the strict reading of settings that raises it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jft.names import nearest


class DataError(ValueError):
    """Wrong data or data settings. The message names the place (file and line, or example), the value, the way out."""


def hint(name: object, known: Iterable[Any]) -> str:
    """`` Did you mean 'x'?`` where a known name is close, else the list of the known ones."""
    known = sorted(str(k) for k in known)
    return nearest(name, known, hint=" Did you mean '{}'?", otherwise=f" Known: {', '.join(known)}.")


def choose(name: Any, known: Mapping[Any, Any] | Iterable[Any], what: str) -> Any:
    """``known[name]`` (or ``name``, where ``known`` is no mapping); a :class:`DataError` with the nearest name otherwise."""
    names = list(known)
    if name not in names:
        raise DataError(f"{what} {name!r} is unknown.{hint(name, names)}")
    return known[name] if isinstance(known, Mapping) else name


def refuse_unknown(settings: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """:class:`DataError` for the first unknown key of ``settings``, with the nearest known one."""
    known = list(known)
    for key in settings:
        if key not in known:
            raise DataError(f"{what} has no setting {key!r}.{hint(key, known)}")


def shorten(value: Any, width: int = 80) -> str:
    """``repr`` of a value, cut to ``width`` characters: for messages."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
