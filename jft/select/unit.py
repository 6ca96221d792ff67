"""`Unit`: what is selected as one thing, and how a mask of units becomes places in a weight; :mod:`jft.select.units` has them.

A weight is ``[*lead, I, O]`` (or a vector ``[*lead, D]``); the first ``lead`` axes, layers and experts, are batch. A unit pools
a score like the weight into one number per unit, expands a mask of units to one of entries, and turns a mask of units into
``at``, the int32 coordinates of :mod:`jft.delta.selected`: the last axes are cut into an even grid of cells, coordinates are
local to their cell, sorted row-major and padded at the end with distinct coordinates beyond the cell.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
How = Literal["sum", "mean", "max", "l2", "abs_mean"]
Parts = Literal["entries", "blocks", "rows", "columns", "experts"]

_POOLS = {
    "sum": lambda x, axes: jnp.sum(x, axes),
    "mean": lambda x, axes: jnp.mean(x, axes),
    "max": lambda x, axes: jnp.max(x, axes),
    "l2": lambda x, axes: jnp.sqrt(jnp.sum(jnp.square(x), axes)),
    "abs_mean": lambda x, axes: jnp.mean(jnp.abs(x), axes),
}


class Unit:
    """What is selected as one. ``axes``: how many axes after the leading ones a weight must have to be cut into it."""

    axes: ClassVar[int] = 0

    @property
    def parts(self) -> Parts | None:
        """What ``at`` numbers; None where weights are selected as a whole and there is none."""
        return None

    def fitted(self, shape: tuple[int, ...], grid: tuple[int, ...] = (1, 1)) -> Unit:
        """The unit with its extents for a weight of ``shape`` cut into ``grid`` cells, where it leaves them open."""
        return self

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        """For each axis of ``shape`` into how many units it is cut; None where one unit spans it."""
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
        """Scores of units, float32: the sum, mean, max, root of the summed squares, or mean size of those inside.

        Sums are in float32, in the order XLA adds: over an axis that is sharded their last bit may depend on the mesh.
        """
        if how not in _POOLS:
            raise ValueError(f"pool {how!r} is unknown; choose one of {', '.join(_POOLS)}")
        counts = self._cuts(score, lead)
        shape: list[int] = []
        inside: list[int] = []
        for n, size in zip(counts, score.shape, strict=True):
            if n is None:
                inside.append(len(shape))
                shape.append(size)
            else:
                shape.append(n)
                if n < size:
                    inside.append(len(shape))
                    shape.append(size // n)
        return _POOLS[how](score.astype(jnp.float32).reshape(shape), tuple(inside))

    def expand(self, mask: Array, shape: Any, lead: int) -> Array:
        """A mask of entries, bool ``shape``, from a mask of units."""
        shape = shape_of(shape)
        counts = self._cuts(shape, lead)
        expected = tuple(n for n in counts if n is not None)
        if tuple(mask.shape) != expected:
            raise ValueError(f"a mask of {self} of a weight of shape {shape} has shape {expected}, not {mask.shape}")
        narrow, wide = [], []
        for n, size in zip(counts, shape, strict=True):
            narrow += [1, 1] if n is None else [n, 1]
            wide += [1, size] if n is None else [n, size // n]
        return jnp.broadcast_to(mask.astype(bool).reshape(narrow), wide).reshape(shape)

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        """``at`` (see above) of a mask of units, for a weight whose last two axes are cut into ``grid`` cells.

        Rows go by the first number of the grid, columns and vectors by the last. capacity: slots for each cell; None for
        as many as the fullest needs, which is looked up on the host; under ``jit`` it must be given, and a cell that
        selects more keeps its first. Each cell is computed where it lies.

        Raises ``ValueError`` where the grid does not divide the units, or a cell selects more than the capacity.
        """
        raise ValueError(f"{self} selects whole weights, which have no places inside; use its mask, or expand it")

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        """The mask of units that :meth:`locate` made into ``at``, for a weight of ``shape``."""
        raise ValueError(f"{self} selects whole weights, which have no places inside")

    def counts(self, at: Array, extent: int) -> Array:
        """How many of the slots of each cell are no padding, int32; ``extent``: that of a cell along the first coordinate."""
        first = at[..., 0] if self.parts in ("entries", "blocks") else at
        return jnp.sum(first < extent, axis=-1, dtype=jnp.int32)

    def padding(self, at: Array, shape: Any) -> float:
        """The fraction of slots that are padding, in ``[0, 1]``: what cells and layers that select fewer cost."""
        slots = at.shape[:-1] if self.parts in ("entries", "blocks") else at.shape
        if not math.prod(slots):
            return 0.0
        used = np.asarray(jax.device_get(self.counts(at, self._extent(at, shape_of(shape)))), np.int64).sum()
        return 1.0 - float(used) / math.prod(slots)

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        raise ValueError(f"{self} selects whole weights, which have no places inside")


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of what has one, or the shape itself."""
    return tuple(x.shape) if hasattr(x, "shape") else tuple(x)
