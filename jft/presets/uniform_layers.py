"""Layers spaced evenly over the depth train."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.layers import Spaced


@register("uniform_layers", paper="Wang et al. 2024, arXiv:2412.12785")
def uniform_layers(fraction: float = 0.25, ends: bool = False) -> Method:
    """Train all weights of a quarter of the layers, spaced evenly over the depth.

    The k layers are ``floor(i L / k)``, or with ``ends`` spread from the first to the last. The paper tunes the language
    model of a vision-language model so, together with the projector between them: ``also`` its pattern. Its pruning of
    layers outside the choice afterwards is not part of this.
    """
    return Method(Select(layers=Spaced(fraction, ends)), InPlace())
