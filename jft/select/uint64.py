"""Counts beyond 2**32 in two uint32 limbs, since JAX has 64-bit integers only where a switch makes everything 64-bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


# A pytree by being a named tuple: loops and reductions carry it as it is.
class Wide(NamedTuple):
    """Counts up to 2**64 as two uint32 arrays: ``hi * 2**32 + lo``."""

    hi: Array
    lo: Array


def of(n: int | np.ndarray) -> Wide:
    """Integers of the host."""
    n = np.asarray(n, np.uint64)
    return Wide(jnp.asarray(n >> np.uint64(32), jnp.uint32), jnp.asarray(n & np.uint64(0xFFFFFFFF), jnp.uint32))


def number(count: Wide) -> int:
    """The sum of all counts as a Python integer."""
    # Limbs are summed apart: neither sum can wrap in 64 bits, and Python has no bound.
    hi, lo = (np.sum(np.asarray(limb), dtype=np.uint64) for limb in count)
    return (int(hi) << 32) + int(lo)


def add(a: Wide, b: Wide) -> Wide:
    """``a + b``."""
    lo = a.lo + b.lo
    # The lower limb wrapped exactly if it is below what was added: a carry.
    return Wide(a.hi + b.hi + (lo < b.lo).astype(jnp.uint32), lo)


def subtract(a: Wide, b: Wide) -> Wide:
    """``a - b``, where ``b`` is no more than ``a``."""
    # A borrow.
    return Wide(a.hi - b.hi - (a.lo < b.lo).astype(jnp.uint32), a.lo - b.lo)


def reaches(a: Wide, b: Wide) -> Array:
    """``a >= b``."""
    return (a.hi > b.hi) | ((a.hi == b.hi) & (a.lo >= b.lo))


def equal(a: Wide, b: Wide) -> Array:
    """``a == b``."""
    return (a.hi == b.hi) & (a.lo == b.lo)


def where(test: Array, a: Wide, b: Wide) -> Wide:
    """``a`` where the test holds, else ``b``."""
    return Wide(jnp.where(test, a.hi, b.hi), jnp.where(test, a.lo, b.lo))


def sum_over(a: Wide, axes: Sequence[int]) -> Wide:
    """The sum over ``axes``."""
    zero = jnp.uint32(0)
    # Both limbs in one reduction, so that carries go along.
    hi, lo = jax.lax.reduce((a.hi, a.lo), (zero, zero), lambda x, y: tuple(add(Wide(*x), Wide(*y))), tuple(axes))
    return Wide(hi, lo)
