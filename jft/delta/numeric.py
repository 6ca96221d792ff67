"""The precision that deltas are computed in, and exact counts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# JAX counts in int32; this is half of what it holds.
_COUNTED_AT_ONCE = 2**30


def wide(x: Any) -> Array:
    """``x`` in float32, or as it is where it is wider or complex: the precision all arithmetic on deltas is done in."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Compiled, so that the product is fused into the sum.
@jax.jit
def inner(a: Array, b: Array) -> Array:
    """``sum(a * b)`` in float32, the product never stored."""
    return jnp.sum(wide(a) * wide(b))


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` in full float32, where an accelerator would otherwise round the factors to fewer bits."""
    return jnp.matmul(wide(a), wide(b), precision=jax.lax.Precision.HIGHEST)


def count_nonzero(x: Array) -> int:
    """Non-zero elements, exactly, also beyond 2**31 of them."""
    if x.ndim == 0 or x.size <= _COUNTED_AT_ONCE:
        return int(jnp.count_nonzero(x))
    # An axis of one cannot be split; the next may.
    if x.shape[0] == 1:
        return count_nonzero(x[0])
    pieces = min(x.shape[0], x.size // _COUNTED_AT_ONCE + 1)
    return sum(count_nonzero(piece) for piece in jnp.array_split(x, pieces))
