"""Jitted programs that are compiled once for equal arguments, and whose weights are arguments, not constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def once(make: F) -> F:
    """``make`` of static arguments, remembered: equal ones share a jitted program; unhashable ones get their own."""
    remembered = functools.lru_cache(maxsize=32)(make)

    @functools.wraps(make)
    def of(*static: Any) -> Any:
        try:
            hash(static)
        except TypeError:
            return make(*static)
        return remembered(*static)

    of.cache_clear = remembered.cache_clear  # type: ignore[attr-defined]
    return of  # type: ignore[return-value]
