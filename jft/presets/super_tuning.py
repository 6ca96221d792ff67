"""Super-tuning and Supra: the largest (or smallest) entries of each matrix."""

from __future__ import annotations

from jft.methods.low_rank import LowRank
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores


@register("super_tuning", paper="arXiv:2607.09287")
def super_tuning(
    sparsity: float = 0.99,
    largest: bool = True,
    rank: int = 0,
    alpha: float | None = None,
) -> Method:
    """Train the ``1 - sparsity`` of the entries of each matrix inside the layers that are largest in size; no data needed.

    largest: or the smallest, the paper's "bottom"; which is better depends on model and task. rank: of a low-rank change
    beside them, which makes it the paper's Supra; alpha: its scale times ``rank``, ``2 * rank`` as in peft. The count is
    ``floor((1 - sparsity) * size)`` in decimal arithmetic; peft's binary one can be one less.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it is the fraction that stays frozen, from 0 to below 1")
    train = LowRank(rank, float(2 * rank if alpha is None else alpha)) if rank else InPlace()
    limit = budget.PerMatrix(density=round(1 - sparsity, 12))
    return Method(Select(linear_only=True, score=scores.Magnitude(), budget=limit, largest=largest), train)
