"""Presets of a low-rank change and a sparse one that train together."""

from __future__ import annotations

from collections.abc import Sequence

from jft.methods.low_rank import LowRank, WithLowRank
from jft.methods.parametrise import InPlace
from jft.methods.patterns import patterns
from jft.methods.plan import Method, Select
from jft.methods.pruned import Pruned
from jft.methods.registry import register
from jft.methods.schedules import After
from jft.select import budget, scores

Names = Sequence[str] | str


@register("rosa", paper="Nikdan et al. 2024, arXiv:2401.04679")
def rosa(
    rank: int = 16,
    density: float = 0.006,
    warmup: int = 64,
    alpha: float = 16.0,
    batches: int = 1,
    squared: bool = False,
    restart: bool = True,
    low_rank_rate: float = 1.0,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train a low-rank change of every matrix inside the layers, and beside it the entries with the largest gradient.

    The gradient is that of the weight after ``warmup`` steps of the low-rank change alone, the mean of ``batches`` (or with
    ``squared`` the mean of its squares, per batch); the ``density`` of each matrix's entries where it is largest train.
    restart: the warm-up only finds them, and both start anew (what the authors recommend); without it the low-rank change
    trains on and the entries join. low_rank_rate: its learning rate over that of the entries (their runs: 7e-4 over 2e-4).
    alpha: its scale is ``alpha / rank``.
    """
    low_rank = LowRank(rank, alpha, rate=low_rank_rate)
    score: scores.Score = scores.Fisher(batches, "batch") if squared else scores.Gradient(batches)
    select = Select(
        patterns(include),
        patterns(exclude),
        linear_only=True,
        score=scores.Tuned(score, warmup, low_rank) if restart else score,
        budget=budget.PerMatrix(density=density),
    )
    return Method(select, WithLowRank(InPlace(), low_rank), schedule=None if restart else After(warmup))


@register("dsee", paper="Chen et al. 2021, arXiv:2111.00160")
def dsee(
    rank: int = 16,
    count: int = 64,
    filter_rank: int = 16,
    keep: float = 1.0,
    alpha: float | None = None,
    exact: bool = False,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train a low-rank change of every matrix inside the layers and, beside it, the entries that low rank fits worst.

    Those are the ``count`` largest of each matrix's residual ``|W - W_r|``, r the ``filter_rank``: the paper decomposes W
    by GreBsmo into low rank and sparse, here W_r is an SVD (randomised unless ``exact``). keep: the fraction of each frozen
    matrix that stays, by size, ``M * W + U V + S``; 1 for all. The paper prunes by the size of the tuned weight and tunes
    again, and can prune whole heads by learned coefficients; here M is of the base and there from the start. alpha: the
    scale of the low-rank change times ``rank``; default ``rank``.
    """
    select = Select(
        patterns(include),
        patterns(exclude),
        linear_only=True,
        score=scores.LowRank(filter_rank, residual=True, exact=exact),
        budget=budget.PerMatrix(count=count),
    )
    first = Pruned(keep) if keep != 1 else InPlace()
    return Method(select, WithLowRank(first, LowRank(rank, float(rank if alpha is None else alpha))))
