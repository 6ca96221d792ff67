"""LIFT: the entries that are largest in a low-rank approximation of each matrix."""

from __future__ import annotations

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import Refresh
from jft.methods.select import Select
from jft.select import budget, scores

CARD = Card(
    formula=(
        "W_r the truncated SVD of each matrix W[I, O] at filter_rank; its rank (I + O) entries of largest |W_r| train; every "
        "`every` steps the same again from the current weights; Adam's moments of entries that stay are carried over, those "
        "of new ones start at 0, and all are corrected by one count of steps: m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)"
    ),
    follows=(
        "Paper: the largest |W_r|, ranks, refreshes, moments carried. Code: the exact SVD, one count of steps for all "
        "entries, the interval's default, matrices of linear layers without the head."
    ),
    code="zihanghliu/LIFT@c4a679d8bda092d6ef594fe846acf6787b405631, src/sparseAdam.py, src/finetune_sft.py",
    departs=(
        "The code selects by torch.topk(largest='largest' in mask_type), and its scripts pass mask_type=lift_sparse, so that "
        "in fact the smallest |W_r| train: largest=False. It refreshes after every*n - 1 steps, here after every*n. Its eps "
        "is added to sqrt(v) before the correction. A budget of more entries than a matrix has is refused, where the code "
        "takes all."
    ),
    defaults={
        "rank": (128, 128),
        "filter_rank": (128, 128),
        "every": ("-", "200; scripts 400, 2000, one 10"),
        "largest": (True, False),
        "exact": (True, True),
        "aged": ("-", False),
    },
    check=(
        "selections and five steps through two refreshes against float64 NumPy, both counts of steps; the randomised "
        "selection and the exact one on Gaussian matrices"
    ),
)


@register("lift", paper="Liu et al. 2025, arXiv:2506.00772", card=CARD)
def lift(
    rank: int = 128,
    filter_rank: int = 128,
    every: int = 200,
    largest: bool = True,
    exact: bool = True,
    aged: bool = False,
) -> Method:
    """Train the entries that are largest in a low-rank approximation of each matrix: ``|W_r|``, ``rank * (I + O)`` of them.

    W_r is the truncated SVD of the current weight at ``filter_rank``. every: steps between refreshes of the selection (0:
    never), moments of what stays carried over. largest: the paper's rule; the released scripts in fact select the *smallest*
    ``|W_r|``, which is ``largest=False``. exact: W_r from all eigenvectors of the smaller Gram matrix; False for a random
    subspace (:func:`jft.select.low_rank.low_rank`), which costs less where ``filter_rank`` is far below I and O: of Gaussian
    matrices, the worst case, it selects 99.7% of the same entries at ranks of 16 of 1024 x 1024, and 98.7% at 8 of 256 x 128.
    aged: Adam's bias correction by how long each entry has trained, rather than by one count of steps as in the released
    code, under which a new entry's first update, late in a run, is ``(1 - b1) / sqrt(1 - b2)`` of the learning rate, 3.2 for
    Adam's defaults.
    """
    if aged and not every:
        raise ValueError(
            "aged=True tells new entries from old ones, and with every=0 none is new; set every, or aged=False"
        )
    select = Select(
        linear_only=True,
        score=scores.LowRank(filter_rank, exact=exact),
        budget=budget.PerMatrix(rank=rank),
        largest=largest,
    )
    return Method(select, InPlace(), schedule=Refresh(every, aged=aged) if every else None)
