"""Budgets: amounts to select, and the groups of units that compete for them.

A budget is a density (a fraction of the parameters), a count (of units), or a number of parameters, of everything together
(`Globally`), or again for each layer, each path, or each matrix. :func:`choose` turns scores of units into masks that meet it
exactly; `Flops` is spent by :func:`plan_flops`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.select.flops import plan_flops
from jft.select.threshold import top_together
from jft.tree import host

Array = jax.Array
Round = Literal["nearest", "floor", "ceil", "floor+1"]
Whole = Literal["candidates", "matrices", "model"]

_ROUND = {
    # Half up: Python's `round` takes halves to the even number.
    "nearest": lambda x: math.floor(x + Fraction(1, 2)),
    "floor": math.floor,
    "ceil": math.ceil,
    "floor+1": lambda x: math.floor(x) + 1,
}
_GREEDY = 1 << 24  # units that the host goes through one by one


@dataclasses.dataclass(frozen=True)
class Budget:
    """The amount selected of a group of units that compete with each other; exactly one of the first three is set.

    density: the fraction of their parameters, in (0, 1], read as the decimal it is written as; ``of`` ``matrices`` or
    ``model`` it is the fraction of all of the model's matrices, or parameters, which :func:`resolved` spreads evenly over the
    candidates. count: how many units. parameters: how many parameters at most. round: how a density of units, or parameters
    over the cost of one unit, becomes a whole number; it is at least one, and at most all.

    Where units cost differently, those of the best score are taken one after the other while they fit a density of (or the
    number of) parameters; ``unfit`` is what happens at the first that does not: ``stop`` there, or ``skip`` it and go on.

    Raises ``ValueError`` for other values.
    """

    density: float | Fraction | None = None
    count: int | None = None
    parameters: int | None = None
    round: Round = "floor"
    of: Whole = "candidates"
    unfit: Literal["stop", "skip"] = "stop"
    amounts: ClassVar[tuple[str, ...]] = ("density", "count", "parameters")

    def __post_init__(self) -> None:
        """Refuse what is no budget."""
        names = [name for name in self.amounts if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(
                f"{type(self).__name__} takes exactly one of {', '.join(self.amounts)}; "
                f"given: {', '.join(names) or 'none'}"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} is not in (0, 1]")
        for name in names:
            value = getattr(self, name)
            # A bool is an int in Python.
            if name != "density" and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{name} {value!r} is not a positive integer")
        if self.of not in ("candidates", "matrices", "model"):
            raise ValueError(f"of {self.of!r} is unknown; a density is of the candidates, the matrices or the model")
        if self.of != "candidates" and self.density is None:
            raise ValueError(f"of={self.of!r} says what a density is a fraction of; given: {names[0]}")
        if self.round not in _ROUND:
            raise ValueError(f"round {self.round!r} is unknown; choose one of {', '.join(_ROUND)}")
        if self.unfit not in ("stop", "skip"):
            raise ValueError(f"unfit {self.unfit!r} is unknown; choose stop or skip")

    def groups(self, leads: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
        """Paths whose units compete, and for how many of their leading axes each index is a group by itself."""
        yield list(leads), 0

    def units(self, available: int, cost: int, what: str) -> int:
        """How many of ``available`` units of ``cost`` parameters each are selected; ``what`` they are, for errors."""
        if self.count is not None:
            return _at_most(self.count, available, "units", what)
        if self.density is not None:
            amount = _decimal(self.density) * available
        else:
            amount = Fraction(self._parameters(available * cost, cost, what), cost)
        # At least one: a density that rounds to none would train nothing, silently.
        return min(max(_ROUND[self.round](amount), 1), available)

    def total(self, available: int, cheapest: int, what: str) -> int:
        """How many of ``available`` parameters may be selected, for units of different costs."""
        if self.density is None:
            return self._parameters(available, cheapest, what)
        amount = max(_ROUND[self.round](_decimal(self.density) * available), 1)
        return _at_least(min(amount, available), cheapest, what)

    def _parameters(self, available: int, cheapest: int, what: str) -> int:
        assert self.parameters is not None
        return _at_least(_at_most(self.parameters, available, "parameters", what), cheapest, what)


def _decimal(x: float | Fraction) -> Fraction:
    """What ``x`` was written as: 0.29 of 100 is 29, and not the 28 that binary rounding makes of it."""
    # `repr` is the shortest decimal that reads back as x.
    return x if isinstance(x, Fraction) else Fraction(repr(float(x)))


def _at_most(amount: int, available: int, kind: str, what: str) -> int:
    if amount > available:
        raise ValueError(f"the budget is {amount} {kind} of {what}, which has {available}")
    return amount


def _at_least(amount: int, cheapest: int, what: str) -> int:
    if amount < cheapest:
        raise ValueError(f"the budget is {amount} parameters of {what}, whose smallest unit has {cheapest}")
    return amount


@dataclasses.dataclass(frozen=True)
class Globally(Budget):
    """One budget for all units of all weights together."""


@dataclasses.dataclass(frozen=True)
class PerLeaf(Budget):
    """The budget again for each path, all of its layers together."""

    def groups(self, leads: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
        for path in leads:
            yield [path], 0


@dataclasses.dataclass(frozen=True)
class PerLayer(Budget):
    """The budget again for each layer, all selected weights of it together.

    Layers are the indices of the first axis of all weights under one ``layers/``, or the numbers in paths as
    ``blocks/3/mlp/w``; a weight of no layer is a group by itself.
    """

    def groups(self, leads: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
        groups: dict[tuple[str, int], list[str]] = {}
        for path, lead in leads.items():
            layer, stack = tree.layer_of(path), tree.stack_of(path)
            if layer is not None:
                # Layers that are numbered are not stacked: no axis counts them.
                key = layer[0], 0
            # Scores of whole stacks have no leading axis to go by.
            elif stack is not None and lead:
                key = stack, 1
            else:
                key = path, 0
            groups.setdefault(key, []).append(path)
        for (_, lead), paths in groups.items():
            yield paths, lead


@dataclasses.dataclass(frozen=True)
class PerMatrix(Budget):
    """The budget again for each matrix: each path, and each index of its leading axes.

    rank: as many parameters as factors of that rank would have, ``rank * (I + O)``, in place of the other three.
    """

    rank: int | None = None
    amounts: ClassVar[tuple[str, ...]] = ("density", "count", "parameters", "rank")

    def groups(self, leads: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
        for path, lead in leads.items():
            yield [path], lead

    def at(self, shape: Sequence[int]) -> PerMatrix:
        """The budget in parameters, for matrices of the last two axes of ``shape``."""
        if self.rank is None:
            return self
        if len(shape) < 2:
            raise ValueError(f"a weight of shape {tuple(shape)} has no rank; give its budget as a density or a count")
        # Exactly one amount may be given, so the rank goes.
        return dataclasses.replace(self, rank=None, parameters=self.rank * (shape[-2] + shape[-1]))


@dataclasses.dataclass(frozen=True)
class Everything:
    """All units of all weights."""


@dataclasses.dataclass(frozen=True)
class Beyond:
    """All units whose score is beyond ``threshold``: above it, or below where the lowest are selected. As many as that is."""

    threshold: float

    def masks(self, scores: Mapping[str, Array], largest: bool, leads: Mapping[str, int]) -> dict[str, Array]:
        """Their masks. Raises ``ValueError`` where there is none."""
        masks = {p: x > self.threshold if largest else x < self.threshold for p, x in scores.items()}
        # One transfer for all weights.
        if not any(map(bool, jax.device_get([jnp.any(m) for m in masks.values()]))):
            side = "above" if largest else "below"
            raise ValueError(
                f"no score of {_list_paths(dict(scores))} is {side} {self.threshold:g}; nothing would train"
            )
        return masks


@dataclasses.dataclass(frozen=True)
class ByPattern:
    """Separate budgets for weights of different names: pairs ``(pattern, budget)``, of which the first that fits counts.

    The weights of each pair compete only among themselves, whatever the budget of another pair is.
    """

    parts: tuple[tuple[str, Any], ...]

    def part(self, path: str) -> int:
        """The index of the pair that a weight belongs to. Raises ``ValueError`` where no pattern is found in its path."""
        for index, (pattern, _) in enumerate(self.parts):
            # The first that fits, so that a last pattern of "" can take the rest.
            if re.search(pattern, path):
                return index
        raise ValueError(f"no budget for {path}: its path matches none of {', '.join(p for p, _ in self.parts)}")

    def of(self, path: str) -> Any:
        """The budget of a weight."""
        return self.parts[self.part(path)][1]

    def pools(self, paths: Iterable[str]) -> list[tuple[Any, list[str]]]:
        """``(budget, paths)`` of each pair: those of ``paths`` that belong to it."""
        own: list[tuple[Any, list[str]]] = [(budget, []) for _, budget in self.parts]
        for path in paths:
            own[self.part(path)][1].append(path)
        return own


@dataclasses.dataclass(frozen=True)
class Flops:
    """A fraction of the cost of the full backward pass, in (0, 1]: spent by :func:`plan_flops`."""

    fraction: float
    resolution: int = 1000

    def __post_init__(self) -> None:
        """Refuse what is no fraction."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction {self.fraction} is not in (0, 1]")

    def plan(
        self, importance: Sequence[float], weight_flops: Sequence[int], activation_flops: Sequence[int]
    ) -> list[int]:
        """The tensors that :func:`plan_flops` chooses for this fraction of training all of them."""
        # Beyond the last tensor no gradient is passed.
        full = sum(map(int, weight_flops)) + sum(map(int, activation_flops[:-1]))
        budget = math.floor(_decimal(self.fraction) * full)
        return plan_flops(importance, weight_flops, activation_flops, budget, self.resolution)


def resolved(
    budget: Any, candidates: Iterable[str], shapes: Mapping[str, Sequence[int]], leads: Mapping[str, int]
) -> Any:
    """``budget`` with densities of the model's matrices or of all of it as densities of the ``candidates``.

    shapes, leads: of all weights. The same fraction of each candidate is meant, so that they have ``density * total``, a
    whole number, together. Raises ``ValueError`` where that is more than they hold.
    """
    if isinstance(budget, ByPattern):
        # Each against all of the model's weights: a pair is a fraction of the model too.
        each = [resolved(one, paths, shapes, leads) for one, paths in budget.pools(candidates)]
        return ByPattern(tuple((pattern, one) for (pattern, _), one in zip(budget.parts, each, strict=True)))
    if not isinstance(budget, Budget) or budget.of == "candidates" or budget.density is None:
        return budget
    paths = list(candidates)
    size = lambda group: sum(math.prod(shapes[p]) for p in group)
    # All of the model's matrices, also those that are no candidates.
    denominator = [p for p, s in shapes.items() if budget.of == "model" or len(s) - leads[p] == 2]
    count = max(_ROUND[budget.round](_decimal(budget.density) * size(denominator)), 1)
    if paths and count > size(paths):
        raise ValueError(
            f"density {budget.density} of all {size(denominator)} parameters of the {budget.of} is {count}, and "
            f"{_list_paths(dict.fromkeys(paths))} can give {size(paths)}; lower it"
        )
    # An exact fraction: a float might come out one below. The one of "floor+1" is in it already.
    again: Round = "floor" if budget.round == "floor+1" else budget.round
    density = Fraction(count, size(paths)) if paths else 1
    return dataclasses.replace(budget, of="candidates", density=density, round=again)


def choose(
    scores: Mapping[str, Array],
    costs: Mapping[str, int],
    leads: Mapping[str, int],
    budget: Budget | Everything | Beyond | ByPattern,
    largest: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Array]:
    """Masks of the units with the best scores within ``budget``, like the ``scores`` of each path and sharded like them.

    costs: parameters of one unit of each path. leads: how many leading axes of its scores are batch (layers, experts).
    shapes: those of the weights, which `PerMatrix(rank=)` needs for units that are not entries.

    Where all units of a group cost the same, or the budget is a count, the masks are those of
    :func:`jft.select.threshold.top`: exact, ties to earlier paths and positions, nothing gathered. Otherwise scores come to
    the host and are taken greedily, ties in the same order.

    Raises ``ValueError`` where a score is NaN, or the budget is more than there is or less than one unit.
    """
    if isinstance(budget, Flops):
        raise ValueError("Flops chooses whole tensors by their cost in the backward pass: use Flops(...).plan")
    if isinstance(budget, Everything):
        return {p: jnp.ones_like(x, bool) for p, x in scores.items()}
    if hasattr(budget, "masks"):  # a budget that chooses by itself
        return budget.masks(scores, largest, leads)
    if isinstance(budget, ByPattern):
        masks_by_path: dict[str, Array] = {}
        for one, paths in budget.pools(scores):
            masks_by_path |= choose({p: scores[p] for p in paths}, costs, leads, one, largest, shapes)
        # In the order of the scores, which the pairs need not keep.
        return {p: masks_by_path[p] for p in scores}
    if not scores:
        return {}
    if budget.of != "candidates":
        raise ValueError(f"{budget} needs all of the model's weights: take what `resolved` makes of it")
    # Scores of whole layers or weights have fewer axes than leading ones.
    leads = {p: min(leads[p], x.ndim) for p, x in scores.items()}
    masks: dict[str, Array] = {}
    for paths, lead in budget.groups(leads):
        group = {p: scores[p] for p in paths}
        limit = budget
        if isinstance(budget, PerMatrix) and budget.rank is not None:
            limit = budget.at(_matrix_shape(paths[0], group, costs, shapes))
        masks |= _choose(group, {p: int(costs[p]) for p in paths}, lead, limit, largest)
    return {p: masks[p] for p in scores}


def _matrix_shape(
    path: str, scores: Mapping[str, Array], costs: Mapping[str, int], shapes: Mapping[str, Sequence[int]] | None
) -> Sequence[int]:
    if shapes is not None and path in shapes:
        return shapes[path]
    # Entries cost 1, and then scores are shaped like the weight.
    if costs[path] != 1:
        raise ValueError(f"a budget by rank needs the shape of {path}; give choose(shapes=)")
    return scores[path].shape


def _choose(
    scores: dict[str, Array], costs: dict[str, int], lead: int, budget: Budget, largest: bool
) -> dict[str, Array]:
    """The masks of one group (for each index of the ``lead`` first axes)."""
    units = {p: tree.size(x) // max(1, math.prod(x.shape[:lead])) for p, x in scores.items()}
    what = f"each index of {_list_paths(scores)}" if lead else _list_paths(scores)
    # By counting on the devices wherever costs do not matter.
    if budget.count is not None or len(set(costs.values())) == 1:
        k = budget.units(sum(units.values()), next(iter(costs.values())), what)
        return top_together(scores, k, lead, largest)
    allowed = budget.total(sum(units[p] * costs[p] for p in scores), min(costs.values()), what)
    if sum(map(tree.size, scores.values())) > _GREEDY:
        raise ValueError(f"{what}: too many units of different costs to go through; give a count, or one cost")
    # Exact: float32 holds every bfloat16 and float16.
    arrays = {p: host(x).astype(np.float32) for p, x in scores.items()}
    for path, x in arrays.items():
        if np.isnan(x).any():
            raise ValueError(f"{np.isnan(x).sum()} scores of {path} are NaN; a score must be a number or an infinity")
    masks = {p: np.zeros(x.shape, bool) for p, x in arrays.items()}
    # Of no leading axes there is one index, the empty one.
    for index in np.ndindex(next(iter(arrays.values())).shape[:lead]):
        parts = {p: x[index].reshape(-1) for p, x in arrays.items()}
        group_masks = _greedy(parts, costs, allowed, largest, budget.unfit)
        for path, mask in group_masks.items():
            masks[path][index] = mask.reshape(masks[path][index].shape)
    return {p: jax.device_put(masks[p], x.sharding) for p, x in scores.items()}


def _list_paths(scores: Mapping[str, Any]) -> str:
    paths = list(scores)
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} others" if len(paths) > 3 else "")


def _greedy(
    scores: Mapping[str, np.ndarray], costs: Mapping[str, int], allowed: int, largest: bool, unfit: str
) -> dict[str, np.ndarray]:
    """Units in the order of their scores, while their costs add up to no more than what is allowed."""
    flat = np.concatenate(list(scores.values()))
    cost = np.repeat([costs[p] for p in scores], [x.size for x in scores.values()])
    # Stable: ties to earlier paths and positions, as `top` has them.
    order = np.argsort(-flat if largest else flat, kind="stable")
    mask = np.zeros(flat.size, bool)
    if unfit == "stop":
        # Costs are positive, so the sum stays above what is allowed once it is.
        mask[order] = np.cumsum(cost[order]) <= allowed
    else:
        cheapest = cost.min()
        for unit in order:
            if cost[unit] <= allowed:
                mask[unit] = True
                allowed -= cost[unit]
            # Nothing more can fit: most of a long list is never looked at.
            elif allowed < cheapest:
                break
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    return dict(zip(scores, np.split(mask, ends), strict=True))
