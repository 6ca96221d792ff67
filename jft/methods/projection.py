"""From a change of every weight to one of few: what stays when a gated change is cut down to its budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import tree
from jft.methods.gates import HardConcrete
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method, Plan
from jft.methods.schedules import Renewal, Schedule, Standing
from jft.select.budget import Everything
from jft.select.probe import Probe
from jft.select.scores import Magnitude
from jft.select.threshold import top
from jft.select.units import Entry

Array = jax.Array


def project(plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any], density: float) -> dict[str, Array]:
    """Which entries stay: bool, like each weight, True for the largest ``|z * d|`` of all :class:`HardConcrete` weights.

    Exactly ``round(density * entries)`` of them over all those weights, ties by path and then by position: the magnitude
    projection of diff pruning (Guo et al. 2021, arXiv:2012.07463), whose released code searches a threshold by bisection
    and stops near the count. Raises ``ValueError`` where the plan has no such weight or density is not in (0, 1].
    """
    changes = moved(plan, trained)
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it is the fraction of entries that stay, above 0 and up to 1")
    return top({p: jnp.abs(x) for p, x in changes.items()}, max(1, round(density * tree.count(changes))))


def moved(plan: Any, trained: Mapping[str, Any]) -> dict[str, Array]:
    """``z * d`` in evaluation of every :class:`HardConcrete` weight, float32."""
    gated = {p: how for p, how in plan.leaves.items() if isinstance(how, HardConcrete)}
    if not gated:
        raise ValueError("no weight here has a gated change to project; this goes with train=HardConcrete()")
    return {p: how.moved(trained[p]) for p, how in gated.items()}


def projected(
    plan: Any, base: Mapping[str, Any], trained: Mapping[str, Any], support: Mapping[str, Array]
) -> dict[str, Array]:
    """Where the second phase starts: ``base + where(support, z * d, 0)`` by path, float32."""
    changes = moved(plan, trained)
    return {p: base[p].astype(jnp.float32) + jnp.where(support[p], x, 0) for p, x in changes.items()}


@dataclasses.dataclass(frozen=True)
class Projection(Schedule):
    """Two phases: gated changes train; after a share ``at`` of the steps :func:`project` cuts them down to ``density``.

    The entries that stay train on in place, from where they are, with new moments; all others are the base again.
    """

    density: float = 0.005
    at: float = 0.5
    reset = True

    def __post_init__(self) -> None:
        """Refuse what is no share or density."""
        if not (0 < self.at < 1 and 0 < self.density <= 1):
            raise ValueError(f"a projection to density {self.density} after a share {self.at} of the steps")

    def _boundary(self, steps: int) -> int:
        return max(1, round(self.at * steps))

    def begin(self, plan: Plan, probe: Probe, grids: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
        return {}

    def due(self, step: int, steps: int) -> bool:
        return step == self._boundary(steps)

    def method_at(self, method: Method, step: int, steps: int) -> Method:
        if step < self._boundary(steps):
            return method
        # The score is never asked: the support is that of the projection.
        select = dataclasses.replace(method.select, score=Magnitude(), budget=Everything())
        return dataclasses.replace(method, select=select, train=InPlace())

    def renew(self, standing: Standing) -> Renewal:
        plan, kept, trained = standing.plan, standing.kept, standing.trained
        support = project(plan, kept, trained, self.density)
        weights = projected(plan, {p: kept[p] for p in support}, trained, support)
        entry, lead, cells = Entry(), standing.probe.lead, standing.grids
        chosen = {p: entry.locate(mask, lead(p), cells.get(p, (1, 1))) for p, mask in support.items()}
        return Renewal(chosen, self.method_at(plan.method, standing.step, standing.steps), weights=weights)
