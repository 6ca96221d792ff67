"""Presets that train a model linearized at its base. Any other trains so too: ``forward="linearized"``."""

from __future__ import annotations

from collections.abc import Sequence

from jft.methods.low_rank import LowRankFixed
from jft.methods.parametrise import InPlace
from jft.methods.patterns import patterns
from jft.methods.plan import Method, Select
from jft.methods.registry import register

Names = Sequence[str] | str


@register("linearized", paper="Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827")
def linearized(include: Names = ("",), exclude: Names = ()) -> Method:
    """Train the change tau of all weights in ``f(theta0) + J(theta0) tau``, the model's first-order expansion at the base.

    include, exclude: patterns of the weights that move (``attn`` for the attention modules alone). With CLIP and other
    classifiers the paper linearizes the image encoder and puts the frozen zero-shot head behind it: ``until="features"``,
    ``freeze="classifier"``. tau starts at zero and is what trains: weight decay pulls it to zero, that is to the base; the
    paper's code decays the weights themselves, ``theta0 + tau``, to zero.
    """
    return Method(Select(patterns(include), patterns(exclude)), InPlace(), forward="linearized")


@register("l_lora", paper="Tang et al. 2023, arXiv:2310.04742")
def l_lora(rank: int = 16, alpha: float | None = None, include: Names = ("",), exclude: Names = ()) -> Method:
    """Train a low-rank change of every matrix inside the layers, of the model linearized in its factors at their start.

    There ``b`` is zero, so that the derivative in ``a`` is: tau is ``(alpha / rank) a0 b``, with ``a0`` as LoRA draws it, and
    outputs are linear in what trains. alpha: default ``rank``. ``lora`` with ``forward="linearized"`` trains both factors:
    linear in tau, not in them.
    """
    how = LowRankFixed(rank, float(rank if alpha is None else alpha))
    return Method(Select(patterns(include), patterns(exclude), linear_only=True), how, forward="linearized")
