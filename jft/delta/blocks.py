"""`Blocks`: a delta that is zero but for some blocks of its matrices."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta.changed import COLUMNS, ROWS, Change, Matrices
from jft.delta.encoding import Encoding, unravel
from jft.delta.entries import Entries
from jft.delta.low_rank import LowRank
from jft.delta.numeric import inner, matmul
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
from jft.delta.sparse import Sparse, find, pick, united
from jft.kernels.blocks import cell_spmm, stack_put
from jft.kernels.blocks_forms import NO_AXES, Axes, gather_xla, on_devices, put_xla, spread_names
from jft.tree import host, visible

Array = jax.Array


@register("blocks", data=("indices", "values"), static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Sparse):
    """Block ``[i, j]`` of matrix ``m`` is ``values[k]`` for each ``(m, i, j) = indices[k]``, and zero if there is none.

    indices int32 ``[n, 3]``, distinct: matrix (leading axes flattened), block row, block column; values ``[n, b, c]``,
    where b divides the rows I and c the columns O of a matrix. A vector is one row. In any order where they can be
    looked at, and then checked and kept row-major; elsewhere (under ``jit``) they must be row-major.

    The sum of two with equal blocks is the union of them; under ``jit``, or of different blocks, a :class:`jft.delta.Sum`.
    """

    indices: Array
    values: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property

    def __post_init__(self) -> None:
        # A file gives the shape as a list; static fields must hash.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        n, values = tuple(self.indices.shape), tuple(self.values.shape)
        if not self.shape or len(values) != 3 or n != (values[0], 3):
            raise ValueError(
                f"blocks of a weight of shape {self.shape} need indices [n, 3] and values [n, b, c], not {n} and {values}"
            )
        *lead, i, o = _matrices(self.shape)
        b, c = values[1:]
        if not (b and c) or i % b or o % c:
            raise ValueError(f"blocks of {b} x {c} do not divide matrices of {i} x {o}")
        check_indices("indices of blocks", self.indices)
        # Before the grid below, in which a block row past the end of its matrix would be one of the next matrix.
        if visible(self.indices) and n[0]:
            m, row = (np.asarray(self.indices)[:, axis] for axis in (0, 1))
            for what, x, extent in (("matrices", m, math.prod(lead)), ("rows", row, i // b)):
                if x.min() < 0 or x.max() >= extent:
                    raise ValueError(f"block {what} {x.min()}..{x.max()} leave the {extent} there are")
            # `find` and the sums of two rely on the order.
            order = row_major("block", *self.grid(np.asarray(self.indices)), (math.prod(lead) * (i // b), o // c))
            if order is not None:
                object.__setattr__(self, "indices", self.indices[order])
                object.__setattr__(self, "values", self.values[order])
        # Only now, when they are known to fit.
        if self.indices.dtype != jnp.int32:
            object.__setattr__(self, "indices", jnp.asarray(self.indices, jnp.int32))

    @classmethod
    def of(cls, delta: Encoding, block: tuple[int, int]) -> Blocks:
        """``delta`` in blocks of ``block = (b, c)``: all that hold an entry it stores (:meth:`jft.delta.Entries.of`)."""
        rows, columns, values = Entries.of(delta).coordinates()
        b, c = block
        *_, i, o = _matrices(delta.shape)
        if min(b, c) < 1 or i % b or o % c:
            raise ValueError(f"blocks of {b} x {c} do not divide matrices of {i} x {o}")
        r, k = np.asarray(rows), np.asarray(columns)
        # int64: a weight may have more than 2**31 blocks.
        entry_keys = (r // b).astype(np.int64) * (o // c) + k // c
        keys, position = np.unique(entry_keys, return_inverse=True)
        row, column = np.divmod(keys, o // c)
        # Entries are distinct, so no two are at one position of a block.
        blocks = jnp.zeros((len(keys), b, c), values.dtype).at[position, r % b, k % c].set(values, unique_indices=True)
        indices = np.stack([row // (i // b), row % (i // b), column], axis=-1).astype(np.int32)
        return cls(jnp.asarray(indices), blocks, delta.shape)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        _, b, c = self.values.shape
        return b, c

    @property
    def view(self) -> tuple[int, ...]:
        *lead, i, o = _matrices(self.shape)
        b, c = self.block
        # Blocks as axes of their own: one index names a whole block, and no entry needs coordinates.
        return (*lead, i // b, b, o // c, c)

    @property
    def at(self) -> tuple:
        every = slice(None)
        # With slices between the indices NumPy's rule puts the indexed axis first: [n, b, c], as the values have it.
        return (*unravel(self.indices[:, 0], self.view[:-4]), self.indices[:, 1], every, self.indices[:, 2], every)

    def grid(self, indices: Any) -> tuple[Any, Any]:
        """Row and column of blocks in the weight as one matrix of blocks."""
        return indices[:, 0] * self.view[-4] + indices[:, 1], indices[:, 2]

    def coordinates(self) -> tuple[Array, Array, Array]:
        b, c = self.block
        row, column = (x[:, None, None] for x in self.grid(jnp.asarray(self.indices)))
        flat = lambda x: jnp.broadcast_to(x, self.values.shape).reshape(-1)
        rows, columns = row * b + jnp.arange(b, dtype=jnp.int32)[:, None], column * c + jnp.arange(c, dtype=jnp.int32)
        return flat(rows), flat(columns), jnp.asarray(self.values).reshape(-1)

    def stacked(self) -> Change:
        # Layouts in programs are of matrices; a vector is held whole.
        if len(self.shape) < 2 or not visible(self.indices, self.values):
            return super().stacked()
        indices, (b, c) = host(self.indices), self.block
        layout, extent = BlockLayout(b, c), self.shape[-2] // b
        return stacked(layout, indices[:, 0], indices[:, 1:], host(self.values), self.shape, extent)

    def take(self, rows: Array, columns: Array) -> Array:
        b, c = self.block
        position = find(rows // b, columns // c, *self.grid(jnp.asarray(self.indices)))
        return pick(jnp.asarray(self.values), position, rows % b, columns % c)


def _matrices(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) > 1 else (1, *shape)


@rule("+", Blocks, Blocks)
def _union(x: Blocks, y: Blocks) -> Blocks | None:
    # Blocks of another size would have to be cut; without values their union has no known size.
    if x.block != y.block or not visible(x.indices, y.indices):
        return None
    height, width = x.view[-4], x.view[-2]

    def keys(of: Blocks) -> np.ndarray:
        row, column = of.grid(np.asarray(of.indices))
        return row.astype(np.int64) * width + column

    union, values = united(keys(x), keys(y), x.values, y.values)
    # The keys count through the weight as one matrix; indices have the matrix apart.
    row, column = np.divmod(union, width)
    indices = np.stack([row // height, row % height, column], axis=-1)
    return x._with(indices=jnp.asarray(indices, jnp.int32), values=values)


@rule("dot", Blocks, Blocks)
def _dot(x: Blocks, y: Blocks) -> Array | None:
    if x.block != y.block:
        return None
    # Sizes are static, so this works under `jit` too; a block that y lacks picks zeros.
    position = find(*x.grid(jnp.asarray(x.indices)), *y.grid(jnp.asarray(y.indices)))
    return inner(x.values, pick(jnp.asarray(y.values), position))


@rule("dot", Blocks, LowRank)
def _blocks_of_product(x: Blocks, y: LowRank) -> Array:
    (b, c), (*lead, height, _, width, _), rank = x.block, x.view, y.rank
    m, i, j = x.indices[:, 0], x.indices[:, 1], x.indices[:, 2]
    matrix = unravel(m, tuple(lead))
    left = jnp.asarray(y.a).reshape(*lead, height, b, rank)[(*matrix, i)]
    right = jnp.swapaxes(jnp.asarray(y.b).reshape(*lead, rank, width, c), -3, -2)[(*matrix, j)]
    # sum(V * (L R)) = sum((V R^T) * L): no block of the product is formed.
    return inner(matmul(x.values, jnp.swapaxes(right, -1, -2)), left)


@dataclasses.dataclass(frozen=True)
class BlockLayout(Layout):
    """Blocks of ``height x width`` in programs: ``at[*lead, gi, gj, n, 2]`` in blocks, values ``[*lead, gi, gj, n, b, c]``.

    mesh_axes: over which the weight and its inputs are cut.
    """

    height: int
    width: int
    mesh_axes: Axes = NO_AXES
    matrices = Matrices()
    slot = -3

    def axes(self, at: Any) -> tuple[tuple, tuple]:
        return (..., ROWS, COLUMNS, None, None), (..., ROWS, COLUMNS, None, None, None)

    def lead(self, at: Any) -> int:
        return len(at.shape) - 4

    def on_mesh(self, axes: Axes) -> BlockLayout:
        return dataclasses.replace(self, mesh_axes=axes)

    def gather(self, w: Array, at: Array) -> Array:
        one = functools.partial(gather_xla, block=(self.height, self.width))
        return over_leading(one, at.ndim - 2)(cells(w, at.shape[-4:-2]), at)

    def put(self, w: Array, at: Array, values: Array) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or not spread_names(mesh):
            return _put(w, at, values)
        spec = self.mesh_axes.weight(mesh, at.shape)
        # A Pallas kernel outside `shard_map` would have all of w gathered on every device.
        put = _put_cells if spec is None else on_devices(_put, mesh, (spec, spec, spec), spec)
        return put(w, at, values)

    def product(self, x: Array, at: Array, values: Array, shape: tuple[int, ...]) -> Array:
        return cell_spmm(x, at, values, shape[-1], self.mesh_axes)

    def transposed(self, at: Array, values: Array) -> tuple[Layout, Array, Array]:
        # No longer row-major, and padding is beyond the cell in the second coordinate: the product takes both.
        values = jnp.swapaxes(jnp.swapaxes(values, -5, -4), -2, -1)
        layout = BlockLayout(self.width, self.height, self.mesh_axes.transposed())
        return layout, jnp.swapaxes(at, -4, -3)[..., ::-1], values

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        return below(at[..., 0], shape[-2] // self.height // at.shape[-4]) * (self.height * self.width)

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Blocks:
        lead, grid = shape[:-2], at.shape[-4:-2]
        blocks_per_cell = [shape[-2] // self.height // grid[0], shape[-1] // self.width // grid[1]]
        index, valid = whole_coordinates(at, grid, blocks_per_cell)
        matrix = flat_index(lead, index[: len(lead)], valid.sum())
        indices = np.stack([matrix, *index[-2:]], axis=-1)
        # Cells follow one another; blocks in files are row-major over the whole weight.
        order = np.lexsort((indices[:, 2], indices[:, 1], indices[:, 0]))
        return Blocks(jnp.asarray(indices[order], jnp.int32), jnp.asarray(values[valid][order]), shape)

    def first(self, at: Array) -> Array:
        return at[..., 0]

    def slots(self, at: Any) -> int:
        return at.shape[-2]

    def pad(self, at: Array, most: int, shape: tuple[int, ...]) -> Array:
        return padded_coordinates(at, most, shape[-2] // self.height // at.shape[-4])


def _put(w: Array, at: Array, values: Array) -> Array:
    """:meth:`BlockLayout.put` on one device."""
    if at.shape[-4:-2] != (1, 1):
        return _put_cells(w, at, values)
    stack = lambda x, ndim: x.reshape(-1, *x.shape[x.ndim - ndim :])
    return stack_put(stack(w, 2), stack(at[..., 0, 0, :, :], 2), stack(values[..., 0, 0, :, :, :], 3)).reshape(w.shape)


def _put_cells(w: Array, at: Array, values: Array) -> Array:
    return joined(over_leading(put_xla, at.ndim - 2)(cells(w, at.shape[-4:-2]), at, values), 2)
