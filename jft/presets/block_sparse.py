"""Blocks of matrices train, and the backward pass computes the gradient of these alone."""

from __future__ import annotations

from typing import Literal

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, granularity, scores
from jft.select.granularity import How

SCORES: dict[str, scores.Score] = {
    "gradient": scores.Gradient(),
    "magnitude": scores.Magnitude(),
    "snip": scores.Snip(),
    "random": scores.Random(),
}


@register("block_sparse", paper="-")
def block_sparse(
    density: float = 0.05,
    block: tuple[int, int] = (128, 128),
    score: scores.Score | str = "gradient",
    pool: How = "l2",
    scope: Literal["matrix", "layer", "global"] = "matrix",
) -> Method:
    """Train blocks of the matrices inside layers: the backward pass computes the gradient of these blocks alone.

    score: of entries, pooled over a block: gradient, magnitude, snip or random, or any of :mod:`jft.select.scores`. scope:
    whether blocks compete inside each matrix (so that every layer has as many, which wastes nothing under a scan), each
    layer, or the whole model. An extent of ``block`` that does not divide a matrix becomes the largest divisor below it.
    128 x 128 is what a TPU multiplies at once; it stores narrower blocks padded to 128 columns. A CPU does well with 64 x 64.
    """
    where = {"matrix": budget.PerMatrix, "layer": budget.PerLayer, "global": budget.Globally}
    if scope not in where:
        raise ValueError(f"scope {scope!r} is unknown; choose one of {', '.join(where)}")
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise ValueError(f"block is {block!r}; give rows and columns, as in block=(64, 64)")
    if isinstance(score, str):
        if score not in SCORES:
            raise ValueError(f"score {score!r} is unknown; choose one of {', '.join(SCORES)}")
        score = SCORES[score]
    select = Select(
        linear_only=True,
        score=score,
        granularity=granularity.Block(*block),
        pool=pool,
        # To the nearest: matrices have few blocks, and rounding down would lose a large part of a small density.
        budget=where[scope](density=density, round="nearest"),
    )
    return Method(select, InPlace())
