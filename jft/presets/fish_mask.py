"""FISH mask: the entries with the largest Fisher information."""

from __future__ import annotations

from typing import Literal

from jft.methods.parametrise import InPlace
from jft.methods.patterns import HEADS
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores
from jft.select.calibration import Per


@register("fish_mask", paper="Sung, Nair and Raffel 2021, arXiv:2111.09839")
def fish_mask(
    density: float = 0.005,
    count: int = 1024,
    per: Per = "example",
    power: Literal[1, 2] = 2,
    tokens: Literal["mean", "sum"] = "mean",
) -> Method:
    """Train the entries of the whole model, its head apart, with the largest Fisher information.

    density: of all those weights together. count, per: the information is a mean over ``count`` single examples (the
    paper), whole batches (cheaper, and another quantity), or examples whose target is ``sampled`` from the model (the true
    one). power 2 is the paper's squared gradient and its scripts' ``label-square``; 1 is ``label-absolute``, the default of
    its code. A new head always trains in full: add ``also="^classifier/"``.
    """
    score = scores.Fisher(count, per, power, tokens)
    return Method(Select(exclude=HEADS, score=score, budget=budget.Globally(density=density)), InPlace())
