"""LoRA, with the scale of rsLoRA and the learning rates of LoRA+."""

from __future__ import annotations

from jft.methods.card import Card
from jft.methods.low_rank import LowRank
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select

CARD = Card(
    formula=(
        "h = x W + (alpha / rank) x a b, W frozen, a ~ U(+-1/sqrt(I)), b = 0; alpha / sqrt(rank) with rank_stabilised "
        "(Kalajdzievski 2023, arXiv:2312.03732); b at b_rate times the learning rate (Hayou et al. 2024, arXiv:2402.12354)"
    ),
    follows="the paper; the draw of a is that of the code (the paper: a Gaussian)",
    code="microsoft/LoRA@c4593f0, loralib/layers.py:91-157",
    departs="every matrix inside the layers; the paper and its code adapt q and v (include='attn/(q|v)/'). No dropout",
    check="values and gradients against float64 NumPy; forward, merged weight and gradients against peft",
    defaults={
        "rank": ("1 to 64", 0),
        "alpha": ("the first rank tried", 1),
        "rank_stabilised": (False, False),
        "b_rate": (1, 1),
    },
)


@register("lora", paper="Hu et al. 2021, arXiv:2106.09685", card=CARD)
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
