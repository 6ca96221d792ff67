"""Single entries of a weight. ``at[*lead, gi, gj, k, 2]`` (row, column), values ``[*lead, gi, gj, k]``.

A vector ``[*lead, D]`` has ``at[*lead, g, k, 1]`` and values ``[*lead, g, k]``. Matrix units cannot skip single entries, so the
gradient of one layer's weight is formed and gathered where it arises; under a scan no other layer's exists beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jft.kernels import cells

Array = jax.Array


def _axes(at: Array) -> int:
    return at.shape[-1]


def _grid(at: Array) -> tuple[int, ...]:
    n = _axes(at)
    return at.shape[-2 - n : -2]


def gather(w: Array, at: Array) -> Array:
    """The selected values of ``w``; zero at padding."""
    n = _axes(at)

    def one(cell: Array, at: Array) -> Array:
        index = tuple(at[:, i] for i in range(n))
        return cell.at[index].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)

    return cells.each(one, at.ndim - 2)(cells.split(w, _grid(at)), at)


def put(w: Array, at: Array, values: Array) -> Array:
    """``w`` with the selected entries replaced by ``values``, cast to its dtype."""
    values = values.astype(w.dtype)
    if at.ndim - 2 - _axes(at) and w.shape[0] > 1:
        return jax.lax.platform_dependent(w, at, values, tpu=_put_in_turn, default=_put)
    return _put(w, at, values)


def _put(w: Array, at: Array, values: Array) -> Array:
    n = _axes(at)

    def one(cell: Array, at: Array, values: Array) -> Array:
        index = tuple(at[:, i] for i in range(n))
        return cell.at[index].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)

    return cells.join(cells.each(one, at.ndim - 2)(cells.split(w, _grid(at)), at, values), n)


def _put_in_turn(w: Array, at: Array, values: Array) -> Array:
    """As ``_put``, layer by layer: a TPU scatters single entries into a flat copy, which is then one of a layer."""

    def write(i: Array, w: Array) -> Array:
        layer = _put(*(jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for x in (w, at, values)))
        return jax.lax.dynamic_update_index_in_dim(w, layer, i, 0)

    return jax.lax.fori_loop(0, w.shape[0], write, w)


def add_dot(x: Array, at: Array, values: Array, shape: tuple[int, int]) -> Array:
    """``x[..., I] @ scatter(values)`` for a weight of ``shape`` (I, O)."""
    return x @ put(jnp.zeros(shape, x.dtype), at, values)
