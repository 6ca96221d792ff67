"""Full fine-tuning."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("full", paper="-")
def full() -> Method:
    """Train every weight."""
    return Method(Select(), InPlace())
