"""Selections written out by hand: masks of whole weights as ``at`` arrays, by plain loops, and what they stand for."""

import numpy as np

from jft.delta import BlockLayout, Changed, EntryLayout, Selected, SliceLayout
from jft.delta.changed import COLUMNS, ROWS

LAYOUTS = {
    "entries": EntryLayout(),
    "blocks": BlockLayout(4, 2),
    "rows": SliceLayout(ROWS),
    "columns": SliceLayout(COLUMNS),
}


def weight(layout, w, at, values, origin=None):
    """A live weight whose parts ``at`` train; with ``origin``, their values in ``w``, a base and the change to ``values``."""
    shape = w.shape[layout.lead(at) :]
    change = Selected(at, values if origin is None else values - origin, layout, shape)
    return Changed(w, change, held=origin is None)


def units(layout, shape):
    """Extents of the grid of units on a matrix of ``shape``."""
    if isinstance(layout, EntryLayout):
        return shape
    if isinstance(layout, BlockLayout):
        return shape[0] // layout.height, shape[1] // layout.width
    return (shape[0], 1) if layout.axis == ROWS else (1, shape[1])


def draw(layout, shape, density, seed=0):
    """``(at, mask)`` on one cell: each matrix of ``shape`` has its own number of selected units."""
    rng = np.random.default_rng(seed)
    lead, matrix = shape[:-2], shape[-2:]
    grid = units(layout, matrix)
    chosen = rng.random((*lead, *grid)) < density
    chosen.reshape(-1, *grid)[:, 0, 0] = True
    mask = np.repeat(np.repeat(chosen, matrix[0] // grid[0], -2), matrix[1] // grid[1], -1)
    return locate(layout, chosen), mask


def locate(layout, chosen, grid=(1, 1)):
    """``at`` of unit masks ``[*lead, rows, columns]`` of units, cut into ``grid`` cells."""
    lead, (rows, columns) = chosen.shape[:-2], chosen.shape[-2:]
    if isinstance(layout, SliceLayout):
        axis = 0 if layout.axis == ROWS else 1
        grid = (grid[axis], 1) if axis == 0 else (1, grid[axis])
    extent = rows // grid[0], columns // grid[1]
    cells = chosen.reshape(*lead, grid[0], extent[0], grid[1], extent[1])
    cells = np.swapaxes(cells, len(lead) + 1, len(lead) + 2)
    most = int(cells.reshape(*cells.shape[:-2], -1).sum(-1).max())
    at = np.zeros((*cells.shape[:-2], most, 2), np.int32)
    for where in np.ndindex(*cells.shape[:-2]):
        found = np.argwhere(cells[where])
        at[where][: len(found)] = found
        at[where][len(found) :, 0] = extent[0] + np.arange(most - len(found))
    if not isinstance(layout, SliceLayout):
        return at
    if layout.axis == ROWS:
        return at[..., 0, :, 0]
    for where in np.ndindex(*cells.shape[:-2]):
        count = int(cells[where].sum())
        at[where][count:, 1] = extent[1] + np.arange(most - count)
    return at[..., 0, :, :, 1]
