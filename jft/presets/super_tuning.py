"""Super-tuning and Supra: the largest (or smallest) entries of each matrix."""

from __future__ import annotations

from jft.methods import Card
from jft.methods.low_rank import LowRank
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores

CARD = Card(
    formula="Of each matrix of n entries the floor((1 - sparsity) * n) largest |w| train; with rank r also (alpha / r) a b, "
    "a[I, r] random, b[r, O] = 0.",
    follows="code: selection per matrix, the scale alpha = 2 r, an alpha without a rank refused",
    code="huggingface/peft@0.21.2, src/peft/tuners/supertuning",
    departs="The count is floored in decimal arithmetic, peft's in binary, which can be one less. No dropout (0 in peft).",
    defaults={"sparsity": (0.99, 0.99), "largest": (True, True), "rank": (0, 0), "alpha": ("-", "2 r")},
    check="entries and three Adam steps against float64 NumPy; with factors a step of both; outputs and gradients against peft",
)


@register("super_tuning", paper="arXiv:2607.09287", card=CARD)
def super_tuning(
    sparsity: float = 0.99,
    largest: bool = True,
    rank: int = 0,
    alpha: float | None = None,
) -> Method:
    """Train the ``1 - sparsity`` of the entries of each matrix inside the layers that are largest in size; no data needed.

    largest: or the smallest, the paper's "bottom"; which is better depends on model and task. rank: of a low-rank change
    beside them, which makes it the paper's Supra; alpha: its scale times ``rank``, ``2 * rank`` as in peft. The count is
    ``floor((1 - sparsity) * size)`` in decimal arithmetic; peft's binary one can be one less. Raises ``ValueError`` for an
    alpha without a rank.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it is the fraction that stays frozen, from 0 to below 1")
    if alpha is not None and not rank:
        raise ValueError(f"alpha={alpha} scales the low-rank change, and rank is 0; give rank=, or leave alpha out")
    train = LowRank(rank, float(2 * rank if alpha is None else alpha)) if rank else InPlace()
    # round: 1 - 0.9 is 0.09999999999999998 in binary, whose floor can be one entry less.
    limit = budget.PerMatrix(density=round(1 - sparsity, 12))
    return Method(Select(linear_only=True, score=scores.Magnitude(), budget=limit, largest=largest), train)
