"""Patterns of paths that presets share: one or several regular expressions, and those of parts that every model has."""

from __future__ import annotations

from collections.abc import Sequence

Patterns = Sequence[str] | str
EVERYTHING = ("",)
HEADS = (r"(^|/)(head|classifier)/",)
LAYERS = (r"(^|/)(layers?|blocks?|h)(/|_)",)


def patterns(value: Patterns) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
