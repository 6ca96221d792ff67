"""`Granularity`: the unit of selection, from single entries to whole layers.

A weight is ``[*lead, I, O]`` (or a vector ``[*lead, D]``); the first ``lead`` axes, layers and experts, are batch. A
granularity pools a score like the weight into one number per unit, expands a mask of units to one of entries, and turns a
mask of units into ``at``, the int32 coordinates of :mod:`jft.delta.selected`: the last axes are cut into an even grid of
cells, coordinates are local to their cell, sorted row-major and padded at the end with distinct ones beyond the cell.

=================  ============================  =============================================
granularity        mask of units                 ``at``
=================  ============================  =============================================
`Entry`            ``[*lead, I, O]``             ``[*lead, gi, gj, k, 2]``
`Entry`, vectors   ``[*lead, D]``                ``[*lead, g, k, 1]``
`Block`            ``[*lead, I/rows, O/columns]``  ``[*lead, gi, gj, n, 2]``, in blocks
`Row`, `Column`    ``[*lead, I]``, ``[*lead, O]``  ``[*lead, g, r]``
`Channel`          as rows or columns            ``[*lead, g, r]``
`Head`             ``[*lead, count]``            ``[*lead, g, r]``, in rows or columns
`Expert`           ``[L, E]``                    ``[L, e]``
`Matrix`           ``[*lead]``                   none: a weight is in or out as a whole
`Layer`            ``[L]``                       none
`Name`             ``[]``                        none
=================  ============================  =============================================
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta import BlockLayout, EntryLayout, ExpertLayout, Layout, SliceLayout
from jft.delta.changed import COLUMNS, ROWS
from jft.delta.selected import locate, mask_at

Array = jax.Array
How = Literal["sum", "mean", "max", "l2", "abs_mean", "mean_abs"]
Axis = Literal["rows", "columns"]

POOLS = {
    "sum": lambda x, axes: jnp.sum(x, axes),
    "mean": lambda x, axes: jnp.mean(x, axes),
    "max": lambda x, axes: jnp.max(x, axes),
    "l2": lambda x, axes: jnp.sqrt(jnp.sum(jnp.square(x), axes)),
    "abs_mean": lambda x, axes: jnp.mean(jnp.abs(x), axes),
    "mean_abs": lambda x, axes: jnp.abs(jnp.mean(x, axes)),
}


class Granularity:
    """The unit of selection. ``axes``: how many axes after the leading ones a weight must have to be cut into it."""

    axes: ClassVar[int] = 0

    @property
    def layout(self) -> Layout | None:
        """The arrays of selected parts and their values; None where weights are selected as a whole."""
        return None

    @property
    def whole(self) -> bool:
        """Whether weights, or all of a layer, are in or out as a whole."""
        # A layout is of parts inside a weight: without one, weights are selected whole.
        return self.layout is None

    def fitted(self, shape: tuple[int, ...], grid: tuple[int, ...] = (1, 1)) -> Granularity:
        """The unit with its extents for a weight of ``shape`` cut into ``grid`` cells, where it leaves them open."""
        return self

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        """For each axis of ``shape`` into how many units it is cut; None where one unit spans it."""
        # A mistake of a new granularity, not of the weight it is asked about.
        raise TypeError(f"{type(self).__name__} does not say how it cuts a weight")

    def units(self, shape: Any, lead: int) -> tuple[int, ...]:
        """The shape of the mask of units of a weight of ``shape`` (anything with a shape, or one).

        Raises ``ValueError`` where a weight of that shape is not made of such units.
        """
        return tuple(n for n in self._cuts(shape, lead) if n is not None)

    def _cuts(self, shape: Any, lead: int) -> tuple[int | None, ...]:
        shape = shape_of(shape)
        if not 0 <= lead <= len(shape) - self.axes:
            raise ValueError(
                f"{self} selects inside weights of at least {self.axes} axes after the leading ones; "
                f"shape {shape} with {lead} leading axes has {len(shape) - lead}"
            )
        counts = self._cut(shape, lead)
        for axis, n in enumerate(counts):
            if n is not None and (n < 1 or shape[axis] % n):
                raise ValueError(f"axis {axis} of shape {shape} does not divide into {n} units of {self}")
        return counts

    def pool(self, score: Array, lead: int, how: How = "sum") -> Array:
        """Scores of units, float32: the sum, mean, max, root of the summed squares, mean size, or size of the mean, inside.

        The last two are ``abs_mean``, ``mean |s|``, and ``mean_abs``, ``|mean s|``: SMT's code names them by which comes
        first in ``x.mean().abs()``. Sums are in float32, in the order XLA adds: over an axis that is sharded their last bit
        may depend on the mesh.
        """
        if how not in POOLS:
            raise ValueError(f"pool {how!r} is unknown; choose one of {', '.join(POOLS)}")
        counts = self._cuts(score, lead)
        shape: list[int] = []
        inside: list[int] = []
        # Each axis becomes an axis of units and one inside them: a single reshape, which moves no value.
        for n, size in zip(counts, score.shape, strict=True):
            if n is None:
                inside.append(len(shape))
                shape.append(size)
            else:
                shape.append(n)
                # Units of one entry need no axis inside.
                if n < size:
                    inside.append(len(shape))
                    shape.append(size // n)
        # Sums of many bfloat16 scores would lose the small ones.
        return POOLS[how](score.astype(jnp.float32).reshape(shape), tuple(inside))

    def expand(self, mask: Array, shape: Any, lead: int) -> Array:
        """A mask of entries, bool ``shape``, from a mask of units."""
        shape = shape_of(shape)
        counts = self._cuts(shape, lead)
        expected = tuple(n for n in counts if n is not None)
        if tuple(mask.shape) != expected:
            raise ValueError(f"a mask of {self} of a weight of shape {shape} has shape {expected}, not {mask.shape}")
        # Two axes for each of the weight's: units, and entries of one, which broadcast.
        unit_shape, entry_shape = [], []
        for n, size in zip(counts, shape, strict=True):
            unit_shape += [1, 1] if n is None else [n, 1]
            entry_shape += [1, size] if n is None else [n, size // n]
        return jnp.broadcast_to(mask.astype(bool).reshape(unit_shape), entry_shape).reshape(shape)

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        """``at`` (see above) of a mask of units, for a weight whose last two axes are cut into ``grid`` cells.

        Rows go by the first number of the grid, columns and vectors by the last. capacity: slots for each cell; None for
        as many as the fullest needs, which is looked up on the host; under ``jit`` it must be given, and a cell that
        selects more keeps its first. Each cell is computed on its device.

        Raises ``ValueError`` where the grid does not divide the units, or a cell selects more than the capacity.
        """
        raise ValueError(f"{self} selects whole weights, which have no places inside; use its mask, or expand it")

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        """The mask of units that :meth:`locate` made into ``at``, for a weight of ``shape``."""
        raise ValueError(f"{self} selects whole weights, which have no places inside")

    def counts(self, at: Array, extent: int) -> Array:
        """How many of the slots of each cell are no padding, int32; ``extent``: that of a cell along the first coordinate."""
        # Padding is past the end in its first coordinate.
        return jnp.sum(self._first(at) < extent, axis=-1, dtype=jnp.int32)

    def _first(self, at: Array) -> Array:
        """The first coordinate of every slot."""
        if self.layout is None:
            raise ValueError(f"{self} selects whole weights, which have no places inside")
        return self.layout.first(at)

    def padding(self, at: Array, shape: Any) -> float:
        """The fraction of slots that are padding, in ``[0, 1]``: the cost of cells and layers that select fewer."""
        # Only the shape is needed: an `at` may be spread over processes.
        slots = jax.eval_shape(self._first, at).shape
        if not math.prod(slots):
            return 0.0
        # int64 on the host: all layers together may have more than 2**31 slots.
        count = np.asarray(jax.device_get(self.counts(at, self._extent(at, shape_of(shape)))), np.int64).sum()
        return 1.0 - float(count) / math.prod(slots)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        raise ValueError(f"{self} selects whole weights, which have no places inside")


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of an array, or a shape as a tuple."""
    return tuple(x.shape) if hasattr(x, "shape") else tuple(x)


def _grid(grid: tuple[int, ...], axes: int) -> tuple[int, ...]:
    if len(grid) < axes:
        raise ValueError(f"a grid of {len(grid)} axes does not cut {axes}; give (rows, columns)")
    return tuple(grid[len(grid) - axes :])


@dataclasses.dataclass(frozen=True)
class Entry(Granularity):
    """Single weights, of matrices and of vectors."""

    axes: ClassVar[int] = 1

    @property
    def layout(self) -> Layout:
        return EntryLayout()

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        # A third axis would be neither rows nor columns, and cells would cut it.
        if len(shape) > lead + 2:
            raise ValueError(f"shape {shape} with {lead} leading axes is neither of matrices nor of vectors")
        return shape

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        return locate(mask, _grid(grid, mask.ndim - lead), capacity)

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        return mask_at(at, shape_of(shape)[lead:], lead)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        n = at.shape[-1]
        return shape[-n] // at.shape[at.ndim - 2 - n]


@dataclasses.dataclass(frozen=True)
class Block(Granularity):
    """Blocks of ``rows x columns`` weights.

    auto: an extent that does not divide its axis is replaced by the largest divisor of the axis below it (of the axis
    inside a cell, where :meth:`fitted` gets a grid); otherwise it is refused.
    """

    rows: int = 128
    columns: int = 128
    auto: bool = True
    axes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse an extent below one."""
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a block of {self.rows} x {self.columns} holds nothing")

    @property
    def layout(self) -> Layout:
        return BlockLayout(self.rows, self.columns)

    def fitted(self, shape: tuple[int, ...], grid: tuple[int, ...] = (1, 1)) -> Block:
        """The block whose extents divide the last two axes of ``shape`` inside each of ``grid`` cells."""
        extents = []
        for name, extent, size, g in zip(("rows", "columns"), (self.rows, self.columns), shape[-2:], grid, strict=True):
            if size % g:
                raise ValueError(f"{size} {name} do not divide into {g} cells")
            inside = size // g
            if inside % extent and not self.auto:
                raise ValueError(
                    f"blocks of {extent} {name} do not divide {inside} {name} of a weight of shape {tuple(shape)}; "
                    f"the nearest that do are {_divisor(inside, extent)} (Block(auto=True) takes them)"
                )
            extents.append(_divisor(inside, extent))
        return dataclasses.replace(self, rows=extents[0], columns=extents[1])

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        block = self.fitted(shape)
        return *shape[:-2], shape[-2] // block.rows, shape[-1] // block.columns

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        return locate(mask, _grid(grid, 2), capacity)

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        # Coordinates count blocks.
        return mask_at(at, self.units(shape, lead)[lead:], lead)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        return self.units(shape, len(shape) - 2)[-2] // at.shape[-4]


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of ``n`` that is not above ``limit``."""
    # 1 divides everything, so there is one.
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


@dataclasses.dataclass(frozen=True)
class _Slice(Granularity):
    """Whole rows, or whole columns, in runs of ``size``."""

    axes: ClassVar[int] = 2

    def _axis(self) -> Axis:
        raise TypeError(f"{type(self).__name__} names no axis")

    def _size(self) -> int:
        return 1

    @property
    def layout(self) -> Layout:
        return SliceLayout(ROWS if self._axis() == "rows" else COLUMNS)

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        n = self._of(shape) // self._size()
        return *shape[:-2], *((n, None) if self._axis() == "rows" else (None, n))

    def _of(self, shape: tuple[int, ...]) -> int:
        """The extent of the axis that is cut."""
        return shape[-2] if self._axis() == "rows" else shape[-1]

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        size = self._size()
        g = _grid(grid, 2)[0 if self._axis() == "rows" else 1]
        # One coordinate, so its axis goes: layouts of slices have `at[*lead, g, r]`.
        return locate(spread(mask, size), (g,), capacity)[..., 0]

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        mask = mask_at(at[..., None], (self._of(shape_of(shape)),), lead)
        # A head counts as selected if a capacity kept only some of its rows.
        return jnp.any(mask.reshape(*mask.shape[:-1], -1, self._size()), axis=-1)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        return self._of(shape) // at.shape[-2]


@dataclasses.dataclass(frozen=True)
class Row(_Slice):
    """Rows of matrices: all weights that read one input."""

    def _axis(self) -> Axis:
        return "rows"


@dataclasses.dataclass(frozen=True)
class Column(_Slice):
    """Columns of matrices: all weights that make one output."""

    def _axis(self) -> Axis:
        return "columns"


@dataclasses.dataclass(frozen=True)
class Channel(_Slice):
    """Channels of an MLP: columns of the matrices into it (up, gate), rows of the one out of it (down)."""

    axis: Axis = "columns"

    def __post_init__(self) -> None:
        """Refuse an unknown axis."""
        _check_axis(self.axis)

    def _axis(self) -> Axis:
        return self.axis


@dataclasses.dataclass(frozen=True)
class Head(_Slice):
    """Attention heads, ``count`` runs of consecutive columns (query, key, value) or rows (output).

    Keys and values of grouped-query attention have fewer: their count is that of key-value heads. size: rows or columns of
    one head; :meth:`fitted` finds it from a weight, and :meth:`locate` needs it.
    """

    count: int
    axis: Axis = "columns"
    size: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown axis, or no heads."""
        _check_axis(self.axis)
        if self.count < 1:
            raise ValueError(f"{self.count} heads hold nothing")

    def _axis(self) -> Axis:
        return self.axis

    def _size(self) -> int:
        if self.size is None:
            raise ValueError(f"{self} does not know how large a head is; take unit.fitted(shape of the weight)")
        return self.size

    def fitted(self, shape: tuple[int, ...], grid: tuple[int, ...] = (1, 1)) -> Head:
        """These heads with their size in a weight of ``shape``."""
        extent = self._of(shape)
        if extent % self.count or self.size not in (None, extent // self.count):
            raise ValueError(f"{extent} {self.axis} of a weight of shape {tuple(shape)} are not those of {self}")
        return dataclasses.replace(self, size=extent // self.count)

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        n = self.fitted(shape).count
        return *shape[:-2], *((n, None) if self.axis == "rows" else (None, n))

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        # On the fitted head, since only that knows its size.
        return super(Head, self.fitted(shape_of(shape))).mask_of(at, shape, lead)


@dataclasses.dataclass(frozen=True)
class Matrix(Granularity):
    """Whole matrices (or vectors): one for each index of the leading axes."""

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        return *shape[:lead], *(None,) * (len(shape) - lead)


@dataclasses.dataclass(frozen=True)
class Expert(Granularity):
    """The matrices of one expert, of weights ``[L, E, I, O]`` (or ``[E, I, O]``)."""

    axes: ClassVar[int] = 2

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        if lead < 1 or len(shape) != lead + 2:
            raise ValueError(f"shape {shape} with {lead} leading axes has no axis of experts before two of matrices")
        return *shape[:-2], None, None

    @property
    def layout(self) -> Layout:
        return ExpertLayout()

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        # Experts are not cut into cells: one cell, and one coordinate.
        return locate(mask, (1,), capacity)[..., 0, :, 0]

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        # The axes that `locate` took away.
        return mask_at(at[..., None, :, None], (shape_of(shape)[-3],), lead - 1)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        return shape[-3]


@dataclasses.dataclass(frozen=True)
class Layer(Granularity):
    """All of a weight that belongs to one layer: one unit for each index of the first axis of a stack."""

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        # Layers are the first axis; experts of a layer go together.
        layer_axes = min(lead, 1)
        return *shape[:layer_axes], *(None,) * (len(shape) - layer_axes)


@dataclasses.dataclass(frozen=True)
class Name(Granularity):
    """The whole weight under one path, every layer of it: a single unit."""

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        return (None,) * len(shape)


def spread(mask: Array, size: int) -> Array:
    """Units as the rows or columns they consist of: bool ``[..., n]`` to ``[..., n * size]``, each ``size`` times in a row.

    With :func:`jft.select.top_each` on ``[L, units]`` scores that several weights share (a head, an MLP channel) and the
    ``locate`` of `Row` and `Column` it selects coupled parts: one mask, spread to the size of each weight.
    """
    repeated = jnp.broadcast_to(mask[..., None], (*mask.shape, size))
    return repeated.reshape(*mask.shape[:-1], mask.shape[-1] * size)


def _check_axis(axis: str) -> None:
    if axis not in ("rows", "columns"):
        raise ValueError(f"axis {axis!r} is unknown; choose rows or columns")
