"""Schedules: when a run selects anew what trains, and what becomes of what it trained before.

A schedule says at which steps it is :meth:`~Schedule.due`, and what trains from there on: another selection inside the
same weights, or another choice of weights altogether. Values and moments of what stays carry over; what newcomers begin
with and whether what is dropped keeps its value or goes back to the base is the schedule's to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft.methods import select
from jft.methods.plan import Method, Plan
from jft.select import scores, threshold
from jft.select.calibration import Calibration

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Renewal:
    """What trains from now on. method: None for the same. chosen: ``{path: at}``, of what is selected inside weights.

    seeds: of newcomers, ``{path: (mean gradient, mean squared gradient)}`` laid out like the weight, as if Adam had seen
    ``age`` of them. weights: float32, of paths whose values start from there, with new moments, in place of what was.
    restart: whether the optimizer starts anew, counters included, with nothing of its state carried over.
    """

    chosen: Mapping[str, Array]
    method: Method | None = None
    seeds: Mapping[str, tuple[Array, Array]] = dataclasses.field(default_factory=dict)
    age: int = 0
    weights: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    restart: bool = False


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stands when it selects anew: its plan, what it holds by path, and the calibration at its current weights."""

    plan: Plan
    kept: Mapping[str, Any]
    trained: Mapping[str, Any]
    calibration: Calibration
    grids: Mapping[str, tuple[int, int]]
    step: int
    steps: int


class Schedule:
    """Frozen dataclasses; reset: whether what is dropped goes back to the base instead of keeping its value.

    aged: whether Adam corrects the bias of each value's moments by the steps this value has trained for, rather than all by
    the steps of the run.
    """

    reset: bool = False
    aged: bool = True

    def fitted(self, shapes: Mapping[str, Any]) -> Schedule:
        """The schedule of a run that trains weights of these shapes, where it depends on them; itself otherwise."""
        return self

    def begin(self, plan: Plan, calibration: Calibration, grids: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
        """``{path: at}`` of what trains from the start."""
        return select.choose(plan, calibration, grids)

    def due(self, step: int, steps: int) -> bool:
        """Whether to select anew before update ``step`` (from 0) out of ``steps``."""
        raise NotImplementedError

    def renew(self, standing: Standing) -> Renewal:
        """What trains from this step on."""
        raise NotImplementedError

    def method_at(self, method: Method, step: int, steps: int) -> Method:
        """``method`` as it is for update ``step``, where the schedule goes from one choice of weights to another."""
        return method


@dataclasses.dataclass(frozen=True)
class Refresh(Schedule):
    """The same selection again every ``every`` steps, from the weights as they then are; ``times`` times (0: always)."""

    every: int
    times: int = 0
    reset: bool = False
    aged: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.times < 0:
            raise ValueError(f"a refresh every {self.every} steps, {self.times} times; at least 1 and 0")

    def due(self, step: int, steps: int) -> bool:
        return step > 0 and step % self.every == 0 and (not self.times or step // self.every <= self.times)

    def renew(self, standing: Standing) -> Renewal:
        return Renewal(select.choose(standing.plan, standing.calibration, standing.grids))


@dataclasses.dataclass(frozen=True)
class After(Schedule):
    """Nothing is selected for ``steps`` steps, in which whatever else trains does; then, once, from the weights as they are."""

    steps: int
    reset: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a selection after {self.steps} steps; at least 1")

    def begin(self, plan: Plan, calibration: Calibration, grids: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
        chosen = {}
        for path in plan.selects:
            shape, lead = calibration.params[path].shape, calibration.lead(path)
            unit = plan.granularity(path, shape)
            # An empty selection in the layout of a real one: the step of the first phase needs its arrays.
            nothing = jnp.zeros(unit.units(shape, lead), bool)
            chosen[path] = unit.locate(nothing, lead, grids.get(path, (1, 1)))
        return chosen

    def due(self, step: int, steps: int) -> bool:
        return step == self.steps

    def renew(self, standing: Standing) -> Renewal:
        return Renewal(select.choose(standing.plan, standing.calibration, standing.grids))


@dataclasses.dataclass(frozen=True)
class DropAndGrow(Schedule):
    """Entries of each matrix that changed least go back to the base, and others take their place, as many as before.

    Before updates ``batches``, ``batches + every``, ``batches + 2 * every``, ... of each matrix's k entries the ``int(p k)``
    with the smallest ``|value - base|`` may go: all at the first time, then ``p = first * (1 - t / T)`` (Ansell et al. 2024,
    arXiv:2401.16405; as its released code). Candidates compete for as many places, by what ``grow`` says:

    ``gradient`` (SpIEL-AG): the k largest ``|g|`` of the first of ``batches`` batches without the entries that stay, by
    ``|sum of g|`` over all of these batches. An entry that may go and wins stays, with its value and moments; others that win
    come in, at the base, with moments as of ``batches`` gradients with these means; and of those that may go and do not win,
    as many as come in go, the least changed first.

    ``sm3`` (SpIEL-MA): all entries that did not train, by ``row * column`` of SM3's accumulators; moments start at zero.
    """

    every: int = 20
    first: float = 0.2
    batches: int = 5
    grow: str = "gradient"
    all_at_first: bool = True
    reset: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.first <= 1:
            raise ValueError(f"first is {self.first}, the share of entries that may be replaced; it lies in (0, 1]")
        if not 1 <= self.batches < self.every:
            raise ValueError(
                f"batches={self.batches} and every={self.every}: entries are replaced `batches` steps into each `every` steps, "
                "so that batches is at least 1 and less than every"
            )
        if self.grow not in ("gradient", "sm3"):
            raise ValueError(f"grow is {self.grow!r}; 'gradient' or 'sm3'")

    def due(self, step: int, steps: int) -> bool:
        # batches < every, so never at step 0: entries train for ``batches`` steps before they are compared.
        return step % self.every == self.batches

    def rate(self, step: int, steps: int) -> float:
        """The share of the selected entries that may be replaced before update ``step``."""
        if self.all_at_first and step == self.batches:
            return 1.0
        return self.first * (1 - step / steps)

    def renew(self, standing: Standing) -> Renewal:
        share = self.rate(standing.step, standing.steps)
        grown, seeds = self._growth(standing.calibration)
        change = standing.plan.change(standing.kept, standing.trained)
        chosen = {}
        for path, how in standing.plan.leaves.items():
            if not how.selects:
                continue
            kept, lead = standing.kept[path], standing.calibration.lead(path)
            mask = _replaced(how, kept, change[path], grown[path], share, lead)
            unit = standing.plan.granularity(path, kept["w"].shape)
            chosen[path] = unit.locate(mask, lead, standing.grids.get(path, (1, 1)))
        return Renewal(chosen, seeds=seeds, age=self.batches if seeds else 0)

    def _growth(self, calibration: Calibration) -> tuple[dict[str, tuple[Array, ...]], dict[str, tuple[Array, Array]]]:
        """What newcomers compete by, and what their moments start from."""
        if self.grow == "sm3":
            return {p: (x,) for p, x in scores.SM3(self.batches)(calibration).items()}, {}
        zeros = {p: jnp.zeros(calibration.params[p].shape, jnp.float32) for p in calibration.paths}
        # A copy of the zeros: the first carry is donated, and one buffer cannot be donated twice.
        total, squares = calibration.fold(_add_both, (zeros, jax.tree.map(jnp.copy, zeros)), self.batches)
        first = calibration.gradient(1)
        growth: dict[str, tuple[Array, ...]] = {p: (jnp.abs(total[p]), jnp.abs(first[p])) for p in total}
        return growth, {p: (total[p] / self.batches, squares[p] / self.batches) for p in total}


def _add_both(carry: tuple, gradient: Mapping[str, Array]) -> tuple:
    total, squares = carry
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    return add(total, dict(gradient)), add(squares, {p: g * g for p, g in gradient.items()})


def _replaced(how: Any, kept: Any, moved: Array, grown: tuple[Array, ...], share: float, lead: int) -> Array:
    """The new mask of one weight, with as many entries of each matrix as before.

    grown: what newcomers compete by, and, where entries that may go can win as well, what candidates are the largest of.
    """
    w = kept["w"]
    zeros = jnp.zeros(w.shape, jnp.float32)
    active = how.spread(kept, jnp.ones_like(moved), zeros) > 0
    # -inf: inactive entries never count among the most changed.
    size = jnp.where(active, how.spread(kept, jnp.abs(moved), zeros), -jnp.inf)
    count = lambda mask: jnp.sum(mask, axis=tuple(range(lead, w.ndim)), dtype=jnp.int32)
    # At most as many as the mask holds, or the rest would come from outside of it.
    best = lambda mask, score, k: threshold.top_each(
        jnp.where(mask, score, -jnp.inf), jnp.minimum(k, count(mask)), lead
    )
    free = jnp.asarray(share * count(active), jnp.int32)
    leaving = active & ~best(active, size, count(active) - free)
    if len(grown) > 1:
        valid = threshold.top_each(grown[1], count(active), lead) & (leaving | ~active)
    else:
        valid = ~active
    winners = best(valid, grown[0], free)
    # Those that leave make room for no more than come in; of them the most changed stay.
    losers, coming = leaving & ~winners, winners & ~active
    return (active & ~losers) | best(losers, size, count(losers) - count(coming)) | coming
