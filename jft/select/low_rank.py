"""The best approximation of low rank of stacked matrices, exact or in a random subspace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jft.compiled import program_cache

Array = jax.Array


def low_rank(w: Array, rank: int, oversample: int | None, iterations: int, key: Array, exact: bool = False) -> Array:
    """``W_r = U_r U_r^T W`` in float32 for each matrix of ``w[..., I, O]``, sharded as ``w``.

    exact: U_r (or V_r, for ``W V_r V_r^T``) are the leading eigenvectors of ``W W^T`` (or ``W^T W``), whichever is smaller:
    a third of the time of an SVD. Otherwise the r leading left singular vectors are found in a subspace of ``rank +
    oversample`` directions: ``Y = W Omega``, then ``Y = W (W^T Q(Y))`` as often as ``iterations``, orthonormalised in between
    (Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1). oversample: None for the larger of ``rank`` and an eighth of
    min(I, O). Where rank + oversample reaches min(I, O) the subspace is everything, and the result exact; where rank does,
    ``W_r = W``. Omega comes from ``key`` and the index of the layer, so it is the same on any mesh. Raises ``ValueError`` for
    a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    if (oversample or 0) < 0 or iterations < 0:
        raise ValueError(f"oversample is {oversample} and iterations {iterations}; neither may be negative")
    # Nothing to cut off, and a subspace as large as the matrix.
    if rank >= min(w.shape[-2:]):
        return w.astype(jnp.float32)
    size = rank + (max(rank, min(w.shape[-2:]) // 8) if oversample is None else oversample)
    # The result has the shape of w, so it can have its sharding.
    return _compiled(rank, None if exact else size, iterations, getattr(w, "sharding", None))(w, key)


@program_cache
def _compiled(rank: int, size: int | None, iterations: int, sharding: Any) -> Callable[[Array, Array], Array]:
    program = functools.partial(_low_rank, rank=rank, size=size, iterations=iterations)
    return jax.jit(program, out_shardings=sharding)


def _low_rank(w: Array, key: Array, rank: int, size: int | None, iterations: int) -> Array:
    # One layer after the other, so that float32 copies and factors of one only are held; experts of a layer together.
    if w.ndim == 2:
        return _matrix(w, key, rank, size, iterations)
    layers = jnp.arange(w.shape[0])
    return jax.lax.map(lambda x: _matrix(x[0], jax.random.fold_in(key, x[1]), rank, size, iterations), (w, layers))


def _matrix(w: Array, key: Array, rank: int, size: int | None, iterations: int) -> Array:
    """``[..., I, O]``, leading axes batched; size: of the random subspace, None for the exact one."""
    # Accelerators would otherwise multiply in fewer bits, and the directions would not be orthogonal.
    with jax.default_matmul_precision("float32"):
        w = w.astype(jnp.float32)
        transpose = jnp.swapaxes(w, -1, -2)
        if size is None:
            # The smaller Gram matrix: eigenvectors cost the cube of its side.
            is_wide = w.shape[-2] <= w.shape[-1]
            # Eigenvalues come in ascending order.
            leading = jnp.linalg.eigh(w @ transpose if is_wide else transpose @ w)[1][..., -rank:]
            leading_t = jnp.swapaxes(leading, -1, -2)
            # From the outside in: rank is the small extent.
            return leading @ (leading_t @ w) if is_wide else (w @ leading) @ leading_t
        size = min(size, *w.shape[-2:])
        y = w @ jax.random.normal(key, (*w.shape[:-2], w.shape[-1], size), jnp.float32)
        for _ in range(iterations):
            # Orthonormal at each half: bare powers turn all directions to the leading one, and rounding loses the others.
            y = w @ _orthonormal(transpose @ _orthonormal(y))
        q = _orthonormal(y)
        projection = jnp.swapaxes(q, -1, -2) @ w
        # Its thin transpose is reduced once more, so that the SVD is of a matrix as small as the subspace.
        _, r = jnp.linalg.qr(jnp.swapaxes(projection, -1, -2))
        u = jnp.linalg.svd(jnp.swapaxes(r, -1, -2))[0][..., :rank]
        return (q @ u) @ (jnp.swapaxes(u, -1, -2) @ projection)


def _orthonormal(y: Array) -> Array:
    return jnp.linalg.qr(y)[0]
