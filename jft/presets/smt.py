"""Sparse matrix tuning: the blocks with the largest gradient."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, granularity, scores
from jft.select.granularity import How


@register("smt", paper="He et al. 2024, arXiv:2405.15525")
def smt(
    attention: float = 0.0084,
    mlp: float = 0.0084,
    block: tuple[int, int] = (256, 256),
    batches: int = 100,
    pool: How = "abs_mean",
) -> Method:
    """Train the blocks of the matrices inside layers whose gradient, summed over 100 batches, is largest.

    attention, mlp: the fraction of the blocks of each kind, which compete over all layers; 0 for none. pool: of the summed
    gradient over a block, ``abs_mean`` as in its code. The code sums gradients over 100 steps of full fine-tuning and goes
    on from there; here they are all taken at the base, which needs no optimizer state of the whole model. Its mode for
    channels, whose gradient lands in the wrong rows, is not offered: take block_sparse with a row as the block.
    """
    parts = tuple((rf"(^|/){name}/", fraction) for name, fraction in (("attn", attention), ("mlp", mlp)) if fraction)
    if not parts:
        raise ValueError("smt with attention and mlp both 0 trains nothing")
    select = Select(
        ("|".join(pattern for pattern, _ in parts),),
        linear_only=True,
        score=scores.Accumulated(batches),
        granularity=granularity.Block(*block),
        pool=pool,
        budget=budget.ByPattern(tuple((name, budget.Globally(density=fraction)) for name, fraction in parts)),
    )
    return Method(select, InPlace())
