"""SpIEL-AG: entries that drop, and grow by accumulated gradients."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import DropAndGrow
from jft.methods.select import Select
from jft.select import budget, scores


@register("spiel_ag", paper="Ansell et al. 2024, arXiv:2401.16405")
def spiel_ag(
    density: float = 0.01,
    every: int = 20,
    first: float = 0.2,
    batches: int = 5,
) -> Method:
    """Train entries of every matrix that start at random; drop what changed least, grow what has the largest gradient.

    See :class:`jft.methods.schedules.DropAndGrow`: accumulated gradients over ``batches`` batches. The paper decays towards
    the base: ``optimizer.decay_to='base'``. Differs from the released code in where gradients come from: the batches that
    the run is about to train on, at the weights of that moment.
    """
    select = Select(linear_only=True, score=scores.Random(), budget=budget.PerMatrix(density=density))
    return Method(select, InPlace(), schedule=DropAndGrow(every, first, batches, "gradient"))
