"""Training by name: the weights whose path matches a pattern."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.tree import EVERYTHING, Patterns, patterns


@register("pattern", paper="-")
def pattern(include: Patterns = EVERYTHING) -> Method:
    """Train the weights whose path matches any of ``include`` and none of ``exclude`` (regular expressions).

    include is part of the method: it selects, where that of other presets narrows what they select.
    """
    return Method(Select(patterns(include)), InPlace())
