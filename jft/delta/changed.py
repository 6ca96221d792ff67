"""`Changed`: a weight and a change of it as one structured weight, with one rule of differentiation for all forms.

A live sparse update, a low-rank change, a base that many changes share, and the tangent of a linearized model are all
``Changed(w, delta, held)``:

* ``held=False``: the weight is ``w + delta``; products cost that with ``w`` and what the form of the change costs.
* ``held=True``: ``w`` already holds the change (a live weight), or is the point at which a model is linearized. The value is
  that of ``w`` alone, and the derivative in ``delta`` is that of the change: a *gradient tap*. Nothing is multiplied with
  the change in the forward pass, and its transpose gives the gradient of what ``delta`` holds and of nothing else.

The rule is a ``custom_jvp`` written in ordinary operations, which JAX transposes by itself: it works in forward and reverse
mode, under scan, remat and vmap.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jft.delta.numeric import wide
from jft.dot import dot, expert_dot, grouped_dot, take, transpose

Array = jax.Array
# From the end, so that they mean the same whatever leading axes there are.
ROWS, COLUMNS = -2, -1


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Which axes of an array, counted from its end, are inputs and outputs of the matrices that its other axes stack."""

    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The description of one array that is trained or kept for a weight ``[*lead, I, O]``: its logical axes, and how it trains.

    axes: for each of its axes the axis of the weight that it runs along (``ROWS``, ``COLUMNS``), None for none, and ``...``
    for the leading axes, as many as are left; sharding follows. decays: whether weight decay is for it. matrices: those
    it stacks, for optimizers of matrices; None for none, and by default its last two axes if it has them. rate: a
    multiplier of the learning rate. origin: its value at the base, a number or a function of what is kept; None where no
    distance from the base counts. count: how many of its values are no padding, a function of what is kept; None for all.
    """

    axes: tuple[int | EllipsisType | None, ...] = (...,)
    decays: bool = True
    matrices: Matrices | EllipsisType | None = ...
    rate: float = 1.0
    origin: float | Callable[[Any], Any] | None = 0.0
    count: Callable[[Any], Array] | None = None

    def sharding(self, spec: PartitionSpec, weight: Any, ndim: int) -> PartitionSpec:
        """That of an array of ``ndim`` axes, for a ``weight`` (an array or shape) sharded as ``spec``."""
        # Laid out like the weight, so what holds for the weight holds as it is.
        if self.axes == (...,) and ndim == len(weight.shape):
            return spec
        whole = (*spec, *(None,) * (len(weight.shape) - len(spec)))
        axes = [axis for axis in self.axes if axis is not ...]
        # Without `...` the array has none of the weight's leading axes.
        leading = whole[: ndim - len(axes)] if len(axes) < len(self.axes) else ()
        return PartitionSpec(*leading, *(None if axis is None else whole[axis] for axis in axes))

    def stacked_matrices(self, ndim: int) -> Matrices | None:
        """:attr:`matrices` of an array of ``ndim`` axes."""
        if self.matrices is ...:
            # A vector has nothing to orthogonalise or to precondition from two sides.
            return Matrices() if ndim > 1 else None
        return self.matrices

    def change(self, kept: Any, value: Array) -> Array:
        """``value`` minus what it was at the base; zeros where no distance counts."""
        if self.origin is None:
            return jnp.zeros_like(value)
        if callable(self.origin):
            return value - self.origin(kept).astype(value.dtype)
        # The common origin of 0 costs no subtraction.
        return value - self.origin if self.origin else value

    def inside(self, part: Callable[[Any], Any]) -> Leaf:
        """The same where what is kept for it is ``part(kept)``."""

        def of(function: Any) -> Any:
            return (lambda kept: function(part(kept))) if callable(function) else function

        return dataclasses.replace(self, origin=of(self.origin), count=of(self.count))


class Change:
    """A change ``d`` of a weight ``[*lead, I, O]`` that is linear in each of its arrays :attr:`factors`.

    Subclasses are frozen dataclasses and pytrees whose arrays have the weight's leading axes (layers, experts) first, so that
    they slice under a scan, and whose shapes do not depend on values. :meth:`whole` is all that a new form must say. The
    methods that follow it are for forms that can do better than to form the weight, and give None for those that cannot.
    One :class:`Changed` puts a change and a weight together, and has the rule of differentiation that all forms share.
    """

    # The arrays that the change is linear in, each by itself; along the last the change of a linearized model moves.
    factors: ClassVar[tuple[str, ...]] = ()
    # Whether it is an array, whose products are those of any weight.
    is_array: ClassVar[bool] = False

    def whole(self, dtype: Any) -> Array:
        """``d`` as an array ``[*lead, I, O]``."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is as an array")

    def product(self, x: Array) -> Array | None:
        """``x[..., I] @ d`` for one matrix, in the dtype of ``x``."""
        return None

    def grouped_product(self, x: Array, sizes: Array) -> Array | None:
        """Rows of ``x[N, I]`` in consecutive groups of int ``sizes[E]``, each times its own matrix of ``d[E, I, O]``."""
        return None

    def expert_product(self, x: Array) -> Array | None:
        """``[E, N, O]`` of every matrix of ``d[E, I, O]``: x ``[N, I]``, the same rows for all, or ``[E, N, I]``."""
        # A change is a pytree, so that vmap takes the matrices of all its arrays in step.
        return jax.vmap(lambda x, d: d.product(x), in_axes=(0 if x.ndim == 3 else None, 0))(x, self)

    def rows(self, ids: Array) -> Array | None:
        """Rows ``ids`` of ``d[I, O]``, in the dtype of its values."""
        return None

    def transposed(self) -> Change | None:
        """The change of the transposed weight."""
        return None

    def apply_to(self, w: Array) -> Array:
        """``w + d``, added in float32 and rounded once, to the dtype of ``w``."""
        # A change made in bfloat16 would be rounded before it is added, and again after.
        precise = wide(w)
        return (precise + self.whole(precise.dtype)).astype(w.dtype)

    @property
    def direction(self) -> Array:
        """The last of the factors."""
        return getattr(self, self.factors[-1])

    def along(self, direction: Any) -> Any:
        """The same with another :attr:`direction`."""
        return self.replace(**{self.factors[-1]: direction})

    def replace(self, **arrays: Any) -> Any:
        """The same with other arrays, or with what stands for them in a tree; nothing is checked."""
        # `dataclasses.replace` would run the checks, which refuse tangents and placeholders.
        new = copy.copy(self)
        for name, value in arrays.items():
            object.__setattr__(new, name, value)
        return new


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Changed:
    """The structured weight ``w + delta``, or with ``held`` the weight ``w`` whose derivative is that of ``w + delta``.

    w: an array ``[*lead, I, O]`` (or a vector), or a structured weight. delta: see :class:`Change`.
    """

    w: Any
    delta: Change
    held: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    def plain(self) -> Array:
        """The weight as an array, for functions that take no structured weights."""
        w = plain(self.w)
        return _gradient_tap(_WHOLE, w, self.delta) if self.held else self.delta.apply_to(w)

    def __jft_dot__(self, x: Array) -> Array:
        return self._used(_DOT, x)

    def __jft_grouped_dot__(self, x: Array, sizes: Array) -> Array:
        return self._used(_GROUPED_DOT, x, sizes)

    def __jft_expert_dot__(self, x: Array) -> Array:
        return self._used(_EXPERT_DOT, x)

    def __jft_take__(self, ids: Array) -> Array:
        return self._used(_TAKE, ids)

    def __jft_transpose__(self) -> Any:
        delta = self.delta.transposed()
        # Only the form of the change is lost: `plain` keeps the derivative of a held one.
        return jnp.swapaxes(self.plain(), -1, -2) if delta is None else Changed(transpose(self.w), delta, self.held)

    def _used(self, use: _Use, *arguments: Array) -> Array:
        if self.held:
            return _gradient_tap(use, self.w, self.delta, *arguments)
        change = use.of_change(self.delta, *arguments)
        # One product with the sum is cheaper than two with arrays.
        return use.of_weight(self.plain(), *arguments) if change is None else use.of_weight(self.w, *arguments) + change


class _Use(NamedTuple):
    """An operation on a weight, and the same on the form of a change: None where the form would have to become an array."""

    of_weight: Callable[..., Array]
    of_change: Callable[..., Array | None]


# Made once: JAX tells static arguments apart by identity, and a lambda made at each use would be new each time.
_WHOLE = _Use(lambda w: w, lambda d: None)
_DOT = _Use(lambda w, x: dot(x, w), lambda d, x: d.product(x))
_GROUPED_DOT = _Use(lambda w, x, sizes: grouped_dot(x, w, sizes), lambda d, x, sizes: d.grouped_product(x, sizes))
_EXPERT_DOT = _Use(lambda w, x: expert_dot(x, w), lambda d, x: d.expert_product(x))
_TAKE = _Use(lambda w, ids: take(w, ids, w.dtype), lambda d, ids: d.rows(ids))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradient_tap(use: _Use, w: Any, delta: Change, *arguments: Array) -> Array:
    """``use`` of ``w``, with the derivative that ``use`` of ``w + delta`` has."""
    return use.of_weight(w, *arguments)


# With symbolic zeros the rule sees which inputs do not move, and computes nothing for frozen ones.
@functools.partial(_gradient_tap.defjvp, symbolic_zeros=True)
def _gradient_tap_jvp(use: _Use, primals: tuple, tangents: tuple) -> tuple[Array, Any]:
    w, delta, *arguments = primals
    dw, ddelta, *darguments = tangents
    y, *parts = _value_and_tangent(use.of_weight, (w, *arguments), (dw, *darguments))
    # Linear in each factor by itself, so the derivative is one term for each, the others where they are.
    for name in delta.factors:
        if not _is_zero(getattr(ddelta, name)):
            change = delta.replace(**{name: getattr(ddelta, name)})
            tangent = use.of_change(change, *arguments)
            tangent = use.of_weight(change.whole(y.dtype), *arguments) if tangent is None else tangent
            # JAX requires tangents in the dtype of the value.
            parts.append(tangent.astype(y.dtype))
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


def _value_and_tangent(function: Callable[..., Array], primals: tuple, tangents: tuple) -> list[Array]:
    """``[value]`` of ``function(*primals)``; ``[value, tangent]`` where any of ``tangents`` is not zero."""
    leaves, structure = jax.tree.flatten(primals)
    flat_tangents = structure.flatten_up_to(tangents)  # type: ignore[attr-defined]
    # `jax.jvp` of all inputs would make arrays of the symbolic zeros and multiply with them.
    indices = [i for i, t in enumerate(flat_tangents) if not _is_zero(t)]
    if not indices:
        return [function(*primals)]

    def of(arrays: list[Array]) -> Array:
        replaced = dict(zip(indices, arrays, strict=True))
        return function(*jax.tree.unflatten(structure, [replaced.get(i, x) for i, x in enumerate(leaves)]))

    return list(jax.jvp(of, ([leaves[i] for i in indices],), ([flat_tangents[i] for i in indices],)))


def _is_zero(tangent: Any) -> bool:
    # float0 is the tangent of integers, such as ids and sizes.
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero) or tangent.dtype == jax.dtypes.float0


def plain(w: Any) -> Array:
    """A weight as an array, whether it is :class:`Changed` or an array already."""
    return w.plain() if isinstance(w, Changed) else w


def as_seen(weight: Any, structured: bool) -> Any:
    """A weight, or runs of such, as a model sees it: as it is where structured weights are taken, else as an array.

    A dense change has no product of its own, so its weight is an array in any case.
    """

    def one(w: Any) -> Any:
        return w.plain() if is_changed(w) and (not structured or w.delta.is_array) else w

    return jax.tree.map(one, weight, is_leaf=is_changed)


def base(w: Any) -> Array:
    """The weight without its changes."""
    # A change may be of a weight that is changed already.
    return base(w.w) if isinstance(w, Changed) else w


def is_changed(x: Any) -> bool:
    """Whether ``x`` is a :class:`Changed`: for ``is_leaf``."""
    return isinstance(x, Changed)


def directions(weights: Any) -> tuple[list[Array], list[Array], Callable[[list[Array]], Any]]:
    """``(point, direction, build)`` of a pytree of weights whose changes are the directions of a derivative at the base.

    ``build(point)`` are the weights at the base, all held: their derivative there along ``direction`` is the change. Point
    and direction are the last factor of every change, in order: zeros, and what it is.
    """
    leaves, structure = jax.tree.flatten(weights)
    # Of the same structure as the weights, so that both flatten in one order.
    is_direction = jax.tree.leaves(jax.tree.map(_is_direction, weights, is_leaf=is_changed))
    indices = [i for i, is_one in enumerate(is_direction) if is_one]
    direction = [leaves[i] for i in indices]

    def build(point: list[Array]) -> Any:
        replaced = dict(zip(indices, point, strict=True))
        return jax.tree.unflatten(structure, [replaced.get(i, x) for i, x in enumerate(leaves)])

    return [jnp.zeros_like(x) for x in direction], direction, build


def _is_direction(weight: Any) -> Any:
    """A tree of bools like ``weight``: True at the last factor of every change of it, False elsewhere."""
    if not isinstance(weight, Changed):
        return False
    inner = jax.tree.map(_is_direction, weight.w, is_leaf=is_changed)
    # Only the last factor moves: along several at once the change would not be linear.
    delta = jax.tree.map(lambda _: False, weight.delta)
    return Changed(inner, delta.along(True), weight.held)
