"""BitFit: the bias terms alone."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("bitfit", paper="Ben Zaken, Ravfogel and Goldberg 2021, arXiv:2106.10199")
def bitfit() -> Method:
    """Train the bias terms only, those of norms included; the paper also trains the task head: add ``also="^head/"``."""
    return Method(Select(include=(r"(^|/)(b|bias)$",)), InPlace())
