"""Surgical fine-tuning by Fisher information: the layers that have most of it."""

from __future__ import annotations

from typing import Literal

from jft.methods.parametrise import InPlace
from jft.methods.patterns import LAYERS
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.budget import PerLeaf
from jft.select.calibration import Per
from jft.select.granularity import Layer
from jft.select.scores import Fisher


@register("surgical_fisher", paper="Lodha et al. 2023, arXiv:2310.17041")
def surgical_fisher(
    k: int = 1,
    examples: int = 1024,
    per: Per = "example",
    pool: Literal["sum", "mean"] = "sum",
) -> Method:
    """Train all weights of the k layers with the most empirical Fisher information.

    Per layer the mean of squared gradients of single examples is summed over its weights (``mean``: per weight), once, at the
    base. per: ``batch`` squares gradients of whole batches instead, cheaper, and another quantity; ``examples`` then counts
    batches. The task head trains with ``also="^classifier/"``.
    """
    score = Fisher(examples, per)
    select = Select(LAYERS, score=score, granularity=Layer(), pool=pool, budget=PerLeaf(count=k))
    return Method(select, InPlace())
