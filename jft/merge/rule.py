"""A merging rule: what it does to one tensor of several models, and what it has to know of the others first."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta import TaskVector

Array = jax.Array
Vectors = Sequence[TaskVector] | Mapping[str, TaskVector]


class Tensor(NamedTuple):
    """What a rule sees of one tensor: a matrix, a vector, one layer or one expert of a stack.

    deltas: ``[N, ...]`` float32, the change of each of the N models. base: ``[...]`` float32, or None where the rule does not
    read it. parameters: name -> ``[N]`` float32, a number that all models share standing N times. ranks: ``[N, R]`` uint32, or
    None, as :attr:`Rule.ranks` gives them. thresholds: ``[N, R]`` float32, the magnitude of the ``ranks``-th largest entry of
    each delta, infinity for rank 0; None where nobody has computed them. passes: what each of :attr:`Rule.passes` found in the
    whole model; to a pass, those before. scores: ``[N, ...]``, the very numbers whose ranks the last pass with a function
    and ranks found; None to passes that rank. statistics: what was measured of each model on its data, a pytree of float32
    arrays ``[N, ...]``; None where nothing was measured of this tensor.
    key: a random key that depends on the seed and the name of the tensor alone. layer, layers: its position in its
    stack and the length of that, int32; 0 and 0 outside stacks. ends: ``[N, R]`` uint32, the flat position from which on
    entries equal to a threshold are not among the ranks; None where that has to be counted.
    """

    deltas: Array
    base: Array | None
    parameters: dict[str, Array]
    ranks: Array | None
    thresholds: Array | None
    passes: tuple[Any, ...]
    key: Array
    layer: Array
    layers: Array
    ends: Array | None = None
    statistics: Any = None
    scores: Array | None = None

    def weighted(self, name: str = "weight") -> Array:
        """The parameter ``[N]`` with axes of size one, to be multiplied with ``deltas``."""
        if name not in self.parameters:
            raise ValueError(
                f"entries of the whole model are ranked by what depends on {name!r}, which is traced here, without a value; "
                "give numbers, or rank each tensor by itself, with scope='tensor' where the rule has it"
            )
        return self.parameters[name].reshape(-1, *(1,) * (self.deltas.ndim - 1))


def over_models(x: Array) -> Array:
    """The sum of ``[N, ...]`` over the models, as N - 1 additions: on CPUs XLA takes 30 times longer for ``jnp.sum(x, 0)``."""
    return functools.reduce(jnp.add, [x[i] for i in range(len(x))])


@dataclasses.dataclass(frozen=True)
class Pass:
    """One look at all tensors before they are merged, for what a rule has to know of the whole model.

    of: ``of(tensor, **options)``, traced. Without ``ranks`` a pytree of arrays, whose ``reduce`` over all tensors is found:
    their sum (on disk in float64) or their maximum. ranks: ``ranks(entries, parameters) -> [N, R]`` integers, as those of a
    rule, of the ``entries`` of the whole model: of what ``of`` gives, ``[N, ...]`` of the shape of the deltas, the values
    ``[N, R]`` of these ranks are found, counted from the largest; infinity for rank 0. of None: the magnitudes of the deltas.
    A score that is computed again in another program may differ in its last bit, and the entry at the threshold then be lost:
    sums and ``merge`` find it in :attr:`Tensor.scores`.
    """

    of: Callable[..., Any] | None = None
    ranks: Callable[[int, Mapping[str, np.ndarray]], np.ndarray] | None = None
    reduce: Literal["sum", "max"] = "sum"


def ranked_before(passes: Sequence[Pass]) -> int | None:
    """The number of the last of ``passes`` that ranks a score, whose scores come with a tensor after it."""
    return next((i for i in reversed(range(len(passes))) if passes[i].of is not None and passes[i].ranks), None)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A merging rule with its options, for any number of models, sizes and ways to run.

    merge: ``merge(tensor, **options) -> [...]``, the merged delta, float32. It is traced. With ``each``, ``[N, ...]``: one
        result for every model.
    options: choices that a program is compiled for; hashable.
    parameters: numbers that may differ by model and by tensor, each one number or one per model: :attr:`Tensor.parameters`.
    ranks: ``ranks(entries, parameters) -> [N, R]`` integers, for rules that trim by magnitude: how many of the ``entries`` of
        a tensor come before the threshold. Computed on the host, in float64, because that is where published counts come from.
    axis: the ``entries`` that ``ranks`` is told of are those along this axis of a tensor; None, and for vectors: all of them.
    passes: what is to be known of the whole model before ``merge`` runs, one after the other: :class:`Pass`. Each reads every
        tensor once (one with ranks twice). What the last one of magnitudes found is :attr:`Tensor.thresholds`, too.
    coefficients: for rules that are ``sum_i c_i delta_i`` with the same c everywhere: ``parameters -> [N]``. Encodings then
        stay what they are. One more, with ``base``, is that of the base: the result then changes all of its weights.
    statistics: whether ``merge`` reads statistics of data, one tree per model.
    elementwise: whether ``merge`` (and every pass) treats entries one by one but for trimming by
        :func:`jft.merge.trim.largest`, draws nothing at random, and gives 0 where all deltas are: a tensor may then be merged
        in pieces, padded with zeros.
    base: whether ``merge`` reads the base. models: the least and the largest number of models; None is no limit. weighted:
        whether the rule has the parameter ``weight``.
    """

    merge: Callable[..., Array]
    options: Mapping[str, Hashable] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ranks: Callable[[int, Mapping[str, np.ndarray]], np.ndarray] | None = None
    axis: int | None = None
    passes: tuple[Pass, ...] = ()
    coefficients: Callable[[Mapping[str, Sequence[Any]]], Sequence[Any]] | None = None
    statistics: bool = False
    elementwise: bool = False
    base: bool = False
    each: bool = False
    models: tuple[int, int | None] = (1, None)
    weighted: bool = True

    def check_models(self, count: int, name: str) -> None:
        """Raise ``ValueError`` for a number of models that the rule is not defined for."""
        least, most = self.models
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
            raise ValueError(f"{name} merges {wanted} models, not {count}")

    def entries(self, shape: tuple[int, ...]) -> int:
        """How many entries of a tensor are ranked together. Raises ``ValueError`` where it has no such axis."""
        if self.axis is None or len(shape) < 2:
            return math.prod(shape)
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"axis is {self.axis}, and a tensor of shape {shape} has axes 0 to {len(shape) - 1}")
        return shape[self.axis]

    def values(self, count: int) -> dict[str, list[Any]]:
        """Each parameter as one number per model. Raises ``ValueError`` naming one of another length."""
        return {name: weights_of(value, count, name) for name, value in self.parameters.items()}


def listed(vectors: Vectors) -> list[TaskVector]:
    """The vectors as a list; ``ValueError`` where there are none, or something else is among them."""
    if isinstance(vectors, TaskVector):
        raise ValueError("merging takes a list of task vectors, not one; [tau] is a list of one")
    taus = list(vectors.values() if isinstance(vectors, Mapping) else vectors)
    if not taus:
        raise ValueError("merging needs at least one task vector")
    for i, vector in enumerate(taus):
        if not isinstance(vector, TaskVector):
            raise ValueError(
                f"vectors[{i}] is a {type(vector).__name__}, not a TaskVector; load files with TaskVector.load"
            )
    return taus


def weights_of(value: Any, count: int, name: str = "weights", default: float = 1.0) -> list[Any]:
    """One number per vector from an option that may be None, one number, or one per vector.

    Numbers may be traced scalars (learned coefficients). Raises ``ValueError`` naming the option where the count differs.
    """
    if value is None:
        return [default] * count
    # np.ndim and np.shape take traced scalars as well.
    if np.ndim(value) == 0:
        return [value] * count
    if np.ndim(value) != 1 or len(value) != count:
        raise ValueError(f"{name} must be one number or one per vector ({count} of them), not shape {np.shape(value)}")
    return list(value)


def in_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise ``ValueError`` unless every number of ``value``, one or one per model, lies in ``[low, high]``."""
    for number in np.ravel(value):
        if not low <= float(number) <= high:
            raise ValueError(f"{name} must be between {low:g} and {high:g}, not {float(number):g}")
