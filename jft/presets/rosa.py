"""RoSA: a low-rank change and, beside it, the entries with the largest gradient."""

from __future__ import annotations

from jft.methods.low_rank import LowRank, WithLowRank
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import After
from jft.methods.select import Select
from jft.select import budget, scores


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
        linear_only=True,
        score=scores.Tuned(score, warmup, low_rank) if restart else score,
        budget=budget.PerMatrix(density=density),
    )
    return Method(select, WithLowRank(InPlace(), low_rank), schedule=None if restart else After(warmup))
