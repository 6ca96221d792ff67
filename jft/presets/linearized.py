"""Linearized (tangent-space) fine-tuning. Any other method trains so too: ``forward="linearized"``."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("linearized", paper="Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827")
def linearized() -> Method:
    """Train the change tau of all weights in ``f(theta0) + J(theta0) tau``, the model's first-order expansion at the base.

    ``include="attn"`` moves the attention modules alone. With CLIP and other classifiers the paper linearizes the image
    encoder and puts the frozen zero-shot head behind it: ``until="features"``, ``freeze="classifier"``. tau starts at zero
    and is what trains: weight decay pulls it to zero, that is to the base; the paper's code decays the weights themselves,
    ``theta0 + tau``, to zero.
    """
    return Method(Select(), InPlace(), forward="linearized")
