"""Linearized (tangent-space) fine-tuning. Any other method trains so too: ``forward="linearized"``."""

from __future__ import annotations

from jft.methods.card import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select

CARD = Card(
    formula="f(x; theta0) + grad f(x; theta0) tau, tau the change of all weights, from zero",
    follows="the paper, equation 4, and its code, which gets both terms by one Jacobian-vector product",
    code="gortizji/tangent_task_arithmetic@0aa0e18, src/linearize.py:47-79",
    departs=(
        "weight decay pulls tau to zero, the code's theta0 + tau: at its 0.1 and learning rate 1e-5 over 2000 steps the code "
        "shrinks weights by 0.1 %. All of the model by default; the code linearizes CLIP's image encoder (until='features', "
        "freeze='classifier')"
    ),
    check="outputs, gradients and SGD against the dense Jacobian in float64, for every family of models",
)


@register("linearized", paper="Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827", card=CARD)
def linearized() -> Method:
    """Train the change tau of all weights in ``f(theta0) + J(theta0) tau``, the model's first-order expansion at the base.

    ``include="attn"`` moves the attention modules alone. With CLIP and other classifiers the paper linearizes the image
    encoder and puts the frozen zero-shot head behind it: ``until="features"``, ``freeze="classifier"``. tau starts at zero
    and is what trains: weight decay pulls it to zero, that is to the base; the paper's code decays the weights themselves,
    ``theta0 + tau``, to zero.
    """
    return Method(Select(), InPlace(), forward="linearized")
