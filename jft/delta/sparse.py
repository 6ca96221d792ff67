"""`Sparse`: the base class of encodings that hold values at distinct positions of the weight."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta.encoding import Encoding
from jft.delta.numeric import count_nonzero, inner, wide
from jft.delta.registry import kinds

Array = jax.Array


class Sparse(Encoding):
    """``delta.reshape(view)[at] = values``, zero elsewhere; what :attr:`at` names is distinct.

    The weight is read and written at those positions only: under ``jit`` with a donated ``w``, :meth:`apply_to` works in the
    memory of ``w`` (float32 or not), with temporaries of the size of the values.
    """

    values: Array

    @property
    @abc.abstractmethod
    def at(self) -> tuple:
        """The index of the values in the weight of shape :attr:`view`."""

    @property
    def view(self) -> tuple[int, ...]:
        """The shape in which :attr:`at` indexes the weight."""
        return self.shape

    @abc.abstractmethod
    def coordinates(self) -> tuple[Array, Array, Array]: ...

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def dense(self) -> Array:
        values = wide(self.values)
        zero = jnp.zeros(self.view, values.dtype)
        # Set, not added: positions are distinct, and a set of unique indices needs no atomics.
        return zero.at[self.at].set(values, unique_indices=True).reshape(self.shape)

    def scaled(self, c: Any) -> Any:
        return self._with(values=wide(self.values) * c)

    def add_to(self, w: Array) -> Array:
        return w.reshape(self.view).at[self.at].add(wide(self.values), unique_indices=True).reshape(self.shape)

    def apply_to(self, w: Array, scale: Any = 1.0) -> Array:
        self._fits(w)
        delta = wide(self.values) * scale
        # In the memory of the weight, which need not be widened.
        if w.dtype == jnp.result_type(w, delta):
            return self._with(values=delta).add_to(w)
        # A float32 copy of the weights that change, not of all.
        view = w.reshape(self.view)
        new = (wide(view[self.at]) + delta).astype(w.dtype)
        return view.at[self.at].set(new, unique_indices=True).reshape(self.shape)

    def written(self, w: Array) -> Array:
        values = self.values.astype(w.dtype)
        return w.reshape(self.view).at[self.at].set(values, unique_indices=True).reshape(self.shape)

    def minus(self, base: Array) -> Any:
        # The base is read at these positions only.
        return self._with(values=_difference(self, base))

    def under(self, above: Encoding) -> Encoding:
        entries: Any = kinds()["entries"]  # by its name: that file imports this one
        return entries.of(self).under(above)

    def dot_dense(self, value: Array) -> Array:
        return inner(self.values, jnp.asarray(value).reshape(self.view)[self.at])

    def norm(self) -> Array:
        # Positions are distinct, so the values are all that is not zero.
        return jnp.sqrt(inner(self.values, self.values))

    @property
    def nnz(self) -> int:
        return count_nonzero(jnp.asarray(self.values))


# One program for each shape: what trains has many shapes, and operation by operation each of them compiles ten.
@jax.jit
def _difference(delta: Sparse, base: Array) -> Array:
    return wide(delta.values) - wide(base.reshape(delta.view)[delta.at])


@jax.jit
def find(rows: Array, columns: Array, among_rows: Array, among_columns: Array) -> Array:
    """The position of each coordinate among others in row-major order, int32; their number where it is not there.

    A binary search on both keys at once: no flat id, which int32 could not hold.
    """
    count = among_rows.shape[0]
    if not count:
        return jnp.zeros(rows.shape, jnp.int32)

    # Once low meets high nothing moves: every search may take as many steps as the longest.
    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        r, c = among_rows[middle], among_columns[middle]
        before = (low < high) & ((r < rows) | ((r == rows) & (c < columns)))
        return jnp.where(before, middle + 1, low), jnp.where(before, high, jnp.minimum(middle, high))

    # `count.bit_length()` steps leave one of count + 1 positions.
    start = (jnp.zeros(rows.shape, jnp.int32), jnp.full(rows.shape, count, jnp.int32))
    low, _ = jax.lax.fori_loop(0, count.bit_length(), halve, start)
    inside = jnp.minimum(low, count - 1)
    hit = (low < count) & (among_rows[inside] == rows) & (among_columns[inside] == columns)
    return jnp.where(hit, low, count)


def pick(values: Array, place: Array, *within: Array) -> Array:
    """``values[place, *within]`` in float32; zero where ``place`` is their number."""
    # A gather from an axis of no size is an error, even where all of it would be filled.
    if not values.shape[0]:
        shape = jnp.broadcast_shapes(*(x.shape for x in (place, *within)))
        return jnp.zeros((*shape, *values.shape[1 + len(within) :]), wide(values).dtype)
    return wide(values.at[(place, *within)].get(mode="fill", fill_value=0))


def united(x: np.ndarray, y: np.ndarray, of_x: Array, of_y: Array) -> tuple[np.ndarray, Array]:
    """The sorted union of two sets of int keys, and the sum of the values that belong to each."""
    # Stable: a merge of two runs where both are sorted already, as they are but for rows in any order.
    keys = np.sort(np.concatenate([x, y]), kind="stable")
    # Keys are not negative, so the first differs from -1.
    union = keys[np.diff(keys, prepend=-1) > 0]
    of_x, of_y = wide(of_x), wide(of_y)
    values = jnp.zeros((len(union), *of_x.shape[1:]), jnp.promote_types(of_x.dtype, of_y.dtype))
    for keys, addend in ((x, of_x), (y, of_y)):
        values = values.at[np.searchsorted(union, keys)].add(addend, unique_indices=True)
    return union, values


def overlaid(x: np.ndarray, y: np.ndarray, of_x: Array, of_y: Array) -> tuple[np.ndarray, Array]:
    """The sorted union of two sets of int keys, and the values that belong to each; ``of_y`` where it is in both."""
    # Values replace each other here and are never added, so they keep their dtype.
    only_x = np.flatnonzero(~np.isin(x, y))
    keys = np.concatenate([x[only_x], y])
    order = np.argsort(keys)
    return keys[order], _ordered(of_x, of_y, only_x, order)


@jax.jit
def _ordered(of_x: Array, of_y: Array, only_x: Array, order: Array) -> Array:
    return jnp.concatenate([of_x[only_x], of_y])[order]
