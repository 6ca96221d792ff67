"""The last layers train."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("last_k_layers", paper="-")
def last_k_layers(k: int = 1) -> Method:
    """Train all weights of the last ``k`` layers. No backward pass runs below them."""
    if k < 1:
        raise ValueError(f"last_k_layers needs k of at least 1, not {k}")
    return Method(Select(layers=tuple(range(-k, 0))), InPlace())
