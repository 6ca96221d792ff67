"""`Entries`: a delta that is zero but for single entries, their coordinates compressed in files."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta import elias_fano
from jft.delta.changed import COLUMNS, ROWS, Change
from jft.delta.encoding import Dense, Encoding, Sum, entry_index
from jft.delta.numeric import inner
from jft.delta.registry import register, rule
from jft.delta.selected import (
    Layout,
    below,
    cells,
    check_indices,
    flat_index,
    joined,
    over_leading,
    padded_coordinates,
    row_major,
    stacked,
    whole_coordinates,
)
from jft.delta.sparse import Sparse, find, overlaid, pick, united
from jft.tree import host, visible

Array = jax.Array


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight as one matrix: ``prod(shape[:-1]), shape[-1]``; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]


@register("entries", data=("rows", "columns", "values"), static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class Entries(Sparse):
    """``delta[rows, columns] = values``, zero elsewhere, of the matrix ``[prod(shape[:-1]), shape[-1]]``.

    rows, columns: int32 ``[n]``, distinct; values ``[n]``. A vector is one row: all its ``rows`` are 0. Coordinates may
    come in any order where they can be looked at, and are then checked and kept row-major; elsewhere (under ``jit``)
    they must be row-major. As a row and a column they are safe beyond 2**31 elements.

    The sum of two is the union of their entries; under ``jit``, where that has no static size, a :class:`jft.delta.Sum`.
    Products match entries, and read no others of the other delta. In files the coordinates are Elias-Fano coded
    (:mod:`jft.delta.elias_fano`).
    """

    rows: Array
    columns: Array
    values: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        # Equal shapes leave one member, whose length must be 1.
        lengths = {tuple(x.shape) for x in (self.rows, self.columns, self.values)}
        if not shape or len(lengths) != 1 or len(min(lengths)) != 1:
            raise ValueError(
                f"entries of a weight of shape {shape} need rows [n], columns [n] and values [n], not "
                f"{tuple(self.rows.shape)}, {tuple(self.columns.shape)} and {tuple(self.values.shape)}"
            )
        # Only rows and columns need fit int32; no program computes their product in one integer.
        if max(matrix(shape)) >= 2**31:
            raise ValueError(f"a weight of shape {shape} has {matrix(shape)} rows and columns; int32 counts to 2**31")
        rows, columns, values = self.rows, self.columns, self.values
        check_indices("rows and columns of entries", rows, columns)
        # `find`, unions and Elias-Fano coding rely on the order.
        order = row_major("entries", rows, columns, matrix(shape))
        if order is not None:
            rows, columns, values = (x[order] for x in (rows, columns, values))
        for name, value in (("rows", _int32(rows)), ("columns", _int32(columns)), ("values", values), ("shape", shape)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_dense(cls, delta: Array, support: Array | None = None) -> Entries:
        """The entries of ``delta`` where ``support`` (bool, of its shape) is true; by default where it is not zero.

        Exact, stored zeros included. Not under ``jit``, where their number is not known: ``ValueError``.
        """
        delta = jnp.asarray(delta)
        support = delta != 0 if support is None else support
        if tuple(support.shape) != tuple(delta.shape):
            raise ValueError(f"a support of shape {tuple(support.shape)} is none of a delta of shape {delta.shape}")
        if not visible(support):
            raise ValueError("the entries of a dense delta cannot be counted under jit; find them outside of it")
        index = np.nonzero(np.asarray(support).reshape(matrix(delta.shape)))
        rows, columns = (jnp.asarray(x, jnp.int32) for x in index)
        return cls(rows, columns, delta[entry_index(delta.shape, rows, columns)], delta.shape)

    @classmethod
    def of(cls, delta: Encoding) -> Entries:
        """``delta`` as entries: those it stores where it stores entries, blocks or slices; else those not zero."""
        if isinstance(delta, cls):
            return delta
        if isinstance(delta, Sum):
            # Part by part: the dense sum could lose entries that parts store and that cancel.
            return functools.reduce(operator.add, map(cls.of, delta.parts))
        coordinates = delta.coordinates()
        if coordinates is None:
            return cls.from_dense(delta.dense())
        # The constructor sorts what it can look at; under `jit` it relies on the order.
        rows, columns, values = coordinates if visible(*coordinates) else jax.lax.sort(coordinates, num_keys=2)
        return cls(rows, columns, values, delta.shape)

    @property
    def at(self) -> tuple:
        return entry_index(self.shape, self.rows, self.columns)

    def coordinates(self) -> tuple[Array, Array, Array]:
        return self.rows, self.columns, self.values

    def take(self, rows: Array, columns: Array) -> Array:
        return pick(jnp.asarray(self.values), find(rows, columns, self.rows, self.columns))

    def under(self, above: Encoding) -> Encoding:
        # A dense one stores a value everywhere, so nothing of this one remains.
        if isinstance(above, Dense):
            return above
        above = Entries.of(above)
        keys, values = overlaid(self.keys(), above.keys(), self.values, above.values)
        rows, columns = _split(keys, self.shape)
        return self._with(rows=rows, columns=columns, values=values)

    def stacked(self) -> Change:
        if len(self.shape) < 2 or not visible(self.rows, self.columns, self.values):
            return super().stacked()
        extent = self.shape[-2]
        matrix, row = np.divmod(host(self.rows).astype(np.int64), extent)
        part = np.stack([row, host(self.columns)], axis=-1)
        return stacked(EntryLayout(), matrix, part, host(self.values), self.shape, extent)

    def keys(self) -> np.ndarray:
        """``row * columns + column`` of every entry, int64, in this process's memory."""
        return host(self.rows).astype(np.int64) * self.shape[-1] + host(self.columns)

    def pack(self) -> tuple[dict[str, Array], dict[str, Any]]:
        # Arrays spread over processes are gathered for it: all processes must call.
        code = elias_fano.encode(self.keys(), math.prod(self.shape))
        static = {"shape": self.shape, "coding": elias_fano.NAME, "crc32": elias_fano.checksum(*code)}
        return {"low": code[0], "high": code[1], "values": self.values}, static  # type: ignore[dict-item]

    @classmethod
    def unpack(cls, tensors: Mapping[str, Any], static: Mapping[str, Any]) -> Entries:
        if set(tensors) != {"low", "high", "values"} or set(static) != {"shape", "coding", "crc32"}:
            raise ValueError(
                f"an entries delta has fields low, high, values, shape, coding, crc32, not {[*tensors, *static]}"
            )
        # Named in the file, so that another coding is refused rather than misread.
        if static["coding"] != elias_fano.NAME:
            raise ValueError(f"its indices are coded as {static['coding']!r}; this jft knows {elias_fano.NAME!r}")
        low, high, shape = np.asarray(tensors["low"]), np.asarray(tensors["high"]), tuple(static["shape"])
        if elias_fano.checksum(low, high) != static["crc32"]:
            raise ValueError("its coded indices have another checksum than when they were written")
        keys = elias_fano.decode(low, high, tensors["values"].shape[0], math.prod(shape))
        return cls(*_split(keys, shape), tensors["values"], shape)


def _int32(x: Any) -> Array:
    # Untouched where nothing is to be done: NumPy arrays stay on the host.
    return x if x.dtype == jnp.int32 else jnp.asarray(x, jnp.int32)


def _split(keys: np.ndarray, shape: tuple[int, ...]) -> tuple[Array, Array]:
    rows = keys // shape[-1]  # np.divmod takes twice the time
    columns = keys - rows * shape[-1]
    return jnp.asarray(rows.astype(np.int32)), jnp.asarray(columns.astype(np.int32))


@rule("+", Entries, Entries)
def _union(x: Entries, y: Entries) -> Entries | None:
    if not visible(x.rows, x.columns, y.rows, y.columns):
        return None
    keys, values = united(x.keys(), y.keys(), x.values, y.values)
    rows, columns = _split(keys, x.shape)
    return x._with(rows=rows, columns=columns, values=values)


@rule("dot", Entries, Entries)
def _dot(x: Entries, y: Entries) -> Array | None:
    if not visible(x.rows, x.columns, y.rows, y.columns):
        return None
    # Below, an index into no keys would fail.
    if not y.values.shape[0]:
        return jnp.float32(0)
    # A search for one int64 key takes a fifth of the time of `find`.
    keys, other_keys = x.keys(), y.keys()
    # Without the last key the search ends at it at the latest, so every position is one of `other_keys`.
    position = np.searchsorted(other_keys[:-1], keys)
    hit = np.flatnonzero(other_keys[position] == keys)
    return inner(x.values[hit], y.values[position[hit]])


@dataclasses.dataclass(frozen=True)
class EntryLayout(Layout):
    """Single entries in programs: ``at[*lead, gi, gj, k, 2]`` (row, column), values ``[*lead, gi, gj, k]``.

    A vector ``[*lead, D]`` has ``at[*lead, g, k, 1]`` and values ``[*lead, g, k]``. Matrix units cannot skip single entries, so
    the gradient of one layer's weight is formed and gathered where it arises; under a scan no other layer's exists with it.
    """

    def axes(self, at: Any) -> tuple[tuple, tuple]:
        # Where nothing is selected yet, the weight is taken for a matrix.
        cell = (ROWS, COLUMNS) if at is None or at.shape[-1] == 2 else (COLUMNS,)
        return (..., *cell, None, None), (..., *cell, None)

    def lead(self, at: Any) -> int:
        return len(at.shape) - 2 - at.shape[-1]

    def _grid(self, at: Any) -> tuple[int, ...]:
        return at.shape[-2 - at.shape[-1] : -2]

    # Its own program outside of others: a model has as many shapes of `at` as weights.
    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def gather(self, w: Array, at: Array) -> Array:
        def one(cell: Array, at: Array) -> Array:
            index = tuple(at[:, i] for i in range(at.shape[-1]))
            # Both promises hold with the padding: it comes last, at increasing coordinates past the end.
            return cell.at[index].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)

        return over_leading(one, at.ndim - 2)(cells(w, self._grid(at)), at)

    def put(self, w: Array, at: Array, values: Array) -> Array:
        values = values.astype(w.dtype)
        # With one layer the loop would save nothing.
        if self.lead(at) and w.shape[0] > 1:
            return jax.lax.platform_dependent(w, at, values, tpu=self._put_in_turn, default=self._put)
        return self._put(w, at, values)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def _put(self, w: Array, at: Array, values: Array) -> Array:
        def one(cell: Array, at: Array, values: Array) -> Array:
            index = tuple(at[:, i] for i in range(at.shape[-1]))
            return cell.at[index].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)

        return joined(over_leading(one, at.ndim - 2)(cells(w, self._grid(at)), at, values), at.shape[-1])

    def _put_in_turn(self, w: Array, at: Array, values: Array) -> Array:
        """As ``_put``, layer by layer: a TPU scatters single entries into a flat copy, which is then one of a layer."""

        def write(i: Array, w: Array) -> Array:
            layer = self._put(*(jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for x in (w, at, values)))
            return jax.lax.dynamic_update_index_in_dim(w, layer, i, 0)

        return jax.lax.fori_loop(0, w.shape[0], write, w)

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        return below(at[..., 0], shape[-at.shape[-1]] // self._grid(at)[0])

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Entries:
        n = at.shape[-1]
        lead, extent = shape[: len(shape) - n], shape[len(shape) - n :]
        grid = at.shape[len(lead) : len(lead) + n]
        index, valid = whole_coordinates(at, grid, [size // g for size, g in zip(extent, grid, strict=True)])
        *leading, columns = [*index[: len(lead)], *index[-n:]]
        rows = flat_index(shape[:-1], leading, valid.sum())
        # Cells follow one another; entries in files are row-major over the whole weight.
        order = np.lexsort((columns, rows))
        return Entries(
            jnp.asarray(rows[order], jnp.int32),
            jnp.asarray(columns[order], jnp.int32),
            jnp.asarray(values[valid][order]),
            shape,
        )

    def first(self, at: Array) -> Array:
        return at[..., 0]

    def slots(self, at: Any) -> int:
        return at.shape[-2]

    def pad(self, at: Array, most: int, shape: tuple[int, ...]) -> Array:
        return padded_coordinates(at, most, shape[-at.shape[-1]] // self._grid(at)[0])
