"""`Selected`: selected parts of a weight and their change, in the layout in which programs hold them.

A weight is ``[*lead, I, O]``; leading axes (layers, experts) are batch. The last two axes are cut into an even grid of
``gi x gj`` cells, so that a selection shards with its weight, cell by cell; on one device the grid is ``1 x 1``. ``at`` holds
int32 coordinates *inside the cell*, sorted, distinct, and padded at the end with coordinates beyond the cell, which gather
zero and are never written: layers and cells that select fewer parts than the fullest are padded up to it.

A :class:`Layout` says how ``at`` and the values lie for one kind of part. The layouts of entries, blocks, slices and
experts are in the files of the encoding that task vectors store them in, which has no padding and no cells.

:func:`locate` goes from a mask to coordinates in memory that grows with what is selected: the mask is packed into words of 32
bits, the words' counts are added up, and each selected entry finds its word and its bit. No cell looks at another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jft.delta.changed import Change, Matrices
from jft.delta.encoding import Encoding
from jft.delta.numeric import wide
from jft.kernels.blocks_forms import Axes
from jft.tree import visible

Array = jax.Array

# Bits of the widest integer that JAX has by default.
_WORD = 32
_ROUNDED = 1 << 20  # slots


class Layout:
    """How selected parts of a weight and their values lie in arrays; subclasses are frozen dataclasses."""

    matrices: Matrices | None = None  # those that values stack

    def axes(self, at: Any) -> tuple[tuple, tuple]:
        """Logical axes (see :class:`jft.delta.Leaf`) of ``at`` and of the values."""
        raise NotImplementedError

    def lead(self, at: Any) -> int:
        """How many leading axes ``at`` has."""
        raise NotImplementedError

    def on_mesh(self, axes: Axes) -> Layout:
        """The layout where the weight and its inputs are cut over ``axes`` of a mesh, if its products ask for that."""
        return self

    def gather(self, w: Array, at: Array) -> Array:
        """The selected values of ``w``; zeros at padding."""
        raise NotImplementedError

    def put(self, w: Array, at: Array, values: Array) -> Array:
        """``w`` with the selected parts replaced by ``values`` in its dtype, in place where ``w`` is donated."""
        raise NotImplementedError

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        """How many values are no padding, int32, of a weight of ``shape``."""
        raise NotImplementedError

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Encoding:
        """Values on the host as the encoding that stores them, of a weight of ``shape``."""
        raise NotImplementedError

    # Last but for layouts whose values have axes inside a part.
    slot: int = -1  # the axis of values that counts parts

    def pad(self, at: Array, most: int, shape: tuple[int, ...]) -> Array:
        """``at`` with ``most`` parts for each matrix; the new ones lie past the end of a weight of ``shape``."""
        raise NotImplementedError

    def first(self, at: Array) -> Array:
        """The first coordinate of every slot, ``[..., n]``; that of padding lies past the cell."""
        return at

    def slots(self, at: Any) -> int:
        """Parts for each matrix and cell, padding included."""
        return at.shape[-1]

    # What parts can do better than as a weight that is zero elsewhere; None where they cannot.

    def product(self, x: Array, at: Array, values: Array, shape: tuple[int, ...]) -> Array | None:
        """``x[..., I] @ d`` for the change ``d`` of one matrix of ``shape``."""
        return None

    def grouped_product(self, x: Array, at: Array, values: Array, sizes: Array) -> Array | None:
        return None

    def expert_product(self, x: Array, at: Array, values: Array, shape: tuple[int, ...]) -> Array | None:
        return None

    def rows(self, ids: Array, at: Array, values: Array, shape: tuple[int, ...]) -> Array | None:
        return None

    def transposed(self, at: Array, values: Array) -> tuple[Layout, Array, Array] | None:
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected(Change):
    """The parts ``at`` of a weight change by ``values``, as ``layout`` says; all else stays.

    shape: that of one weight, without leading axes.
    """

    at: Array
    values: Array
    layout: Layout = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    factors = ("values",)

    def whole(self, dtype: Any) -> Array:
        lead = self.at.shape[: self.layout.lead(self.at)]
        # Padding is dropped, so zeros are all that it leaves.
        return self.layout.put(jnp.zeros((*lead, *self.shape), dtype), self.at, self.values)

    def product(self, x: Array) -> Array | None:
        # Layouts take rows in one axis, whatever leading axes x has.
        product = self.layout.product(x.reshape(-1, x.shape[-1]), self.at, self.values, self.shape)
        return None if product is None else product.astype(x.dtype).reshape(*x.shape[:-1], -1)

    def grouped_product(self, x: Array, sizes: Array) -> Array | None:
        return self.layout.grouped_product(x, self.at, self.values, sizes)

    def expert_product(self, x: Array) -> Array | None:
        if self.layout.lead(self.at):  # every matrix has a selection of its own
            return super().expert_product(x)
        return self.layout.expert_product(x, self.at, self.values, self.shape)

    def rows(self, ids: Array) -> Array | None:
        return self.layout.rows(ids, self.at, self.values, self.shape)

    def transposed(self) -> Selected | None:
        transpose = self.layout.transposed(self.at, self.values)
        if transpose is None:
            return None
        layout, at, values = transpose
        return Selected(at, values, layout, self.shape[::-1])

    def apply_to(self, w: Array) -> Array:
        # A float32 copy of the selected values, not of the weight.
        values = wide(self.layout.gather(w, self.at)) + self.values
        return self.layout.put(w, self.at, values)

    def padded(self, most: int) -> Selected:
        """The same with ``most`` parts for each matrix."""
        # Without padding to add, nothing is traced.
        if most == self.slots:
            return self
        at = self.layout.pad(self.at, most, self.shape)
        return self.replace(at=at, values=pad_axis(self.values, self.layout.slot, most))

    @property
    def slots(self) -> int:
        """Parts for each matrix and cell, padding included."""
        return self.layout.slots(self.at)


def stacked(layout: Layout, matrix: Any, part: Any, values: Any, shape: tuple[int, ...], extent: int) -> Selected:
    """Parts ``part[n, axes]`` of matrices ``matrix[n]`` of a weight of ``shape``, in one cell; arrays on the host.

    Matrices that hold fewer parts than others are padded, with first coordinates of ``extent`` and more. The inverse of
    :meth:`Layout.encode`, up to the order of axes that a layout may give its values.
    """
    *lead, rows, columns = shape
    # Stable: parts of one matrix stay sorted.
    order = np.argsort(matrix, kind="stable")
    matrix, part, values = matrix[order], part[order], values[order]
    counts = np.bincount(matrix, minlength=math.prod(lead))
    # At least one slot: arrays of no size cannot be saved.
    most = max(int(counts.max(initial=0)), 1)
    # The place of a part among those of its matrix.
    slot = np.arange(len(matrix)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.zeros((len(counts), most, part.shape[1]), np.int32)
    # Every slot is padding first, at a coordinate of its own: scatters are promised unique indices.
    at[..., 0] = extent + np.arange(most)
    at[matrix, slot] = part
    full = np.zeros((len(counts), most, *values.shape[1:]), values.dtype)
    full[matrix, slot] = values
    cell = (1,) * part.shape[1]
    at, full = at.reshape(*lead, *cell, *at.shape[1:]), full.reshape(*lead, *cell, *full.shape[1:])
    return Selected(jnp.asarray(at), jnp.asarray(full), layout, (rows, columns))


def padded_coordinates(at: Array, most: int, extent: int) -> Array:
    """``at[..., n, axes]`` with ``most`` slots, the new ones at first coordinates of ``extent`` and more."""
    slots = at.shape[-2]
    widths = [(0, 0)] * (at.ndim - 2) + [(0, most - slots), (0, 0)]
    # Distinct and increasing, as gathers and scatters are promised.
    first = jnp.where(jnp.arange(most) < slots, 0, extent + jnp.arange(most, dtype=at.dtype))
    return jnp.pad(at, widths).at[..., 0].add(first.astype(at.dtype))


def pad_axis(values: Array, axis: int, most: int) -> Array:
    """``values`` with zeros at the end of one axis, which has ``most`` then."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, most - values.shape[axis])
    return jnp.pad(values, widths)


def below(at: Array, extent: int) -> Array:
    """How many coordinates are no padding, int32."""
    return jnp.sum(at < extent, dtype=jnp.int32)


def whole_coordinates(at: np.ndarray, grid: tuple[int, ...], extent: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Leading and whole coordinates of all that is not padding, and the mask of it in the values.

    at ``[*lead, *grid, n, axes]``; extent: that of a cell in parts, along each axis.
    """
    axes = at.shape[-1]
    valid = np.all(at < np.asarray(extent), axis=-1)
    where = np.nonzero(valid)
    lead, cell = where[: len(where) - 1 - axes], where[len(where) - 1 - axes : -1]
    inside = at[valid]
    return [*lead, *(c * size + inside[:, i] for i, (c, size) in enumerate(zip(cell, extent, strict=True)))], valid


def flat_index(extents: tuple[int, ...], index: list[np.ndarray], count: int) -> np.ndarray:
    """Indices along several axes as one along all of them, int64 ``[count]``."""
    # int64, since a weight may have more than 2**31 parts; `count` where there are no axes to tell it.
    flat = np.zeros(count, np.int64)
    for size, axis in zip(extents, index, strict=True):
        flat = flat * size + axis
    return flat


def cells(w: Array, grid: tuple[int, ...]) -> Array:
    """``[*lead, I, O]`` as ``[*lead, gi, gj, I/gi, O/gj]`` (``[*lead, D]`` as ``[*lead, g, D/g]`` for a grid of one axis).

    Raises ``ValueError`` where an axis does not divide.
    """
    n = len(grid)
    lead, last = w.shape[: w.ndim - n], w.shape[w.ndim - n :]
    if any(size % g for size, g in zip(last, grid, strict=True)):
        raise ValueError(f"a weight of shape {w.shape} does not divide into a grid of {grid} cells")
    # A reshape alone: the transpose would only move axes of one.
    if all(g == 1 for g in grid):
        return w.reshape(*lead, *grid, *last)
    shape = [part for size, g in zip(last, grid, strict=True) for part in (g, size // g)]
    order = [2 * i for i in range(n)] + [2 * i + 1 for i in range(n)]
    whole = tuple(range(len(lead)))
    return w.reshape(*lead, *shape).transpose(*whole, *(len(lead) + i for i in order))


def joined(parts: Array, axes: int) -> Array:
    """The inverse of :func:`cells` for a grid of ``axes`` axes."""
    lead = parts.ndim - 2 * axes
    grid, last = parts.shape[lead : lead + axes], parts.shape[lead + axes :]
    sizes = [g * size for g, size in zip(grid, last, strict=True)]
    if all(g == 1 for g in grid):
        return parts.reshape(*parts.shape[:lead], *sizes)
    order = [lead + i + axes * part for i in range(axes) for part in (0, 1)]
    return parts.transpose(*range(lead), *order).reshape(*parts.shape[:lead], *sizes)


def over_leading(fn: Callable[..., Array], depth: int) -> Callable[..., Array]:
    """``fn`` over ``depth`` shared leading axes of all its arguments."""
    for _ in range(depth):
        fn = jax.vmap(fn)
    return fn


def locate(mask: Array, grid: tuple[int, ...], capacity: int | None) -> Array:
    """Coordinates int32 ``[*lead, *grid, capacity, n]`` of the True entries of ``mask[*lead, *n axes]`` in each cell.

    Row-major, local to the cell, padded with the first coordinate at ``extent + slot`` and 0 for the others. Without a
    capacity it is the largest count of all cells, which needs a mask that can be looked at.
    """
    _check(mask, grid)
    is_traced = isinstance(mask, jax.core.Tracer)
    if is_traced:
        if capacity is None:
            raise ValueError("under jit how many parts a cell selects is not known; give locate a capacity")
        # Inside the caller's program, which decides on the sharding.
        return _locate(mask, grid, capacity)
    most = int(_most(mask, grid))
    if capacity is not None and most > capacity:
        raise ValueError(f"a cell selects {most} parts, more than the capacity of {capacity}")
    # At least one slot, if of padding: arrays of no size cannot be saved.
    slots = max(most, 1) if capacity is None else capacity
    # Every selection has a count of its own; few of them are compiled for, and the padding is cut off.
    compiled = _rounded_up(slots)
    at = _locate_jit(mask, grid, compiled)
    return _with_sharding(at if compiled == slots else _first_slots(at, slots), mask, grid)


def _rounded_up(slots: int) -> int:
    """The next number of three leading bits, a quarter more at most; of many slots, whose memory counts, the number itself."""
    step = 1 << max(0, slots.bit_length() - 3)
    return -(-slots // step) * step if slots <= _ROUNDED else slots


@functools.partial(jax.jit, static_argnums=1)
def _first_slots(at: Array, slots: int) -> Array:
    return at[..., :slots, :]


def mask_at(at: Array, extents: tuple[int, ...], lead: int) -> Array:
    """The inverse of :func:`locate`: a mask ``[*lead, *extents]``; coordinates beyond a cell count for nothing."""
    n = at.shape[-1]
    grid = at.shape[lead : lead + n]
    inside = tuple(size // g for size, g in zip(extents, grid, strict=True))

    def one(at: Array) -> Array:
        index = tuple(at[:, i] for i in range(n))
        # One cell at a time, as `locate` does: no cell writes into another.
        empty = jnp.zeros(inside, bool)
        return empty.at[index].set(True, mode="drop", unique_indices=True, indices_are_sorted=True)

    return joined(over_leading(one, lead + n)(at), n)


def _check(mask: Array, grid: tuple[int, ...]) -> None:
    extents = mask.shape[mask.ndim - len(grid) :]
    if any(g < 1 or size % g for size, g in zip(extents, grid, strict=True)):
        raise ValueError(f"{' x '.join(map(str, extents))} parts do not divide into a grid of {grid} cells")
    inside = [size // g for size, g in zip(extents, grid, strict=True)]
    # Words of a cell are indexed in int32; entries need not be.
    if functools.reduce(int.__mul__, inside[:-1], -(-inside[-1] // _WORD)) >= 2**31:
        raise ValueError(f"a cell of {' x '.join(map(str, inside))} parts is too large; cut the weight in more cells")


@functools.partial(jax.jit, static_argnums=1)
def _most(mask: Array, grid: tuple[int, ...]) -> Array:
    n = len(grid)
    words = _words(cells(mask, grid))
    counts = jax.lax.population_count(words)
    # `initial`, for weights of no layers.
    return jnp.max(jnp.sum(counts, axis=tuple(range(counts.ndim - n, counts.ndim)), dtype=jnp.uint32), initial=0)


def _words(mask: Array) -> Array:
    """Bool ``[..., n]`` as uint32 ``[..., ceil(n / 32)]``, the first entry in the lowest bit."""
    padding = -mask.shape[-1] % _WORD
    if padding:
        mask = lax.pad(mask, False, [(0, 0, 0)] * (mask.ndim - 1) + [(0, padding, 0)])
    fours = mask.astype(jnp.uint8).reshape(*mask.shape[:-1], -1, _WORD // 4, 4)
    # A product moves the lowest bits of four bytes to bits 24 to 27; none of its sixteen terms meets another.
    nibbles = (lax.bitcast_convert_type(fours, jnp.uint32) * np.uint32(0x01020408) >> 24) & 15
    return lax.reduce_or(nibbles << np.arange(0, _WORD, 4, dtype=np.uint32), axes=(nibbles.ndim - 1,))


def _locate(mask: Array, grid: tuple[int, ...], capacity: int) -> Array:
    n = len(grid)
    parts = cells(mask, grid)
    return over_leading(functools.partial(_coordinates, capacity=capacity), parts.ndim - n)(parts)


_locate_jit = jax.jit(_locate, static_argnums=(1, 2))


def _coordinates(mask: Array, capacity: int) -> Array:
    """Coordinates ``[capacity, ndim]`` of the True entries of one cell."""
    words = _words(mask)
    words_per_row = words.shape[-1]
    words = words.reshape(-1)
    counts = jax.lax.population_count(words).astype(jnp.int32)
    ends = lax.cumsum(counts)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    # The word of slot j is the number of words that end at j or before; one bin more is for those past the last slot.
    word_ends = jnp.zeros(capacity + 1, jnp.int32).at[jnp.minimum(ends, capacity)].add(1, indices_are_sorted=True)
    # Slots of padding have no word; they read the last one and are replaced below.
    word = jnp.minimum(lax.cumsum(word_ends[:capacity]), words.size - 1)
    rank = slot - (ends[word] - counts[word])
    column = word % words_per_row * _WORD + _bit(words[word], rank)
    valid = slot < ends[-1]
    coordinates = [word // words_per_row, column] if mask.ndim == 2 else [column]
    first = jnp.where(valid, coordinates[0], mask.shape[0] + slot)
    return jnp.stack([first, *(jnp.where(valid, c, 0) for c in coordinates[1:])], axis=-1)


def _bit(word: Array, rank: Array) -> Array:
    """The position of the set bit of ``word`` that has ``rank`` set bits below it."""
    position = lax.full_like(rank, 0)
    for half in (16, 8, 4, 2, 1):
        low = lax.population_count(word & np.uint32((1 << half) - 1)).astype(jnp.int32)
        above = rank >= low
        rank = lax.select(above, rank - low, rank)
        position = lax.select(above, position + half, position)
        word = lax.select(above, word >> half, word)
    return position


def _with_sharding(at: Array, mask: Array, grid: tuple[int, ...]) -> Array:
    """``at`` with the sharding of its mask, as far as the grid follows it."""
    sharding: Any = mask.sharding
    if not isinstance(sharding, NamedSharding):
        return at
    lead = mask.ndim - len(grid)
    spec = [*sharding.spec, *(None,) * (mask.ndim - len(sharding.spec))]
    for i, g in enumerate(grid, start=lead):
        names = (spec[i],) if isinstance(spec[i], str) else spec[i] or ()
        shards = functools.reduce(int.__mul__, [sharding.mesh.shape[name] for name in names], 1)
        # A grid coarser than the mesh leaves cells that span devices, which cannot be sharded along it.
        spec[i] = spec[i] if g % shards == 0 else None
    target = NamedSharding(sharding.mesh, PartitionSpec(*spec, None, None))
    return at if at.sharding.is_equivalent_to(target, at.ndim) else jax.device_put(at, target)


def check_indices(what: str, *indices: Any) -> None:
    """``ValueError`` for indices that are no integers: fractions would be cut off, and a mask is none."""
    for x in indices:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{what} must be integers, not {x.dtype}")


def row_major(what: str, rows: Array, columns: Array, extents: tuple[int, int]) -> np.ndarray | None:
    """The permutation that puts coordinates in row-major order; None where they are, or cannot be looked at.

    Raises ``ValueError`` where one is outside ``extents`` or occurs twice.
    """
    if not visible(rows, columns) or not rows.size:
        return None
    r, c = np.asarray(rows), np.asarray(columns)
    for axis, x, extent in (("row", r, extents[0]), ("column", c, extents[1])):
        if x.min() < 0 or x.max() >= extent:
            raise ValueError(f"{what} {axis}s {x.min()}..{x.max()} leave the {extent} {axis}s there are")
    # Most come in order, and to see that takes less than to sort.
    if _increasing(r, c):
        return None
    # `lexsort` sorts by its last key first.
    order = np.lexsort((c, r))
    if not _increasing(r[order], c[order]):
        raise ValueError(f"the coordinates of {what} must be distinct; add the values that belong together first")
    return order


def _increasing(r: np.ndarray, c: np.ndarray) -> bool:
    return bool(((r[1:] > r[:-1]) | ((r[1:] == r[:-1]) & (c[1:] > c[:-1]))).all())
