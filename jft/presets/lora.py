"""LoRA, with the scale of rsLoRA and the learning rates of LoRA+."""

from __future__ import annotations

from jft.methods.low_rank import LowRank
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("lora", paper="Hu et al. 2021, arXiv:2106.09685")
def lora(
    rank: int = 16,
    alpha: float | None = None,
    rank_stabilised: bool = False,
    b_rate: float = 1.0,
) -> Method:
    """Train ``scale * a @ b`` beside every matrix inside the layers.

    alpha: the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rank_stabilised`` (rsLoRA); default
    ``alpha = rank``. b_rate: ``b`` learns this many times faster than ``a`` (LoRA+; its authors suggest 16).
    """
    return Method(
        Select(linear_only=True),
        LowRank(rank, float(rank if alpha is None else alpha), rank_stabilised, b_rate),
    )
