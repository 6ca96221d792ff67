"""The units there are: entries, blocks, rows, columns, heads, experts, and weights as a whole. See :mod:`jft.select.unit`.

=================  ============================  =============================================
unit               mask of units                 ``at``
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
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jft.select import places
from jft.select.unit import Parts, Unit, shape_of

Array = jax.Array
Axis = Literal["rows", "columns"]


def _grid(grid: tuple[int, ...], axes: int) -> tuple[int, ...]:
    if len(grid) < axes:
        raise ValueError(f"a grid of {len(grid)} axes does not cut {axes}; give (rows, columns)")
    return tuple(grid[len(grid) - axes :])


@dataclasses.dataclass(frozen=True)
class Entry(Unit):
    """Single weights, of matrices and of vectors."""

    axes: ClassVar[int] = 1

    @property
    def parts(self) -> Parts:
        return "entries"

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        if len(shape) > lead + 2:
            raise ValueError(f"shape {shape} with {lead} leading axes is neither of matrices nor of vectors")
        return shape

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        return places.locate(mask, _grid(grid, mask.ndim - lead), capacity)

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        return places.mask_of(at, shape_of(shape)[lead:], lead)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        n = at.shape[-1]
        return shape[-n] // at.shape[at.ndim - 2 - n]


@dataclasses.dataclass(frozen=True)
class Block(Unit):
    """Blocks of ``rows x columns`` weights.

    auto: an extent that does not divide its axis is replaced by the largest divisor of the axis below it (of the axis
    inside a cell, where :meth:`fitted` is told the grid); otherwise it is refused.
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
    def parts(self) -> Parts:
        return "blocks"

    def fitted(self, shape: tuple[int, ...], grid: tuple[int, ...] = (1, 1)) -> Block:
        """The block whose extents divide the last two axes of ``shape`` inside each of ``grid`` cells."""
        extents = []
        for name, wanted, size, g in zip(("rows", "columns"), (self.rows, self.columns), shape[-2:], grid, strict=True):
            if size % g:
                raise ValueError(f"{size} {name} do not divide into {g} cells")
            inside = size // g
            if inside % wanted and not self.auto:
                raise ValueError(
                    f"blocks of {wanted} {name} do not divide {inside} {name} of a weight of shape {tuple(shape)}; "
                    f"the nearest that do are {_divisor(inside, wanted)} (Block(auto=True) takes them)"
                )
            extents.append(_divisor(inside, wanted))
        return dataclasses.replace(self, rows=extents[0], columns=extents[1])

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        block = self.fitted(shape)
        return *shape[:-2], shape[-2] // block.rows, shape[-1] // block.columns

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        return places.locate(mask, _grid(grid, 2), capacity)

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        return places.mask_of(at, self.units(shape, lead)[lead:], lead)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        return self.units(shape, len(shape) - 2)[-2] // at.shape[-4]


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of ``n`` that is not above ``limit``."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


@dataclasses.dataclass(frozen=True)
class _Slice(Unit):
    """Whole rows, or whole columns, in runs of ``size``."""

    axes: ClassVar[int] = 2

    def _axis(self) -> Axis:
        raise TypeError(f"{type(self).__name__} names no axis")

    def _size(self) -> int:
        return 1

    @property
    def parts(self) -> Parts:
        return self._axis()

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        n = self._of(shape) // self._size()
        return *shape[:-2], *((n, None) if self._axis() == "rows" else (None, n))

    def _of(self, shape: tuple[int, ...]) -> int:
        """The extent of the axis that is cut."""
        return shape[-2] if self._axis() == "rows" else shape[-1]

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        size = self._size()
        g = _grid(grid, 2)[0 if self._axis() == "rows" else 1]
        return places.locate(spread(mask, size), (g,), capacity)[..., 0]

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        mask = places.mask_of(at[..., None], (self._of(shape_of(shape)),), lead)
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
    """Channels of an MLP: columns of what leads into it (up, gate), rows of what leads out (down)."""

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
        return super(Head, self.fitted(shape_of(shape))).mask_of(at, shape, lead)


@dataclasses.dataclass(frozen=True)
class Matrix(Unit):
    """Whole matrices (or vectors): one for each index of the leading axes."""

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        return *shape[:lead], *(None,) * (len(shape) - lead)


@dataclasses.dataclass(frozen=True)
class Expert(Unit):
    """The matrices of one expert, of weights ``[L, E, I, O]`` (or ``[E, I, O]``)."""

    axes: ClassVar[int] = 2

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        if lead < 1 or len(shape) != lead + 2:
            raise ValueError(f"shape {shape} with {lead} leading axes has no axis of experts before two of matrices")
        return *shape[:-2], None, None

    @property
    def parts(self) -> Parts:
        return "experts"

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        return places.locate(mask, (1,), capacity)[..., 0, :, 0]

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        return places.mask_of(at[..., None, :, None], (shape_of(shape)[-3],), lead - 1)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        return shape[-3]


@dataclasses.dataclass(frozen=True)
class Layer(Unit):
    """All of a weight that belongs to one layer: one unit for each index of the first axis of a stack."""

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        stacked = min(lead, 1)
        return *shape[:stacked], *(None,) * (len(shape) - stacked)


@dataclasses.dataclass(frozen=True)
class Name(Unit):
    """All that stands under one path, every layer of it: a single unit."""

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        return (None,) * len(shape)


def spread(mask: Array, size: int) -> Array:
    """Units as the rows or columns they consist of: bool ``[..., n]`` to ``[..., n * size]``, each ``size`` times in a row.

    With :func:`jft.select.top_each` on ``[L, units]`` scores that several weights share (a head, an MLP channel) and the
    ``locate`` of `Row` and `Column` it selects coupled parts: one mask, spread to each weight's own size.
    """
    wide = jnp.broadcast_to(mask[..., None], (*mask.shape, size))
    return wide.reshape(*mask.shape[:-1], mask.shape[-1] * size)


def _check_axis(axis: str) -> None:
    if axis not in ("rows", "columns"):
        raise ValueError(f"axis {axis!r} is unknown; choose rows or columns")
