"""A task vector with half of its changes set back."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from jft import delta
from jft.delta import TaskVector
from jft.select.halves import halves


def half_reset(tau: TaskVector, draw: int = 0) -> TaskVector:
    """``tau`` with half of the matrices and norms of every layer set back to the base, drawn by their category.

    What stays is ``halves(shapes, draw)`` (:func:`jft.select.halves.halves`); what stands outside layers stays as well. In
    half fine-tuning it shows how much of what the base knew comes back (Hui et al. 2024, arXiv:2404.18466). Changes of
    entries and of whole layers keep their encoding; others become layers. Changes that depend on the base (masks, gates)
    are refused: ``tau.resolve(base)`` first.
    """
    shapes = {p: tuple(x.shape) for p, x in tau.items()}
    layers = halves(shapes, draw)

    def reset(path: str, change: delta.Encoding) -> delta.Encoding | None:
        if path not in layers:
            return change
        # No layer of it stays: None takes the path out of the task vector.
        return _in_layers(change, layers[path]) if layers[path] else None

    return tau.map(reset, "half_reset", draw=draw)


def _in_layers(change: delta.Encoding, layers: tuple[int, ...]) -> delta.Encoding:
    """A change ``[L, ...]``, zero but in ``layers``."""
    if isinstance(change, delta.Rows):
        selected = np.flatnonzero(np.isin(np.asarray(change.indices), layers))
        return dataclasses.replace(change, indices=change.indices[selected], values=change.values[selected])
    if isinstance(change, delta.Entries):
        # Rows of entries are counted through all layers.
        rows_per_layer = int(np.prod(change.shape[1:-1], dtype=np.int64))
        selected = np.flatnonzero(np.isin(np.asarray(change.rows) // rows_per_layer, layers))
        return delta.Entries(change.rows[selected], change.columns[selected], change.values[selected], change.shape)
    index = jnp.asarray(layers, jnp.int32)
    return delta.Rows(index, change.dense()[index], tuple(change.shape))
