"""Sparse structured weights: entries, blocks, rows or columns of a weight that move, everything else fixed.

A *layout* says how what is selected of a weight (``at``) and its values lie in arrays: see :mod:`jft.kernels`. The live
weight already holds the current values, so the forward pass is that of the plain model; a *gradient tap* gives the derivative
in the values: forward the plain product, its tangent that of the selected parts. The rule is a ``custom_jvp`` whose tangent is
written in ordinary operations, which JAX transposes by itself: it works in forward and reverse mode, under scan, remat and
vmap.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jft import delta
from jft.delta.numeric import host
from jft.kernels import blocks, entries, slices
from jft.models import core

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Entries:
    """Single entries: see :mod:`jft.kernels.entries`."""

    def gather(self, w: Array, at: Array) -> Array:
        return entries.gather(w, at)

    def put(self, w: Array, at: Array, values: Array) -> Array:
        return entries.put(w, at, values)

    def add_dot(self, x: Array, at: Array, values: Array, shape: tuple[int, int]) -> Array:
        return entries.add_dot(x, at, values, shape)

    def spec(self, spec: tuple, at: Any) -> tuple[PartitionSpec, PartitionSpec]:
        """Sharding of ``at`` and of the values, for a weight sharded as ``spec``: cells lie with their part of it."""
        axes = at.shape[-1]
        lead = len(at.shape) - 2 - axes
        cells = (*spec[:lead], *(s if n > 1 else None for s, n in zip(spec[lead:], at.shape[lead:], strict=False)))
        return PartitionSpec(*cells, None, None), PartitionSpec(*cells, None)

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        """How many values are no padding, int32."""
        n = at.shape[-1]
        return _below(at[..., 0], shape[-n] // at.shape[-2 - n])

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> delta.Encoding:
        n = at.shape[-1]
        lead, extent = shape[: len(shape) - n], shape[len(shape) - n :]
        grid = at.shape[len(lead) : len(lead) + n]
        index, valid = _whole(at, grid, [size // g for size, g in zip(extent, grid, strict=True)])
        coordinates = [*index[: len(lead)], *index[-n:]]
        rows = np.zeros(valid.sum(), np.int64)
        for size, axis in zip(shape[:-1], coordinates[:-1], strict=True):
            rows = rows * size + axis
        order = np.lexsort((coordinates[-1], rows))
        return delta.Entries(
            jnp.asarray(rows[order], jnp.int32),
            jnp.asarray(coordinates[-1][order], jnp.int32),
            jnp.asarray(values[valid][order]),
            shape,
        )


def _below(at: Array, extent: int) -> Array:
    return jnp.sum(at < extent, dtype=jnp.int32)


def _whole(at: np.ndarray, grid: tuple[int, ...], extent: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Leading, cell and whole coordinates of all that is not padding, and where that stands in the values."""
    n = at.shape[-1]
    valid = np.all(at < np.asarray(extent), axis=-1)
    where = np.nonzero(valid)
    lead, cell = where[: len(where) - 1 - n], where[len(where) - 1 - n : -1]
    inside = at[valid]
    return [*lead, *(c * size + inside[:, i] for i, (c, size) in enumerate(zip(cell, extent, strict=True)))], valid


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of ``rows x columns``: see :mod:`jft.kernels.blocks`."""

    rows: int
    columns: int

    def gather(self, w: Array, at: Array) -> Array:
        return blocks.gather(w, at, (self.rows, self.columns))

    def put(self, w: Array, at: Array, values: Array) -> Array:
        return blocks.put(w, at, values)

    def add_dot(self, x: Array, at: Array, values: Array, shape: tuple[int, int]) -> Array:
        return blocks.add_dot(x, at, values, shape)

    def spec(self, spec: tuple, at: Any) -> tuple[PartitionSpec, PartitionSpec]:
        lead = len(at.shape) - 4
        cells = (*spec[:lead], *(s if n > 1 else None for s, n in zip(spec[lead:], at.shape[lead:-2], strict=True)))
        return PartitionSpec(*cells, None, None), PartitionSpec(*cells, None, None, None)

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        """How many values are no padding, int32."""
        return _below(at[..., 0], shape[-2] // self.rows // at.shape[-4]) * (self.rows * self.columns)

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> delta.Encoding:
        lead, grid = shape[:-2], at.shape[-4:-2]
        counts = [shape[-2] // self.rows // grid[0], shape[-1] // self.columns // grid[1]]
        index, valid = _whole(at, grid, counts)
        flat = np.zeros(valid.sum(), np.int64)
        for size, axis in zip(lead, index, strict=False):
            flat = flat * size + axis
        where = np.stack([flat, *index[-2:]], axis=-1)
        order = np.lexsort((where[:, 2], where[:, 1], where[:, 0]))
        return delta.Blocks(jnp.asarray(where[order], jnp.int32), jnp.asarray(values[valid][order]), shape)


@dataclasses.dataclass(frozen=True)
class Slices:
    """Whole rows (``axis`` -2) or columns (-1): see :mod:`jft.kernels.slices`."""

    axis: int

    def gather(self, w: Array, at: Array) -> Array:
        return slices.gather(w, at, self.axis)

    def put(self, w: Array, at: Array, values: Array) -> Array:
        return slices.put(w, at, values, self.axis)

    def add_dot(self, x: Array, at: Array, values: Array, shape: tuple[int, int]) -> Array:
        return slices.add_dot(x, at, values, shape, self.axis)

    def spec(self, spec: tuple, at: Any) -> tuple[PartitionSpec, PartitionSpec]:
        *lead, rows, columns = spec
        cell = (rows if self.axis == slices.ROWS else columns) if at.shape[-2] > 1 else None
        whole = (cell, None, columns) if self.axis == slices.ROWS else (rows, cell, None)
        return PartitionSpec(*lead, cell, None), PartitionSpec(*lead, *whole)

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        """How many values are no padding, int32."""
        return _below(at, shape[self.axis] // at.shape[-2]) * shape[-3 - self.axis]

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> delta.Encoding:
        lead, size, g = shape[:-2], shape[self.axis], at.shape[-2]
        index, valid = _whole(at[..., None], (g,), [size // g])
        flat = np.zeros(valid.sum(), np.int64)
        for n, axis in zip((*lead, size), index, strict=True):
            flat = flat * n + axis
        if self.axis == slices.COLUMNS:
            values = np.moveaxis(values, len(lead), -1)
        return delta.Slices(jnp.asarray(flat, jnp.int32), jnp.asarray(values[valid]), shape, self.axis)


Layout = Entries | Blocks | Slices


def laid(delta_of: delta.Entries | delta.Blocks | delta.Slices) -> tuple[Layout, np.ndarray, np.ndarray]:
    """``(layout, at, values)`` of an encoding of a weight ``[*lead, I, O]``, in one cell; the inverse of ``encode``.

    Matrices that hold fewer parts than others are padded.
    """
    *lead, rows, _ = delta_of.shape
    values = host(delta_of.values)
    if isinstance(delta_of, delta.Slices):
        layout: Layout = Slices(delta_of.axis)
        extent = delta_of.shape[delta_of.axis]
        matrix, places = np.divmod(host(delta_of.indices).astype(np.int64), extent)
        places = places[:, None]
    elif isinstance(delta_of, delta.Blocks):
        layout, extent = Blocks(*delta_of.block), rows // delta_of.block[0]
        indices = host(delta_of.indices)
        matrix, places = indices[:, 0], indices[:, 1:]
    else:
        layout, extent = Entries(), rows
        matrix, row = np.divmod(host(delta_of.rows).astype(np.int64), rows)
        places = np.stack([row, host(delta_of.columns)], axis=-1)
    order = np.argsort(matrix, kind="stable")
    matrix, places, values = matrix[order], places[order], values[order]
    counts = np.bincount(matrix, minlength=math.prod(lead))
    most = max(int(counts.max(initial=0)), 1)
    slot = np.arange(len(matrix)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.zeros((len(counts), most, places.shape[1]), np.int32)
    at[..., 0] = extent + np.arange(most)
    at[matrix, slot] = places
    full = np.zeros((len(counts), most, *values.shape[1:]), values.dtype)
    full[matrix, slot] = values
    cell = (1,) * places.shape[1]
    if isinstance(layout, Slices):
        at, full = at.reshape(*lead, 1, most), full.reshape(*lead, 1, most, full.shape[-1])
        return layout, at, full if layout.axis == slices.ROWS else np.moveaxis(full, -1, len(lead))
    return layout, at.reshape(*lead, *cell, *at.shape[1:]), full.reshape(*lead, *cell, *full.shape[1:])


_Zero = jax.custom_derivatives.SymbolicZero


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def tap(layout: Layout, w: Array, at: Array, values: Array) -> Array:
    """``w``, with the derivative of ``layout.put(w, at, values)``: the tap for any function of plain arrays."""
    return w


@functools.partial(tap.defjvp, symbolic_zeros=True)
def _tap_jvp(layout: Layout, primals: tuple, tangents: tuple) -> tuple[Array, Any]:
    w, at, _ = primals
    dw, _, dvalues = tangents
    if isinstance(dvalues, _Zero):
        return w, dw
    moved = layout.put(jnp.zeros_like(w), at, dvalues)
    return w, moved if isinstance(dw, _Zero) else moved + dw


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def tapped_dot(layout: Layout, x: Array, w: Array, at: Array, values: Array) -> Array:
    """``x[N, I] @ w[I, O]``, with the derivative of ``x @ layout.put(w, at, values)``."""
    return core.dot(x, w)


@functools.partial(tapped_dot.defjvp, symbolic_zeros=True)
def _tapped_dot_jvp(layout: Layout, primals: tuple, tangents: tuple) -> tuple[Array, Any]:
    x, w, at, _ = primals
    dx, dw, _, dvalues = tangents
    parts = []
    if not isinstance(dx, _Zero):
        parts.append(core.dot(dx, w))
    if not isinstance(dw, _Zero):
        parts.append(core.dot(x, dw))
    if not isinstance(dvalues, _Zero):
        parts.append(layout.add_dot(x, at, dvalues, (w.shape[0], w.shape[1])).astype(x.dtype))
    y = core.dot(x, w)
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _tapped_take(dtype: Any, w: Array, ids: Array, at: Array, values: Array) -> Array:
    """Rows ``ids`` of a table, with the derivative in its selected rows alone."""
    return core.take(w, ids, dtype)


@functools.partial(_tapped_take.defjvp, symbolic_zeros=True)
def _tapped_take_jvp(dtype: Any, primals: tuple, tangents: tuple) -> tuple[Array, Any]:
    w, ids, at, _ = primals
    dw, _, _, dvalues = tangents
    taken = core.take(w, ids, dtype)
    parts = [] if isinstance(dw, _Zero) else [core.take(dw, ids, dtype)]
    if not isinstance(dvalues, _Zero):
        parts.append(slices.add_take(ids, at, dvalues, w.shape[0]).astype(dtype))
    return taken, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(taken)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectedWeight:
    """A weight some of whose parts train. ``w`` holds their current values; with ``origin`` (their values in ``w``), it does
    not: it is a base that others share, and the product with ``values - origin`` is added.
    """

    w: Array
    at: Array
    values: Array
    origin: Array | None
    layout: Layout = dataclasses.field(metadata={"static": True})

    def _plain(self) -> Array:
        if self.origin is None:
            return tap(self.layout, self.w, self.at, self.values)
        return self.layout.put(self.w, self.at, self.values)

    def _moved(self) -> Array:
        return self.values - self.origin.astype(self.values.dtype)  # type: ignore[union-attr]

    def __jft_dot__(self, x: Array) -> Array:
        if self.origin is not None and isinstance(self.layout, Entries):
            return core.dot(x, self._plain())
        rows = x.reshape(-1, x.shape[-1])
        if self.origin is None:
            y = tapped_dot(self.layout, rows, self.w, self.at, self.values)
        else:
            moved = self.layout.add_dot(rows, self.at, self._moved(), (self.w.shape[0], self.w.shape[1]))
            y = core.dot(rows, self.w) + moved.astype(x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def __jft_grouped_dot__(self, x: Array, sizes: Array) -> Array:
        return core.grouped_dot(x, self._plain(), sizes)

    def __jft_take__(self, ids: Array) -> Array:
        if self.layout != Slices(slices.ROWS):
            return core.take(self._plain(), ids, self.w.dtype)
        if self.origin is None:
            return _tapped_take(self.w.dtype, self.w, ids, self.at, self.values)
        moved = slices.add_take(ids, self.at, self._moved(), self.w.shape[0])
        return core.take(self.w, ids, self.w.dtype) + moved.astype(self.w.dtype)

    def __jft_transpose__(self) -> Any:
        w = jnp.swapaxes(self.w, -1, -2)
        if isinstance(self.layout, Entries):
            return jnp.swapaxes(self._plain(), -1, -2)
        if isinstance(self.layout, Blocks):
            at, values = blocks.transposed(self.at, self.values)
            origin = None if self.origin is None else blocks.transposed(self.at, self.origin)[1]
            return SelectedWeight(w, at, values, origin, Blocks(self.layout.columns, self.layout.rows))
        lead = self.at.ndim - 2
        source, target = (-1, lead) if self.layout.axis == slices.ROWS else (lead, -1)
        values, origin = jax.tree.map(lambda x: jnp.moveaxis(x, source, target), (self.values, self.origin))
        return SelectedWeight(w, self.at, values, origin, Slices(-3 - self.layout.axis))
