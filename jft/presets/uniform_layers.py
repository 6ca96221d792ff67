"""Layers spaced evenly over the depth train."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.layers import Depth, Spaced


@dataclasses.dataclass(frozen=True)
class EverySecond(Depth):
    """A ``fraction`` of L layers (at least one), spread from the first to the last of every second layer.

    Of the M = ceil(L / 2) layers 0, 2, 4, .. the k = round(fraction L) at ``round(i (M - 1) / (k - 1))``, i = 0 to k - 1,
    halves upwards; for k > M the same of all L layers.
    """

    fraction: float

    def __post_init__(self) -> None:
        """Refuse what is no share, as :class:`jft.select.layers.Spaced` does."""
        # Its __post_init__ has the check and the message.
        Spaced(self.fraction)

    def of(self, length: int) -> tuple[int, ...]:
        """Their indices among ``length`` layers."""
        # Half upwards; round() would take it to the even number.
        k = max(1, math.floor(self.fraction * length + 0.5))
        step = 2 if k <= (length + 1) // 2 else 1
        last = -(-length // step) - 1
        # round half up in integers: Python's round goes to the even number, and floats depend on their rounding.
        return tuple(step * ((2 * i * last + k - 1) // (2 * (k - 1))) for i in range(k)) if k > 1 else (0,)

    def __str__(self) -> str:
        return f"{self.fraction:.0%}, every second one evenly spaced"


CARD = Card(
    formula="k = round(fraction L) of L layers; of layers 0, 2, 4, .. (M of them) those at round(i (M - 1) / (k - 1)): for "
    "L = 32, k = 8 layers 0, 4, 8, 12, 18, 22, 26, 30",
    follows="the paper's 8 of 32 layers, through notes on it; the rule for other depths is one that gives them",
    check="the published indices, and other depths by hand; one and three Adam steps against float64",
    departs="the paper trains LoRA factors in these layers, and the projector: here all their weights train in place "
    "(LoRA: Method(Select(linear_only=True, layers=...), LowRank(rank)); the projector: also=). Its rank, the rule behind its "
    "indices and its code are not known here. Its pruning of other layers afterwards is not part of this",
    defaults={"fraction": (0.25, "-"), "spacing": ("0, 4, 8, 12, 18, 22, 26, 30 of 32", "-")},
)


@register("uniform_layers", paper="Wang et al. 2024, arXiv:2412.12785", card=CARD)
def uniform_layers(fraction: float = 0.25, spacing: Literal["paper", "floor", "ends"] = "paper") -> Method:
    """Train all weights of a quarter of the layers, spaced evenly over the depth.

    spacing: how the k layers lie among L. ``paper``: 0, 4, 8, 12, 18, 22, 26, 30 of 32, elsewhere by :class:`EverySecond`;
    ``floor``: ``floor(i L / k)``; ``ends``: ``round(i (L - 1) / (k - 1))``, the first and the last among them. The paper
    trains LoRA factors in these layers of the language model of a vision-language model, together with the projector
    between them (``also`` its pattern); here their weights train in place. Its pruning of layers outside the choice
    afterwards is not part of this. Raises ``ValueError`` for a fraction outside (0, 1] and an unknown spacing.
    """
    if spacing not in ("paper", "floor", "ends"):
        raise ValueError(f"spacing is {spacing!r}; choose one of paper, floor, ends")
    layers = EverySecond(fraction) if spacing == "paper" else Spaced(fraction, spacing == "ends")
    return Method(Select(layers=layers), InPlace())
