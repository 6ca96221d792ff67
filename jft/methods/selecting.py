"""From scores to a selection: pool them by unit, keep what the budget allows, and say where it lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from jft import tree
from jft.delta import ExpertLayout, SliceLayout
from jft.delta.changed import COLUMNS, ROWS
from jft.methods.plan import Plan
from jft.select import budget
from jft.select.calibration import Calibration
from jft.select.calibration import lead as leading


def choose(plan: Plan, calibration: Calibration, grids: Mapping[str, tuple[int, int]]) -> dict[str, jax.Array]:
    """``{path: at}`` for the paths that ``plan`` selects inside: the layout of ``at`` is told in :mod:`jft.delta.selected`.

    grids: into how many cells the last two axes of each weight are cut; one where it is not named. A score may give one
    number for each unit of a weight in place of one for each entry.
    """
    select = plan.method.select
    scores = select.score(calibration)
    units, masks, costs, leads, shapes = {}, {}, {}, {}, {}
    for path in plan.selects:
        shapes[path], leads[path] = tuple(calibration.params[path].shape), calibration.lead(path)
        units[path] = plan.granularity(path, shapes[path])
        of_units = scores[path].shape == units[path].units(shapes[path], leads[path])
        masks[path] = scores[path] if of_units else units[path].pool(scores[path], leads[path], select.pool)
        costs[path] = math.prod(shapes[path]) // tree.size(masks[path])
    del scores
    everything = {p: tuple(w.shape) for p, w in calibration.params.items()}
    spent = budget.resolved(select.budget, masks, everything, {p: calibration.lead(p) for p in everything})
    masks = budget.choose(masks, costs, leads, spent, select.largest, shapes)
    return {p: units[p].locate(m, leads[p], grids.get(p, (1, 1))) for p, m in masks.items()}


def expected(plan: Plan, shapes: Mapping[str, Any], grids: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Shapes of what :func:`choose` would give, without a score: as if every matrix and cell were given its even share.

    Exact for budgets per matrix on one device; what to compile a step for before there are weights, or a device. A score
    that chooses by itself may say how much that is about: ``share(path, units of a matrix)``.
    """
    chosen = {}
    every = {p: tuple(x.shape) for p, x in shapes.items()}
    outer = {p: leading(p, len(s), plan.structured) for p, s in every.items()}
    given = budget.resolved(plan.method.select.budget, plan.selects, every, outer)
    for path in plan.selects:
        shape = tuple(shapes[path].shape)
        lead = leading(path, len(shape), plan.structured)
        unit, grid = plan.granularity(path, shape), grids.get(path, (1, 1))
        mask = jax.ShapeDtypeStruct(unit.units(shape, lead), bool)
        layout = unit.layout
        lead = lead - 1 if isinstance(layout, ExpertLayout) else lead  # experts compete with each other
        matrix = math.prod(mask.shape[lead:])
        score = plan.method.select.score
        says = hasattr(score, "share")  # a score that chooses by itself
        share = score.share(path, matrix) if says else _share(given, matrix, shape, lead, path)
        rows = math.prod(shape[lead:]) // matrix // shape[-1] if layout == SliceLayout(ROWS) else 1
        columns = math.prod(shape[lead:]) // matrix // shape[-2] if layout == SliceLayout(COLUMNS) else 1
        cut = (grid[:1] if layout.axis == ROWS else grid[1:]) if isinstance(layout, SliceLayout) else grid
        # A head takes a slot for each of its rows or columns.
        slots = -(-share * rows * columns // math.prod(cut))
        chosen[path] = jax.eval_shape(lambda m, u=unit, n=lead, g=grid, c=slots: u.locate(m, n, g, c), mask)
    return chosen


def _share(given: Any, available: int, shape: tuple[int, ...], lead: int, path: str) -> int:
    """How many of the units of one matrix ``given`` selects, if others do not take more or less of it."""
    if isinstance(given, budget.Everything):
        return available
    given = given.of(path) if isinstance(given, budget.ByPattern) else given
    given = given.at(shape) if isinstance(given, budget.PerMatrix) else given
    if isinstance(given, budget.Beyond):
        raise ValueError(f"how much lies beyond {given.threshold:g} is for the scores to say")
    if given.density is None and not isinstance(given, budget.PerMatrix):
        raise ValueError(f"{given} is not a share of each matrix; give a density")
    return given.units(available, math.prod(shape[lead:]) // available, path)
