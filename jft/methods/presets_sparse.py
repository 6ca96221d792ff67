"""Presets that train parts of weights in place, which may change during a run: blocks, entries that drop and grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jft.methods.parametrise import InPlace
from jft.methods.patterns import patterns
from jft.methods.penalties import Nuclear
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.methods.schedules import DropAndGrow, Refresh, StillSmall
from jft.select import budget, granularity, scores
from jft.select.granularity import How

Names = Sequence[str] | str
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
    include: Names = ("",),
    exclude: Names = (),
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
    if isinstance(score, str):
        if score not in SCORES:
            raise ValueError(f"score {score!r} is unknown; choose one of {', '.join(SCORES)}")
        score = SCORES[score]
    select = Select(
        patterns(include),
        patterns(exclude),
        linear_only=True,
        score=score,
        granularity=granularity.Block(*block),
        pool=pool,
        budget=where[scope](density=density, round="nearest"),
    )
    return Method(select, InPlace())


@register("lift", paper="Liu et al. 2025, arXiv:2506.00772")
def lift(
    rank: int = 128,
    filter_rank: int = 128,
    every: int = 0,
    largest: bool = True,
    exact: bool = False,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train the entries that are largest in a low-rank approximation of each matrix: ``|W_r|``, ``rank * (I + O)`` of them.

    W_r is the truncated SVD of the current weight at ``filter_rank``. every: steps between refreshes of the selection (0:
    never; the paper's runs refresh every few hundred), moments of what stays carried over. This is the paper's rule; the
    released scripts in fact select the *smallest* ``|W_r|``, which is ``largest=False``. exact: a full SVD in place of a
    randomised one.
    """
    select = Select(
        patterns(include),
        patterns(exclude),
        linear_only=True,
        score=scores.LowRank(filter_rank, exact=exact),
        budget=budget.PerMatrix(rank=rank),
        largest=largest,
    )
    return Method(select, InPlace(), schedule=Refresh(every) if every else None)


@register("spiel_ag", paper="Ansell et al. 2024, arXiv:2401.16405")
def spiel_ag(
    density: float = 0.01,
    every: int = 20,
    first: float = 0.2,
    batches: int = 5,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train entries of every matrix that start at random; drop what changed least, grow what has the largest gradient.

    See :class:`jft.methods.schedules.DropAndGrow`: accumulated gradients over ``batches`` batches. The paper decays towards
    the base: ``optimizer.decay_to='base'``. Differs from the released code in where gradients come from: the batches that
    the run is about to train on, at the weights of that moment.
    """
    return _spiel(DropAndGrow(every, first, batches, "gradient"), density, include, exclude)


@register("spiel_ma", paper="Ansell et al. 2024, arXiv:2401.16405")
def spiel_ma(
    density: float = 0.01,
    every: int = 20,
    first: float = 0.2,
    batches: int = 5,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """As spiel_ag, growing by the momentum that SM3 keeps in one number per row and column: ``row * column``."""
    return _spiel(DropAndGrow(every, first, batches, "sm3"), density, include, exclude)


def _spiel(schedule: DropAndGrow, density: float, include: Names, exclude: Names) -> Method:
    select = Select(
        patterns(include),
        patterns(exclude),
        linear_only=True,
        score=scores.Random(),
        budget=budget.PerMatrix(density=density),
    )
    return Method(select, InPlace(), schedule=schedule)


@register("sara", paper="Hu et al. 2024, arXiv:2409.06633")
def sara(
    density: float | None = 0.1,
    threshold: float | None = None,
    nuclear: float = 1e-4,
    again: float = 0.5,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train the smallest entries of the matrices inside the layers, their change kept near low rank by its nuclear norm.

    density: the fraction of all of them that is smallest in size (the paper: 0.1 to 0.2), or with ``density=None``
    threshold: all below it. nuclear: weight of the sum over matrices of the nuclear norm of what trains; 0 for none. Its
    cost is an eigendecomposition of each matrix's shorter side in every step. again: after which share of the run only the
    entries go on that are still no larger than the largest was at the start, the others keeping their value; 0 for never.
    The norm is then of the change of what still trains.
    """
    if (density is None) == (threshold is None):
        raise ValueError(f"sara takes one of density ({density}) and threshold ({threshold}); set the other to None")
    limit = budget.Globally(density=density) if threshold is None else budget.Beyond(threshold)
    select = Select(
        patterns(include), patterns(exclude), linear_only=True, score=scores.Magnitude(), budget=limit, largest=False
    )
    schedule = StillSmall(again) if again else None
    return Method(select, InPlace(), penalties=(Nuclear(nuclear),) if nuclear else (), schedule=schedule)
