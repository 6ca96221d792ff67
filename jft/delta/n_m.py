"""`NM`: a delta of which n of every m consecutive entries along an axis are stored (2:4 and its kin), and its layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta.changed import COLUMNS, ROWS
from jft.delta.numeric import wide
from jft.delta.registry import register, rule
from jft.delta.selected import Layout, check_indices
from jft.delta.sparse import Sparse
from jft.tree import visible

Array = jax.Array


@register("n_m", data=("offsets", "values"), static=("shape", "m", "axis"))
@dataclasses.dataclass(frozen=True, eq=False)
class NM(Sparse):
    """In each group of m entries along ``axis``, those at ``offsets`` are ``values``, and the others are zero.

    Of a weight ``[*lead, I, O]`` groups run along the rows' axis (``axis`` -2), and offsets (an integer dtype, distinct in a
    group, in [0, m)) and values are ``[*lead, I/m, n, O]``; or along that of the columns (-1): ``[*lead, I, O/m, n]``. An
    offset takes a byte, and every matrix and group holds as many values: nothing is padded.
    """

    offsets: Array
    values: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property
    m: int
    axis: int = ROWS

    def __post_init__(self) -> None:
        # A file gives the shape as a list; static fields must hash.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if len(self.shape) < 2 or self.axis not in (ROWS, COLUMNS) or self.m < 1 or self.shape[self.axis] % self.m:
            raise ValueError(
                f"a weight of shape {self.shape} has no groups of {self.m} along axis {self.axis}; they run along the rows "
                "(-2) or columns (-1) of matrices, whose extent they divide"
            )
        # An array with too few axes gets the error below, not an IndexError.
        n = self.offsets.shape[_slot(self.axis)] if self.offsets.ndim > 2 else 0
        expected = stored_shape(self.shape, n, self.m, self.axis)
        if tuple(self.offsets.shape) != expected or tuple(self.values.shape) != expected:
            raise ValueError(
                f"{n} of {self.m} entries of a weight of shape {self.shape} need offsets and values {expected}, not "
                f"{tuple(self.offsets.shape)} and {tuple(self.values.shape)}"
            )
        check_indices("offsets", self.offsets)
        if visible(self.offsets) and self.offsets.size:
            offsets = np.asarray(self.offsets)
            # Sorted, equal offsets are neighbours.
            sorted_offsets = np.sort(offsets, axis=_slot(self.axis))
            if (
                offsets.min() < 0
                or offsets.max() >= self.m
                or (np.diff(sorted_offsets, axis=_slot(self.axis)) == 0).any()
            ):
                raise ValueError(f"offsets must be distinct in each group and from 0 to {self.m - 1}")

    @property
    def view(self) -> tuple[int, ...]:
        return grouped_shape(self.shape, self.m, self.axis)

    @property
    def at(self) -> tuple:
        # Sparse: they broadcast where they index, and take no memory like the values'.
        index = list(jnp.meshgrid(*(jnp.arange(n) for n in self.offsets.shape), indexing="ij", sparse=True))
        index[_slot(self.axis)] = self.offsets
        return tuple(index)

    def coordinates(self) -> tuple[Array, Array, Array]:
        *lead, rows, _ = self.shape
        index = jnp.broadcast_arrays(*self.at)
        group, offset = (-3, -2) if self.axis == ROWS else (-2, -1)
        along = index[group] * self.m + index[offset]
        row, column = (along, index[-1]) if self.axis == ROWS else (index[-3], along)
        matrix = jnp.zeros((), jnp.int32)
        # After the leading axes the index has three more, those of the groups.
        for size, axis in zip(lead, index, strict=False):
            matrix = matrix * size + axis
        flat = lambda x: jnp.broadcast_to(x, self.values.shape).reshape(-1).astype(jnp.int32)
        return flat(matrix * rows + row), flat(column), jnp.asarray(self.values).reshape(-1)

    def take(self, rows: Array, columns: Array) -> Array:
        along, across = (rows, columns) if self.axis == ROWS else (columns, rows)
        # I is a multiple of m, so rows counted through all matrices fall into groups as those of one do.
        group, offset = along // self.m, along % self.m
        n = self.values.shape[_slot(self.axis)]
        stored = (-1, n, self.shape[-1]) if self.axis == ROWS else (-1, self.shape[-1] // self.m, n)
        index = (group, slice(None), across) if self.axis == ROWS else (across, group)
        offsets, values = (jnp.asarray(x).reshape(stored)[index] for x in (self.offsets, self.values))
        # Offsets of a group are distinct: at most one term is not zero.
        return jnp.sum(jnp.where(offsets == offset[:, None], wide(values), 0), axis=-1)


@rule("+", NM, NM)
def _sum(x: NM, y: NM) -> NM | None:
    """n of m where both store the same entries, as runs of one selection do; else a sum of both, smaller than entries."""
    if (x.m, x.axis) != (y.m, y.axis) or not visible(x.offsets, y.offsets) or not np.array_equal(x.offsets, y.offsets):
        return None
    return x._with(values=wide(x.values) + wide(y.values))


def _slot(axis: int) -> int:
    """The axis that counts the n stored entries of a group."""
    return -2 if axis == ROWS else -1


def grouped_shape(shape: tuple[int, ...], m: int, axis: int) -> tuple[int, ...]:
    """A weight's shape with ``axis`` cut into groups of m: ``[*lead, I/m, m, O]`` or ``[*lead, I, O/m, m]``."""
    *lead, rows, columns = shape
    return (*lead, rows // m, m, columns) if axis == ROWS else (*lead, rows, columns // m, m)


def stored_shape(shape: tuple[int, ...], n: int, m: int, axis: int) -> tuple[int, ...]:
    """The shape of the n stored entries of each group."""
    grouped = list(grouped_shape(shape, m, axis))
    grouped[_slot(axis)] = n
    return tuple(grouped)


@dataclasses.dataclass(frozen=True)
class NMLayout(Layout):
    """n of m in programs: ``at``, the offsets, and values as :class:`NM` has them, with the weight's leading axes first."""

    n: int
    m: int
    axis: int = ROWS

    def axes(self, at: Any) -> tuple[tuple, tuple]:
        axes = (..., ROWS, None, COLUMNS) if self.axis == ROWS else (..., ROWS, COLUMNS, None)
        # The axis of groups is sharded as the axis that it divides; the n of a group stay together.
        return axes, axes

    def lead(self, at: Any) -> int:
        return len(at.shape) - 3

    def gather(self, w: Array, at: Array) -> Array:
        groups = w.reshape(grouped_shape(w.shape, self.m, self.axis))
        return jnp.take_along_axis(groups, at.astype(jnp.int32), axis=_slot(self.axis))

    def put(self, w: Array, at: Array, values: Array) -> Array:
        # Comparisons in place of a scatter: n selects over the weight, which XLA fuses.
        groups = w.reshape(grouped_shape(w.shape, self.m, self.axis))
        slot = _slot(self.axis)
        offset = jnp.arange(self.m).reshape((-1, 1) if self.axis == ROWS else (-1,))
        for j in range(self.n):
            stored_offset = jax.lax.slice_in_dim(at, j, j + 1, axis=at.ndim + slot)
            value = jax.lax.slice_in_dim(values, j, j + 1, axis=at.ndim + slot)
            groups = jnp.where(stored_offset == offset, value.astype(w.dtype), groups)
        return groups.reshape(w.shape)

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        # No padding: every group holds n.
        return jnp.asarray(math.prod(at.shape), jnp.int32)

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> NM:
        return NM(jnp.asarray(at), jnp.asarray(values), shape, self.m, self.axis)

    def slots(self, at: Any) -> int:
        return self.n
