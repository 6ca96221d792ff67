"""`DataError`, and the strict reading of settings that raises it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class DataError(ValueError):
    """Wrong data or data settings. The message names the place (file and line, or example), the value, the way out."""


def nearest(name: object, known: Iterable[Any]) -> str:
    """`` Did you mean 'x'?`` where a known name is close, else the list of the known ones."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


def choose(name: Any, known: Mapping[Any, Any] | Iterable[Any], what: str) -> Any:
    """``known[name]`` (or ``name``, where ``known`` is no mapping); a :class:`DataError` with the nearest name otherwise."""
    names = list(known)
    if name not in names:
        raise DataError(f"{what} {name!r} is unknown.{nearest(name, names)}")
    return known[name] if isinstance(known, Mapping) else name


def refuse_unknown(settings: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """Raises :class:`DataError` for the first key of ``settings`` that is not known, with the nearest known one."""
    known = list(known)
    for key in settings:
        if key not in known:
            raise DataError(f"{what} has no setting {key!r}.{nearest(key, known)}")


def shorten(value: Any, width: int = 80) -> str:
    """``repr`` of a value, cut to ``width`` characters: for messages."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
