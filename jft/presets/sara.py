"""SaRA: the smallest entries, with a change near low rank."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp

from jft.methods.parametrise import InPlace
from jft.methods.penalties import Nuclear
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import Renewal, Schedule, Standing
from jft.methods.select import Select
from jft.select import budget, scores


@dataclasses.dataclass(frozen=True)
class StillSmall(Schedule):
    """Part-way, only entries go on that are no larger than the largest of them was in the base; the others keep their value.

    at: after which share of the run, in (0, 1). With entries chosen as the smallest, that largest is the threshold by which
    they were (SaRA's progressive adjustment, Hu et al. 2024, arXiv:2409.06633).
    """

    at: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.at < 1:
            raise ValueError(f"a selection anew after a share {self.at} of the run; it lies between 0 and 1")

    def due(self, step: int, steps: int) -> bool:
        return step == max(1, round(self.at * steps))

    def renew(self, standing: Standing) -> Renewal:
        plan, kept, trained = standing.plan, standing.kept, standing.trained
        moved = plan.change(kept, trained)
        first = {p: trained[p] - moved[p] for p in plan.selects}
        threshold = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x)) for x in first.values()))
        chosen = {}
        for path in plan.selects:
            how, zeros = plan.leaves[path], jnp.zeros(kept[path]["w"].shape, jnp.float32)
            small = (jnp.abs(trained[path]) <= threshold).astype(jnp.float32)
            mask = how.spread(kept[path], small, zeros) > 0
            unit = plan.granularity(path, mask.shape)
            chosen[path] = unit.locate(mask, standing.calibration.lead(path), standing.grids.get(path, (1, 1)))
        return Renewal(chosen)


@register("sara", paper="Hu et al. 2024, arXiv:2409.06633")
def sara(
    density: float | None = 0.1,
    threshold: float | None = None,
    nuclear: float = 1e-4,
    again: float = 0.5,
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
    select = Select(linear_only=True, score=scores.Magnitude(), budget=limit, largest=False)
    schedule = StillSmall(again) if again else None
    return Method(select, InPlace(), penalties=(Nuclear(nuclear),) if nuclear else (), schedule=schedule)
