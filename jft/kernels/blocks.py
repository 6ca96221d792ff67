"""Products with selected blocks of a weight, and with nothing else of it.

``at[gi, gj, n, 2]`` in blocks, values ``[gi, gj, n, b, c]``, as :mod:`jft.delta.selected` lays them out. Their gradient is a
sampled product, ``x[:, rows of n]^T dy[:, columns of n]`` for each: its cost is that of the dense one times the share of blocks
selected.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def block_product(x: Array, at: Array, values: Array, shape: tuple[int, int]) -> Array:
    """``x[..., I] @ scatter(values)`` for a weight of ``shape`` (I, O): panels of ``x`` times blocks, summed by column.

    A backward pass keeps ``x`` itself, which it mostly has anyway, and takes the panels again.
    """
    b, c = values.shape[-2:]
    rows, columns = shape[0] // b, shape[1] // c
    row, column = _panels(at, (rows // at.shape[0], columns // at.shape[1]))
    # Padding points past the last block: it reads zeros here and is dropped below.
    panels = jnp.take(x.reshape(-1, rows, b), row, axis=1, mode="fill", fill_value=0)
    parts = jnp.einsum("tnb,nbc->tnc", panels, values.reshape(-1, b, c).astype(x.dtype))
    y = jnp.zeros((parts.shape[0], columns, c), x.dtype).at[:, column].add(parts, mode="drop")
    return y.reshape(*x.shape[:-1], shape[1])


def _panels(at: Array, counts: tuple[int, int]) -> tuple[Array, Array]:
    """Block rows and columns of the whole weight, ``[gi * gj * n]`` each; padding gets the row past the last."""
    gi, gj = at.shape[:2]
    row = at[..., 0] + jnp.arange(gi, dtype=at.dtype)[:, None, None] * counts[0]
    column = at[..., 1] + jnp.arange(gj, dtype=at.dtype)[None, :, None] * counts[1]
    valid = (at[..., 0] < counts[0]) & (at[..., 1] < counts[1])
    return jnp.where(valid, row, gi * counts[0]).reshape(-1), jnp.where(valid, column, gj * counts[1]).reshape(-1)
