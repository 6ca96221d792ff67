"""LIFT: the entries that are largest in a low-rank approximation of each matrix."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import Refresh
from jft.methods.select import Select
from jft.select import budget, scores


@register("lift", paper="Liu et al. 2025, arXiv:2506.00772")
def lift(
    rank: int = 128,
    filter_rank: int = 128,
    every: int = 0,
    largest: bool = True,
    exact: bool = False,
) -> Method:
    """Train the entries that are largest in a low-rank approximation of each matrix: ``|W_r|``, ``rank * (I + O)`` of them.

    W_r is the truncated SVD of the current weight at ``filter_rank``. every: steps between refreshes of the selection (0:
    never; the paper's runs refresh every few hundred), moments of what stays carried over. This is the paper's rule; the
    released scripts in fact select the *smallest* ``|W_r|``, which is ``largest=False``. exact: a full SVD in place of a
    randomised one.
    """
    select = Select(
        linear_only=True,
        score=scores.LowRank(filter_rank, exact=exact),
        budget=budget.PerMatrix(rank=rank),
        largest=largest,
    )
    return Method(select, InPlace(), schedule=Refresh(every) if every else None)
