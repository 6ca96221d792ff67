"""SHiRA: as many entries of each matrix as a LoRA of some rank has, by one of five masks."""

from __future__ import annotations

from typing import Literal

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.select import budget, drawn, scores


@register("shira", paper="Bhardwaj et al. 2024, arXiv:2406.13175")
def shira(
    rank: int = 32,
    mask: Literal["struct", "rand", "wm", "grad", "snip"] = "rand",
    batches: int = 1,
) -> Method:
    """Train ``rank * (I + O)`` entries of each matrix inside the layers, as many as LoRA of that rank would.

    mask: the paper's five. ``struct``, the diagonal and then whole rows and columns drawn at random, the last of them in
    part, so that the number is exact; ``rand``; ``wm``, the largest weights; ``grad``, the largest gradients; ``snip``, the
    largest ``|gradient * weight|``; these two by the mean gradient of ``batches``. peft has ``rand`` alone.
    """
    masks: dict[str, scores.Score] = {
        "struct": drawn.Cross(),
        "rand": scores.Random(),
        "wm": scores.Magnitude(),
        "grad": scores.Gradient(batches),
        "snip": scores.Snip(batches),
    }
    if mask not in masks:
        raise ValueError(f"mask {mask!r} is unknown; choose one of {', '.join(masks)}")
    return Method(Select(linear_only=True, score=masks[mask], budget=budget.PerMatrix(rank=rank)), InPlace())
