"""`Slices`: a delta that is zero but for some rows, or some columns, of its matrices."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta.changed import COLUMNS, ROWS, Change, Matrices
from jft.delta.encoding import Encoding, unravel
from jft.delta.entries import Entries
from jft.delta.low_rank import LowRank
from jft.delta.numeric import inner, wide
from jft.delta.registry import register, rule
from jft.delta.selected import (
    Layout,
    below,
    check_indices,
    flat_index,
    over_leading,
    padded_coordinates,
    stacked,
    whole_coordinates,
)
from jft.delta.sparse import Sparse, pick, united
from jft.tree import host, visible

Array = jax.Array


class Slicing(Sparse):
    """Slices of one extent, each stored whole: slice ``indices[k]`` of :attr:`extent` is ``values[k]``.

    The indices, int32 ``[k]``, are distinct, in any order; what can be looked at is checked. The sum of two with equal
    shape and axis is the union of their slices; under ``jit``, where that has no static size, a :class:`jft.delta.Sum`.
    """

    indices: Array

    def __post_init__(self) -> None:
        # A file gives the shape as a list; static fields must hash.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        self._check_shape()
        k = tuple(self.indices.shape)
        if len(k) != 1 or tuple(self.values.shape) != (*k, *self.slice_shape):
            raise ValueError(
                f"{self.kind} of a weight of shape {self.shape} need indices [k] and values [k, *{self.slice_shape}], "
                f"not {k} and {tuple(self.values.shape)}"
            )
        check_indices(f"indices of {self.kind}", self.indices)
        if not visible(self.indices) or not k[0]:
            return
        indices = np.asarray(self.indices)
        if indices.min() < 0 or indices.max() >= self.extent:
            raise ValueError(
                f"{self.kind} {indices.min()}..{indices.max()} leave the {self.extent} {self.kind} there are"
            )
        if len(np.unique(indices)) != len(indices):
            raise ValueError(f"indices of {self.kind} must be distinct; add the {self.kind} that belong together first")

    @abc.abstractmethod
    def _check_shape(self) -> None:
        """Refuse a weight that has no such slices."""

    @property
    @abc.abstractmethod
    def extent(self) -> int:
        """The number of slices there are."""

    @property
    @abc.abstractmethod
    def slice_shape(self) -> tuple[int, ...]:
        """The shape of a slice."""

    @abc.abstractmethod
    def locate(self, rows: Array, columns: Array) -> tuple[Array, ...]:
        """The slice, and the index in it, of entries of the weight as one matrix."""

    def take(self, rows: Array, columns: Array) -> Array:
        index, *within = self.locate(rows, columns)
        return pick(jnp.asarray(self.values), self._place(index), *within)

    def _place(self, indices: Array) -> Array:
        """The position of each of ``indices`` in :attr:`indices`; their number where it is not there."""
        count = self.indices.shape[0]
        # A table rather than a search, since the indices come in any order; it is as long as there are slices.
        table = jnp.full(self.extent, count, jnp.int32)
        return table.at[self.indices].set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)[indices]


@register("slices", data=("indices", "values"), static=("shape", "axis"))
@dataclasses.dataclass(frozen=True, eq=False)
class Slices(Slicing):
    """Row (``axis=-2``) or column (``axis=-1``) ``indices[k]`` is ``values[k]``, all others are zero.

    The rows, or columns, of all matrices ``[..., I, O]`` are counted together: row i of matrix m is ``m * I + i``, column
    o of it ``m * O + o``, so that every layer has its slices, as many as it needs. indices int32 ``[k]``, distinct, in any
    order; values ``[k, O]`` of rows, ``[k, I]`` of columns.
    """

    indices: Array
    values: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property
    axis: int = -2

    def _check_shape(self) -> None:
        if len(self.shape) < 2 or self.axis not in (-2, -1):
            raise ValueError(
                f"slices are rows (axis -2) or columns (axis -1) of a matrix, not axis {self.axis} of {self.shape}; "
                "Entries fits a vector, Rows whole layers"
            )

    @property
    def extent(self) -> int:
        return math.prod(self.shape[:-2]) * self.shape[self.axis]

    @property
    def slice_shape(self) -> tuple[int, ...]:
        return (self.shape[-1 if self.axis == -2 else -2],)

    @property
    def view(self) -> tuple[int, ...]:
        # A single matrix as a stack of one: with an index before the slice, columns come first in what is indexed.
        return (1, *self.shape) if len(self.shape) == 2 else self.shape

    @property
    def at(self) -> tuple:
        # Slices of all matrices are counted together, so the matrix is in the index.
        *matrix, index = unravel(self.indices, (*self.view[:-2], self.shape[self.axis]))
        return (*matrix, index) if self.axis == -2 else (*matrix, slice(None), index)

    def coordinates(self) -> tuple[Array, Array, Array]:
        indices = jnp.asarray(self.indices)[:, None]
        along = jnp.arange(self.slice_shape[0], dtype=jnp.int32)
        if self.axis == -2:
            rows, columns = indices, along
        else:
            inputs, outputs = self.shape[-2:]
            rows, columns = indices // outputs * inputs + along, indices % outputs
        flat = lambda x: jnp.broadcast_to(x, self.values.shape).reshape(-1)
        return flat(rows), flat(columns), jnp.asarray(self.values).reshape(-1)

    def locate(self, rows: Array, columns: Array) -> tuple[Array, ...]:
        # Rows of all matrices, counted together, are rows of the weight as one matrix.
        if self.axis == -2:
            return rows, columns
        inputs, outputs = self.shape[-2:]
        return rows // inputs * outputs + columns, rows % inputs

    def stacked(self) -> Change:
        if not visible(self.indices, self.values):
            return super().stacked()
        extent, lead = self.shape[self.axis], len(self.shape) - 2
        # Layouts count slices within their matrix.
        matrix, part = np.divmod(host(self.indices).astype(np.int64), extent)
        selection = stacked(SliceLayout(self.axis), matrix, part[:, None], host(self.values), self.shape, extent)
        # Programs hold columns as columns, files as rows of values.
        values = selection.values if self.axis == ROWS else jnp.moveaxis(selection.values, -1, lead)
        return selection.replace(at=selection.at[..., 0], values=values)

    @classmethod
    def of(cls, delta: Encoding, axis: int = -2) -> Slices:
        """``delta`` as slices: all that hold an entry it stores (:meth:`jft.delta.Entries.of`)."""
        # Of no slices: it only says where entries belong.
        empty = cls(jnp.zeros(0, jnp.int32), jnp.zeros((0, delta.shape[-1 if axis == -2 else -2])), delta.shape, axis)
        rows, columns, values = Entries.of(delta).coordinates()
        index, within = empty.locate(rows, columns)
        indices, position = np.unique(np.asarray(index), return_inverse=True)
        slices = jnp.zeros((len(indices), *empty.slice_shape), values.dtype)
        slices = slices.at[position, within].set(values, unique_indices=True)
        return empty._with(indices=jnp.asarray(indices, jnp.int32), values=slices)


def union(x: Any, y: Any) -> Any:
    """``x + y`` of two with equal shape and axis; None where their indices cannot be looked at."""
    if not _same_slicing(x, y) or not visible(x.indices, y.indices):
        return None
    indices, values = united(np.asarray(x.indices), np.asarray(y.indices), x.values, y.values)
    return x._with(indices=jnp.asarray(indices, jnp.int32), values=values)


def matched(x: Any, y: Any) -> Array | None:
    """``x.dot(y)`` of two with equal shape and axis."""
    if not _same_slicing(x, y):
        return None
    # Slices that only one has meet zeros.
    return inner(x.values, pick(jnp.asarray(y.values), y._place(x.indices)))


def _same_slicing(x: Any, y: Any) -> bool:
    # Slices have an axis besides the shape, Rows have none.
    return all(getattr(x, field) == getattr(y, field) for field in x._static)


rule("+", Slices, Slices)(union)
rule("dot", Slices, Slices)(matched)


@rule("dot", Slices, LowRank)
def _slices_of_product(x: Slices, y: LowRank) -> Array:
    # One rank at a time: for every slice it takes as much memory as the values.
    across, along = (wide(y.a), wide(y.b).swapaxes(-1, -2)) if x.axis == -2 else (wide(y.b).swapaxes(-1, -2), wide(y.a))
    across, along = across.reshape(-1, y.rank), along.reshape(-1, *along.shape[-2:])
    m, values = x.indices // x.shape[x.axis], wide(x.values)
    # `across` is indexed through all matrices, `along` by the matrix of each slice.
    add = lambda k, total: total + jnp.sum(values * across[x.indices, k][:, None] * along[m, :, k])
    return jax.lax.fori_loop(0, y.rank, add, jnp.zeros((), values.dtype))


@dataclasses.dataclass(frozen=True)
class SliceLayout(Layout):
    """Whole rows (``axis`` -2) or columns (-1) in programs: ``at[*lead, g, r]``.

    Values ``[*lead, g, r, O]`` of rows, ``[*lead, I, g, r]`` of columns. For ``y = x @ w`` the gradient of rows needs only
    their columns of ``x``, so no more of ``x`` is kept for the backward pass; that of columns needs only their columns of
    ``dy``. Both are dense products: no kernel would be faster.
    """

    axis: int

    @property
    def slot(self) -> int:  # type: ignore[override]
        return self.axis

    @property
    def matrices(self) -> Matrices:  # type: ignore[override]
        """The rows, or columns, that train of one matrix are one."""
        return Matrices((-3, -2), (-1,)) if self.axis == ROWS else Matrices((-3,), (-2, -1))

    def axes(self, at: Any) -> tuple[tuple, tuple]:
        return (..., self.axis, None), (..., ROWS, None, COLUMNS) if self.axis == ROWS else (..., ROWS, COLUMNS, None)

    def lead(self, at: Any) -> int:
        return len(at.shape) - 2

    def _each_cell(self, fn: Callable[..., Array], w: Array, at: Array, *values: Array) -> Array:
        """``fn(cell, at, *values)`` over the leading axes and the cells, whose axis stays where it is in ``w``."""
        g, size = at.shape[-2], w.shape[self.axis] // at.shape[-2]
        axis = at.ndim - 2 if self.axis == ROWS else at.ndim - 1
        w = w.reshape(*w.shape[:axis], g, size, *w.shape[axis + 1 :])
        # Inside the vmaps below the leading axes are gone.
        axis -= at.ndim - 2
        # The axis of cells stays where it is: moving it would copy the weight.
        over_cells = jax.vmap(fn, in_axes=(axis, 0, *(axis for _ in values)), out_axes=axis)
        return over_leading(over_cells, at.ndim - 2)(w, at, *values)

    def gather(self, w: Array, at: Array) -> Array:
        def one(cell: Array, at: Array) -> Array:
            return jnp.take(cell, at, axis=self.axis, mode="fill", fill_value=0)

        return self._each_cell(one, w, at)

    def put(self, w: Array, at: Array, values: Array) -> Array:
        def one(cell: Array, at: Array, values: Array) -> Array:
            index = at if self.axis == ROWS else (slice(None), at)
            return cell.at[index].set(values, mode="drop", unique_indices=True)

        return self._each_cell(one, w, at, values.astype(w.dtype)).reshape(w.shape)

    def product(self, x: Array, at: Array, values: Array, shape: tuple[int, ...]) -> Array:
        index = _whole_index(at, shape[self.axis])
        if self.axis == ROWS:
            inputs = jnp.take(x, index, axis=-1, mode="fill", fill_value=0)
            return inputs @ values.reshape(-1, shape[1]).astype(x.dtype)
        part = x @ values.reshape(shape[0], -1).astype(x.dtype)
        # No promise of unique indices: all padding has the same one, past the end.
        return jnp.zeros((*x.shape[:-1], shape[1]), x.dtype).at[..., index].add(part, mode="drop")

    def rows(self, ids: Array, at: Array, values: Array, shape: tuple[int, ...]) -> Array | None:
        if self.axis == COLUMNS:
            return None
        index = _whole_index(at, shape[0])
        count = index.shape[0]
        slots = jnp.full(shape[0], count, jnp.int32).at[index].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
        return jnp.take(values.reshape(-1, values.shape[-1]), slots[ids], axis=0, mode="fill", fill_value=0)

    def transposed(self, at: Array, values: Array) -> tuple[Layout, Array, Array]:
        lead = at.ndim - 2
        source, target = (-1, lead) if self.axis == ROWS else (lead, -1)
        return SliceLayout(ROWS + COLUMNS - self.axis), at, jnp.moveaxis(values, source, target)

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        return below(at, shape[self.axis] // at.shape[-2]) * shape[ROWS + COLUMNS - self.axis]

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Slices:
        lead, size, g = shape[:-2], shape[self.axis], at.shape[-2]
        index, valid = whole_coordinates(at[..., None], (g,), [size // g])
        flat = flat_index((*lead, size), index, valid.sum())
        if self.axis == COLUMNS:
            values = np.moveaxis(values, len(lead), -1)
        return Slices(jnp.asarray(flat, jnp.int32), jnp.asarray(values[valid]), shape, self.axis)

    def pad(self, at: Array, most: int, shape: tuple[int, ...]) -> Array:
        return padded_coordinates(at[..., None], most, shape[self.axis] // at.shape[-2])[..., 0]


def _whole_index(at: Array, size: int) -> Array:
    """Coordinates ``at[g, r]`` inside cells along the whole axis of ``size``, ``[g * r]``; those of padding past its end."""
    extent = size // at.shape[-2]
    start = jnp.arange(at.shape[-2], dtype=jnp.int32)[:, None] * extent
    return jnp.where(at < extent, at + start, size).reshape(-1)
