"""Trimming by magnitude: which entries of each delta stay."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jft.merge.rule import Tensor
from jft.select.threshold import top_each

Array = jax.Array


def largest(tensor: Tensor, r: int = 0, exact: bool = True) -> Array:
    """Bool ``[N, ...]``: for each model the ``ranks[:, r]`` entries of the largest magnitude.

    exact: of entries equal to the last, only the first in row-major order, so that the count is the rank; otherwise all of
    them, which is what ``|delta| >= threshold`` means in released code (and needs ``tensor.thresholds``).
    """
    magnitudes = jnp.abs(tensor.deltas)
    assert tensor.ranks is not None, "a rule that trims has `ranks`"
    if tensor.thresholds is None:
        return top_each(magnitudes, tensor.ranks[:, r], 1)
    limit = _expanded(tensor.thresholds[:, r], magnitudes)
    if exact and tensor.ends is not None:
        shape = magnitudes.shape[1:]
        positions = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(1, *shape)
        return (magnitudes > limit) | (magnitudes == limit) & (positions < _expanded(tensor.ends[:, r], magnitudes))
    return magnitudes >= limit if not exact else _first(magnitudes, limit, tensor.ranks[:, r])


def _first(magnitudes: Array, limit: Array, ranks: Array) -> Array:
    """Entries above ``limit``, and of those equal to it as many of the first as make the rank."""
    above, equal = magnitudes > limit, magnitudes == limit
    axes = tuple(range(1, magnitudes.ndim))
    missing = ranks.astype(jnp.int32) - jnp.sum(above, axis=axes, dtype=jnp.int32)

    def front() -> Array:
        order = jnp.cumsum(equal.reshape(len(equal), -1), axis=1, dtype=jnp.int32).reshape(equal.shape)
        return equal & (order <= _expanded(missing, order))

    # Where no tie is cut, which is nearly always, the passes of the running count are saved.
    cut = jnp.any(jnp.sum(equal, axis=axes, dtype=jnp.int32) > missing)
    return above | jax.lax.cond(cut, front, lambda: equal)


def _expanded(x: Array, like: Array) -> Array:
    return x.reshape(-1, *(1,) * (like.ndim - 1))
