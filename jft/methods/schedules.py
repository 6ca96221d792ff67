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
    """

    chosen: Mapping[str, Array]
    method: Method | None = None
    seeds: Mapping[str, tuple[Array, Array]] = dataclasses.field(default_factory=dict)
    age: int = 0
    weights: Mapping[str, Array] = dataclasses.field(default_factory=dict)


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
    """Frozen dataclasses; reset: whether what is dropped goes back to the base instead of keeping its value."""

    reset: bool = False

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
            nothing = jnp.zeros(unit.units(shape, lead), bool)
            chosen[path] = unit.locate(nothing, lead, grids.get(path, (1, 1)))
        return chosen

    def due(self, step: int, steps: int) -> bool:
        return step == self.steps

    def renew(self, standing: Standing) -> Renewal:
        return Renewal(select.choose(standing.plan, standing.calibration, standing.grids))


@dataclasses.dataclass(frozen=True)
class DropAndGrow(Schedule):
    """Every ``every`` steps the entries of each matrix that changed least go back to the base, and others take their place.

    Of k entries ``rate(t) * k`` are replaced: all at the first time, then ``first * (1 - t / T)`` of them (Ansell et al.
    2024, arXiv:2401.16405; as its released code). Those with the smallest ``|value - base|`` are dropped. grow says who
    comes: ``gradient``, the largest accumulated ``|sum of g|`` over ``batches`` batches, among the k largest ``|g|`` of the
    first (SpIEL-AG), whose moments start at the mean of g and g^2; or ``sm3``, the largest ``row * column`` of SM3's
    accumulators (SpIEL-MA).
    """

    every: int = 20
    first: float = 0.2
    batches: int = 5
    grow: str = "gradient"
    all_at_first: bool = True
    reset: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.batches < 1 or not 0 < self.first <= 1:
            raise ValueError(f"drop-and-grow with every={self.every}, batches={self.batches}, first={self.first}")
        if self.grow not in ("gradient", "sm3"):
            raise ValueError(f"grow is {self.grow!r}; 'gradient' or 'sm3'")

    def due(self, step: int, steps: int) -> bool:
        return step > 0 and step % self.every == 0

    def rate(self, step: int, steps: int) -> float:
        """The share of the selected entries that is replaced before update ``step``."""
        if self.all_at_first and step == self.every:
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
            mask = _replaced(how, kept, change[path], grown[path], share, lead, self.grow == "gradient")
            unit = standing.plan.granularity(path, kept["w"].shape)
            chosen[path] = unit.locate(mask, lead, standing.grids.get(path, (1, 1)))
        return Renewal(chosen, seeds=seeds, age=self.batches if seeds else 0)

    def _growth(self, calibration: Calibration) -> tuple[dict[str, tuple[Array, ...]], dict[str, tuple[Array, Array]]]:
        """What newcomers compete by, and what their moments start from."""
        if self.grow == "sm3":
            return {p: (x,) for p, x in scores.SM3(self.batches)(calibration).items()}, {}
        zeros = {p: jnp.zeros(calibration.params[p].shape, jnp.float32) for p in calibration.paths}
        total, squares = calibration.fold(_add_both, (zeros, jax.tree.map(jnp.copy, zeros)), self.batches)
        first = calibration.gradient(1)
        growth: dict[str, tuple[Array, ...]] = {p: (jnp.abs(total[p]), jnp.abs(first[p])) for p in total}
        return growth, {p: (total[p] / self.batches, squares[p] / self.batches) for p in total}


def _add_both(carry: tuple, gradient: Mapping[str, Array]) -> tuple:
    total, squares = carry
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    return add(total, dict(gradient)), add(squares, {p: g * g for p, g in gradient.items()})


def _replaced(
    how: Any, kept: Any, moved: Array, grown: tuple[Array, ...], share: float, lead: int, candidates: bool
) -> Array:
    """The new mask of one weight: what moved most stays, what would gain most comes; as many as before in each matrix."""
    w = kept["w"]
    zeros = jnp.zeros(w.shape, jnp.float32)
    active = how.spread(kept, jnp.ones_like(moved), zeros) > 0
    count = jnp.sum(active, axis=tuple(range(lead, w.ndim)), dtype=jnp.int32)
    drop = jnp.asarray(share * count, jnp.int32)
    size = jnp.where(active, how.spread(kept, jnp.abs(moved), zeros), -jnp.inf)
    stay = threshold.top_each(size, count - drop, lead)
    score = grown[0]
    if candidates:
        # Among as many as are active, by the first gradient alone.
        score = jnp.where(threshold.top_each(grown[1], count, lead), score, -1.0)
    come = threshold.top_each(jnp.where(active, -jnp.inf, score), drop, lead)
    return stay | come
