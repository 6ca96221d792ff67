"""Singular value decompositions of deltas, and the low-rank deltas they give: truncation, and LoRA out of a dense change."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta.encoding import Encoding, Sum
from jft.delta.low_rank import LowRank
from jft.delta.numeric import matmul, wide
from jft.delta.product import Product
from jft.tree import host

Array = jax.Array


def truncated(delta: Encoding, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The :class:`LowRank` nearest to ``delta``, matrix by matrix: :func:`svd`, with the roots of s in both factors.

    It is how a LoRA is taken out of a dense change, and how one of a large rank gets a small one.
    """
    u, s, vt = svd(delta, rank, energy)
    root = jnp.sqrt(s)
    return LowRank(u * root[..., None, :], root[..., None] * vt)


def svd(delta: Encoding, rank: int | None = None, energy: float | None = None) -> tuple[Array, Array, Array]:
    """``(u [..., I, r], s [..., r], vt [..., r, O])`` of each matrix of ``delta [..., I, O]``, float32, the largest s first.

    Of each matrix stay the first ``rank``; or as few as hold ``energy`` (0 to 1) of ``sum(s**2)``; or with both given, the
    smaller. r is the largest of those numbers, at least 1, and s is zero past the number of its matrix. Where ``delta`` has
    factors, or is a sum of such, the decomposition is that of a small core between their QR decompositions, and the
    product is not formed; otherwise of one dense matrix after the other. Raises ``ValueError`` for a delta that is no
    matrix, and for a rank or an energy out of range.
    """
    if len(delta.shape) < 2:
        raise ValueError(f"a delta of shape {delta.shape} is no matrix and has no singular values")
    if rank is None and energy is None:
        raise ValueError("give rank=, energy= (the fraction of the squared singular values to keep), or both")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1):
        raise ValueError(f"rank must be an integer of 1 or more, not {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, not {energy:g}")
    product = factors(delta)
    lead = delta.shape[:-2]
    given = (delta.dense(),) if product is None else (product.a, product.b)
    arrays = tuple(wide(x).reshape(math.prod(lead), *x.shape[-2:]) for x in given)
    most = min(arrays[0].shape[1:] if product is None else (*delta.shape[-2:], product.rank))
    kept = np.full(len(arrays[0]), most if rank is None else min(int(rank), most))
    if energy is not None:
        kept = np.minimum(kept, _ranks(host(_values(arrays)), energy))
    largest = int(kept.max(initial=1))
    u, s, vt = _vectors(arrays, largest)
    s = jnp.where(jnp.arange(largest) < jnp.asarray(kept)[:, None], s, 0)
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in (u, s, vt))  # type: ignore[return-value]


def factors(delta: Encoding) -> LowRank | None:
    """``delta`` as one pair of factors, exactly, where it is one, or a sum of such; None where it is not."""
    if isinstance(delta, Product):
        return delta.low_rank
    if isinstance(delta, Sum):
        parts = [factors(part) for part in delta.parts]
        if any(part is None for part in parts):
            return None
        join = lambda name, axis: jnp.concatenate([wide(getattr(part, name)) for part in parts], axis=axis)
        return LowRank(join("a", -1), join("b", -2))
    return delta if isinstance(delta, LowRank) else None


def _ranks(s: np.ndarray, energy: float) -> np.ndarray:
    """The least number of values of each row whose squares sum to ``energy`` of all; 1 for zeros."""
    total = np.cumsum(s.astype(np.float64) ** 2, axis=-1)
    return np.minimum((total < energy * total[:, -1:]).sum(axis=-1) + 1, s.shape[-1])


@jax.jit
def _values(arrays: tuple[Array, ...]) -> Array:
    return jax.lax.map(lambda one: jnp.linalg.svd(_core(one)[0], compute_uv=False), arrays)


@functools.partial(jax.jit, static_argnums=1)
def _vectors(arrays: tuple[Array, ...], rank: int) -> tuple[Array, Array, Array]:
    def one(matrices: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        core, outward = _core(matrices)
        u, s, vt = jnp.linalg.svd(core, full_matrices=False)
        u, vt = outward(u[:, :rank], vt[:rank])
        return u, s[:rank], vt

    # One matrix after the other: only the vectors that stay are held for all.
    return jax.lax.map(one, arrays)


def _core(matrices: tuple[Array, ...]) -> tuple[Array, Callable[[Array, Array], tuple[Array, Array]]]:
    """A matrix with the singular values of the product of ``matrices``, and the way from its singular vectors to those."""
    if len(matrices) == 1:
        return matrices[0], lambda u, vt: (u, vt)
    # The columns of both q are orthonormal, so that they turn singular vectors into singular vectors.
    (q, r), (p, t) = jnp.linalg.qr(matrices[0]), jnp.linalg.qr(matrices[1].T)
    return matmul(r, t.T), lambda u, vt: (matmul(q, u), matmul(vt, p.T))
