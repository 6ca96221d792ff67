"""Outputs of a model at points of the space that task vectors span, in its ordinary or its linearized forward pass.

A point is a row ``alpha`` of coefficients. The ordinary model has there the weights ``theta0 + sum_t alpha_t tau_t``;
linearized at its base its outputs are ``f(theta0) + sum_t alpha_t J tau_t``: all points of a grid for one pass of each task
vector.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jft import delta, parallel, tangent
from jft.compiled import program_cache
from jft.delta import TaskVector
from jft.train import evaluation, feed
from jft.train.objectives import Objective
from jft.train.state import find_mesh
from jft.train.step import apply_of

Read = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Forward:
    """name: ``standard``, or ``linearized`` at the base. until: the site up to which it is (None: all of the model).

    A nonlinear task vector in the linearized pass is post-hoc linearization (Ortiz-Jimenez, Favero and Frossard 2023,
    arXiv:2305.12827). Raises ``ValueError`` for another name.
    """

    name: str = "standard"
    until: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ("standard", "linearized"):
            raise ValueError(f"forward {self.name!r} is unknown; choose standard or linearized")
        if self.until is not None and self.name == "standard":
            raise ValueError(f"until={self.until!r} is of linearized forward passes; give forward='linearized'")

    @classmethod
    def of(cls, tau: TaskVector) -> Forward:
        """The one that ``tau`` was trained with, by its manifest."""
        method = tau.manifest.get("method")
        # The name of a method alone says nothing of its forward pass.
        method = method if isinstance(method, Mapping) else {}
        return cls(method.get("forward") or "standard", method.get("until"))


STANDARD = Forward()


def grid(lowest: float, largest: float, points: int) -> tuple[float, ...]:
    """Coefficients at equal distances, both ends among them; rounded to six digits, as reports show them."""
    return tuple(round(float(c), 6) for c in np.linspace(lowest, largest, points))


def readings(
    model: Any,
    params: Any,
    taus: Sequence[TaskVector],
    coefficients: Any,
    batches: Iterable[Any],
    read: Read,
    forward: Forward = STANDARD,
    check: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
    """For each batch, ``read(outputs, batch)`` at every point: numpy arrays ``[P, ...]``.

    model: a jft model, or any ``apply(params, batch)``. params: the base. coefficients: ``[P, T]``, or ``[P]`` for the sum of
    all task vectors. read is traced by JAX. The ordinary model goes through the batches ``P`` times, with one set of changed
    weights in memory; the linearized one once, as in :func:`jft.tangent.sweep`. check: a function of each batch on the
    host, which may refuse it.
    """
    mesh = find_mesh(params)
    grid, apply = np.asarray(coefficients, np.float64), apply_of(model, mesh)
    # Every point goes through the batches, and an iterator would be empty after the first.
    batches_again = list(batches) if isinstance(batches, Iterator) else batches

    def device_batches() -> Iterator[Any]:
        for batch in map(feed.host, batches_again):
            feed.check_ids(batch, model)
            if check is not None:
                check(batch)
            yield parallel.put_batch(batch, mesh)

    if forward.name == "linearized":
        yield from tangent.readings(tangent.linearize(apply, params, forward.until), taus, device_batches(), read, grid)
        return
    results = []
    # Points outside and batches inside: one set of changed weights exists at a time.
    for alpha in grid.reshape(len(grid), -1):
        changed = params_at(params, taus, alpha if grid.ndim == 2 else np.repeat(alpha, len(taus)))
        results.append([jax.device_get(_reader(apply, read)(changed, batch)) for batch in device_batches()])
    for at_points in zip(*results, strict=True):
        yield jax.tree.map(lambda *x: np.stack(x), *at_points)


def params_at(params: Any, taus: Sequence[TaskVector], alpha: Iterable[float]) -> Any:
    """``theta0 + sum_t alpha_t tau_t``, laid out as ``params``; these themselves where all coefficients are zero.

    One program for all points that the same number of task vectors moves to. Raises ``ValueError`` for a coefficient that is
    not finite.
    """
    nonzero = [(tau, float(a)) for tau, a in zip(taus, alpha, strict=True) if a]
    if not nonzero:
        return params
    # An argument of the program, which all coefficients then share.
    numbers = np.asarray([a for _, a in nonzero], np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError(f"task vectors are multiplied by finite numbers, not by {[a for _, a in nonzero]}")
    leaves, structure = jax.tree.flatten(params)
    # An uncommitted leaf, a head of a base that is on a mesh, goes where the rest is.
    shardings = tuple(x.sharding if getattr(x, "committed", False) else None for x in leaves)
    move = _mover(shardings, structure)
    # Without manifests, which are static: those of other tasks would be other programs.
    return move(params, [TaskVector(tau.deltas) for tau, _ in nonzero], numbers)


@program_cache
def _mover(shardings: tuple[Any, ...], structure: Any) -> Callable:
    def move(params: Any, taus: Sequence[TaskVector], alpha: jax.Array) -> Any:
        return delta.apply(params, TaskVector.combine(taus, list(alpha)), check=False)

    return jax.jit(move, out_shardings=jax.tree.unflatten(structure, shardings))


@program_cache
def _reader(apply: Callable, read: Read) -> Callable:
    return jax.jit(lambda params, batch: read(apply(params, batch), batch))


def scores(
    model: Any,
    params: Any,
    taus: Sequence[TaskVector],
    coefficients: Any,
    batches: Iterable[Any],
    objective: Objective,
    forward: Forward = STANDARD,
) -> list[Mapping[str, float]]:
    """The metrics of :func:`jft.train.evaluate` at every point: ``[{"loss", "accuracy", ...}]``."""
    totals: dict[str, np.ndarray] = {}
    # On the host objectives refuse what the loss would take without a word.
    check = functools.partial(objective.weight, xp=np)
    for sums in readings(model, params, taus, coefficients, batches, summed(objective), forward, check):
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    return [
        evaluation.told({name: evaluation.total(0.0, x[p]) for name, x in totals.items()}, objective)
        for p in range(len(coefficients))
    ]


def weighing(objective: Objective) -> Any:
    """``objective``, as one whose ``weights(batch)`` say how much each prediction counts. Raises ``ValueError`` else."""
    if not hasattr(objective, "weights"):
        raise ValueError(f"{type(objective).__name__} gives no prediction of each example to compare")
    return objective


@program_cache
def summed(objective: Objective) -> Read:
    """Sums of loss, metrics and weight; one function for equal objectives, so that they share programs."""
    return functools.partial(evaluation.batch_sums, objective)
