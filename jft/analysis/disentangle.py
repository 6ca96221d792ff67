"""The weight-disentanglement error of two task vectors: the change that each makes to the predictions of the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jft.analysis.interpolation import STANDARD, Forward, grid, readings, weighing
from jft.compiled import program_cache
from jft.delta import TaskVector
from jft.train.objectives import Objective

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
GRID = grid(-2, 2, 17)


@dataclasses.dataclass(frozen=True)
class Member:
    """A task: its model and base parameters, data, and both task vectors as its model takes them (a frozen head has none)."""

    model: Any
    params: Any
    batches: Iterable[Any]
    objective: Objective
    taus: Sequence[TaskVector]


@dataclasses.dataclass(frozen=True)
class Disentanglement:
    """grid: coefficients ``[G]``. each: the error on the data of either task, ``[2, G, G]``, axes alpha_1 and alpha_2."""

    grid: np.ndarray
    each: np.ndarray

    @property
    def xi(self) -> np.ndarray:
        """``xi(alpha_1, alpha_2)``, ``[G, G]``: the sum of both tasks' errors."""
        return self.each.sum(axis=0)

    def within(self, largest: float = 1.0) -> float:
        """The mean of xi over the coefficients in ``[0, largest]``, where arithmetic takes place."""
        in_range = (self.grid >= 0) & (self.grid <= largest)
        if not in_range.any():
            raise ValueError(f"no coefficient lies in [0, {largest}]; the grid is {self.grid.tolist()}")
        return float(self.xi[np.ix_(in_range, in_range)].mean())


def disagreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where two predictions differ, else 0: the paper's distance."""
    return (one != other).astype(np.float64)


def disentanglement(
    first: Member,
    second: Member,
    grid: Sequence[float] = GRID,
    forward: Forward = STANDARD,
    read: Callable[[Any], Any] | None = None,
    distance: Distance = disagreement,
) -> Disentanglement:
    """``xi(a1, a2) = sum_t E_{x of task t} dist(f(x; theta0 + a_t tau_t), f(x; theta0 + a1 tau_1 + a2 tau_2))``.

    Zero where the two task vectors do not change each other's predictions. read: from outputs to the values that are
    compared, an array with the axes of the objective's weights in front; None: the predicted class or token. distance: of
    two such arrays, ``[P, ...]`` and one that broadcasts with it, element by element; weights (valid examples, target
    tokens) average it. Evaluates ``G^2 + G`` points on each task's data.

    Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827, section 3. Raises ``ValueError`` for objectives whose examples
    have no prediction of their own (contrastive).
    """
    axis = np.asarray(grid, np.float64)
    grid_points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    each = [_error(member, t, grid_points, forward, read, distance) for t, member in enumerate((first, second))]
    return Disentanglement(axis, np.stack(each))


def _error(
    member: Member, t: int, grid_points: np.ndarray, forward: Forward, read: Callable | None, distance: Distance
) -> np.ndarray:
    """On the data of task ``t``, ``[G, G]``."""
    compare = _comparison(weighing(member.objective), read)
    G = len(grid_points)
    # One task vector alone has G points, not G^2: each is evaluated once.
    single_points = np.where(np.arange(2) == t, np.diagonal(grid_points).T, 0.0)  # [G, 2]
    points = np.concatenate([grid_points.reshape(G * G, 2), single_points])
    total, weight = np.zeros((G, G)), 0.0
    for reading in readings(member.model, member.params, member.taus, points, member.batches, compare, forward):
        values, weights = reading["value"], np.asarray(reading["weight"][0], np.float64)
        pairs = values[: G * G].reshape(G, G, *values.shape[1:])
        single_values = np.expand_dims(values[G * G :], 1 - t)  # [G, 1, ...] for the first, [1, G, ...] for the second
        distances = distance(pairs, single_values)
        # The axes after the grid's two are examples, and tokens where there are any.
        total += np.sum(distances * weights, axis=tuple(range(2, distances.ndim)))
        weight += weights.sum()
    if not weight:
        raise ValueError("the data have no batch, or none in which anything counts (loss mask, valid, labels)")
    return total / weight


@program_cache
def _comparison(objective: Any, read: Callable | None) -> Callable:
    def values(outputs: Any, batch: Any) -> dict[str, Any]:
        value = jnp.argmax(outputs, axis=-1) if read is None else read(outputs)
        return {"value": value, "weight": objective.weights(batch)}

    return values
