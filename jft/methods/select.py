"""`Select`: which weights a method acts on, and which parts inside them, from scores to where they lie."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from jft import tree
from jft.delta import ExpertLayout, SliceLayout
from jft.delta.changed import COLUMNS, ROWS
from jft.select import budget, layers
from jft.select.granularity import Entry, Granularity, How

# plan.py imports this module.
if TYPE_CHECKING:
    from jft.methods.plan import Plan
    from jft.select.calibration import Calibration


@dataclasses.dataclass(frozen=True)
class Select:
    """Which weights a method acts on, and which parts inside them.

    include, exclude: regular expressions on paths (``re.search``). linear_only: matrices inside layers, no embeddings,
    heads, norms or routers. within: patterns of which one has to match as well; it narrows what the others select. A pattern
    that matches nothing is refused.

    layers: which whole layers train: indices (negative from the end), a table ``{path: indices, or None for all of it}``, or a
    choice of :mod:`jft.select.layers` or a search of its kind; None for all. Indices are of layers, so nothing outside them is
    selected.

    score: how much each weight matters, computed once the base and the data are there (:mod:`jft.select.scores`); None
    selects by ``layers`` alone. granularity: what is selected as one, from an entry, a block, a row or a head to an expert, a
    matrix and a layer (:mod:`jft.select.granularity`), or pairs ``(pattern, granularity)``, of which the first whose pattern is
    found in a path decides and a path without one is left out. pool: how the scores inside a unit become its own. budget: how
    much is selected, and over what it competes (:mod:`jft.select.budget`). largest: the highest scores, or the lowest.
    """

    include: tuple[str, ...] = ("",)
    exclude: tuple[str, ...] = ()
    linear_only: bool = False
    layers: Any = None
    score: Any = None
    granularity: Any = Entry()
    pool: How = "sum"
    budget: Any = None
    largest: bool = True
    within: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        """Refuse what is said twice or not at all."""
        if self.layers is not None:
            # The usual way to normalise a field of a frozen dataclass in __post_init__.
            object.__setattr__(self, "layers", layers.choice(self.layers))
        if self.score is not None and self.layers is not None:
            raise ValueError(
                "layers and score both say what trains; give one of them (granularity=Layer() scores layers)"
            )
        if self.score is not None and self.budget is None:
            raise ValueError("a selection by score needs a budget: how much of it is selected (select.budget)")
        # Whole weights become runs of layers, parts become layouts; one selection cannot be both.
        if len({one.whole for one in self._granularities}) > 1:
            raise ValueError(
                f"{self.granularity} mixes whole weights and parts inside them; select them in runs of their own"
            )

    @property
    def _granularities(self) -> list[Granularity]:
        return [self.granularity] if isinstance(self.granularity, Granularity) else [g for _, g in self.granularity]

    @property
    def patterns(self) -> tuple[str, ...]:
        """Those that a user looks for where nothing is selected: of ``within``, or where that is open of ``include``."""
        return self.include if self.within == ("",) else self.within

    @property
    def inside(self) -> bool:
        """Whether parts inside weights are selected, by score."""
        return self.score is not None and not self._granularities[0].whole

    @property
    def choice(self) -> Any:
        """Which whole layers and matrices train: :attr:`layers`, or what the score says of them; None for all."""
        if self.score is None or self.inside:
            return self.layers
        if not isinstance(self.granularity, Granularity):
            raise ValueError(
                f"{self.granularity}: whole weights are selected at one granularity; use include for patterns"
            )
        return layers.Scored(self.score, self.granularity, self.budget, self.pool, self.largest)

    def paths(self, shapes: Mapping[str, Any], linear: tuple[str, ...]) -> list[str]:
        """The selected paths among ``shapes``; ``linear`` are those that count as matrices inside layers."""
        candidates = list(linear) if self.linear_only else list(shapes)
        if not candidates:
            raise ValueError("this method trains matrices inside layers, and the model has none; train it in place")
        # Only these are refused where they match nothing: presets exclude heads, which a model may lack.
        chosen = tree.matching(tree.matching(candidates, self.include), self.within)
        excluded = tree.matcher(self.exclude)
        return [p for p in chosen if not (self.exclude and excluded(p))]

    def granularity_of(self, path: str, shape: Sequence[int]) -> Granularity | None:
        """The unit of one weight, its extents fitted to the weight where it leaves them open; None for a weight left out."""
        if isinstance(self.granularity, Granularity):
            return self.granularity.fitted(tuple(shape))
        granularities = (unit.fitted(tuple(shape)) for pattern, unit in self.granularity if re.search(pattern, path))
        return next(granularities, None)


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
    # Scores are as large as the model in float32; only what is pooled is used from here on.
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
    outer = {p: tree.lead(p, len(s), plan.structured) for p, s in every.items()}
    limit = budget.resolved(plan.method.select.budget, plan.selects, every, outer)
    for path in plan.selects:
        shape = tuple(shapes[path].shape)
        lead = tree.lead(path, len(shape), plan.structured)
        unit, grid = plan.granularity(path, shape), grids.get(path, (1, 1))
        mask = jax.ShapeDtypeStruct(unit.units(shape, lead), bool)
        layout = unit.layout
        lead = lead - 1 if isinstance(layout, ExpertLayout) else lead  # experts compete with each other
        matrix = math.prod(mask.shape[lead:])
        score = plan.method.select.score
        has_share = hasattr(score, "share")  # a score that chooses by itself
        share = score.share(path, matrix) if has_share else _share(limit, matrix, shape, lead, path)
        rows = math.prod(shape[lead:]) // matrix // shape[-1] if layout == SliceLayout(ROWS) else 1
        columns = math.prod(shape[lead:]) // matrix // shape[-2] if layout == SliceLayout(COLUMNS) else 1
        cut = (grid[:1] if layout.axis == ROWS else grid[1:]) if isinstance(layout, SliceLayout) else grid
        # A head takes a slot for each of its rows or columns.
        slots = -(-share * rows * columns // math.prod(cut))
        chosen[path] = jax.eval_shape(lambda m, u=unit, n=lead, g=grid, c=slots: u.locate(m, n, g, c), mask)
    return chosen


def density(plan: Plan, shapes: Mapping[str, Any]) -> tuple[float, float] | None:
    """The density of the method's budget, and that of the whole units which are selected: at least one of each group.

    None where no density says how much is selected, or units cost differently and a density is the most they take.
    """
    limit = plan.method.select.budget
    if not plan.selects or not isinstance(limit, budget.Budget) or limit.density is None or hasattr(limit, "masks"):
        return None
    every = {p: tuple(x.shape) for p, x in shapes.items()}
    leads = {p: tree.lead(p, len(s), plan.structured) for p, s in every.items()}
    spent = budget.resolved(limit, plan.selects, every, leads)
    units = {p: plan.granularity(p, every[p]).units(every[p], leads[p]) for p in plan.selects}
    selected = total = 0
    for paths, lead in spent.groups({p: min(leads[p], len(units[p])) for p in plan.selects}):
        available = sum(math.prod(units[p][lead:]) for p in paths)
        costs = {math.prod(every[p]) // math.prod(units[p]) for p in paths}
        if len(costs) > 1:
            return None
        cost = costs.pop()
        groups = math.prod(units[paths[0]][:lead])
        selected += groups * cost * spent.units(available, cost, paths[0])
        total += groups * cost * available
    # In the terms of the method's own density, which may be of the whole model.
    return float(limit.density), float(limit.density) * selected / (float(spent.density) * total)


def _share(limit: Any, available: int, shape: tuple[int, ...], lead: int, path: str) -> int:
    """How many of the units of one matrix ``limit`` selects, if others do not take more or less of it."""
    if isinstance(limit, budget.Everything):
        return available
    limit = limit.of(path) if isinstance(limit, budget.ByPattern) else limit
    limit = limit.at(shape) if isinstance(limit, budget.PerMatrix) else limit
    if hasattr(limit, "share"):  # a budget that chooses by itself
        return limit.share(shape)
    if isinstance(limit, budget.Beyond):
        raise ValueError(f"how much lies beyond {limit.threshold:g} is for the scores to say")
    if limit.density is None and not isinstance(limit, budget.PerMatrix):
        raise ValueError(f"{limit} is not a share of each matrix; give a density")
    return limit.units(available, math.prod(shape[lead:]) // available, path)
