"""What spectral rules share: singular value decompositions without null directions, polar factors, and what is a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft.merge.rule import Tensor

Array = jax.Array
Matrices = Literal["all", "layers"]
Others = Literal["average", "sum", "zero"]
Side = Literal["inputs", "outputs"]

# Singular values below this part of the largest are rounding errors of float32.
TOLERANCE = 1e-6


def svd(x: Array, size: Array | None = None) -> tuple[Array, Array, Array]:
    """``x = u @ diag(s) @ vt`` of ``[..., I, O]``, thin, with vectors of zero where the singular value is zero.

    A decomposition leaves the vectors of zero singular values open, and libraries fill in what they like. Zeros in their
    place make what is computed from them a function of the matrix. size: ``[...]``, the norm of what x was computed from,
    where x may be nothing but the rounding errors of that; None is x itself.

    The derivative is that of what depends on the product of vectors with equal singular values alone, as polar factors and
    projections do: it is finite where values are equal or zero. Which values are zero is a constant to it.
    """
    return _svd(x, None if size is None else jax.lax.stop_gradient(size))


@jax.custom_jvp
def _svd(x: Array, size: Array | None) -> tuple[Array, Array, Array]:
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    support = s > TOLERANCE * (s[..., :1] if size is None else size[..., None])
    return u * support[..., None, :], s * support, vt * support[..., :, None]


@_svd.defjvp
def _svd_derivative(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (x, size), (dx, _) = primals, tangents
    u, s, vt = _svd(x, size)
    ut, v = transposed(u), transposed(vt)
    inside = product(ut, dx, v)
    turned = transposed(inside)
    # Between two directions: they turn together by the symmetric part, over the difference of the singular values, and
    # against each other by the rest, over the sum. Where values are equal the former is free, and taken as none.
    gap, both = s[..., None, :] - s[..., :, None], s[..., None, :] + s[..., :, None]
    close = jnp.abs(gap) <= TOLERANCE * s[..., :1, None]
    together = (inside + turned) / 2 * jnp.where(close, 0, 1 / jnp.where(close, 1, gap))
    against = (inside - turned) / 2 * _inverse(both)
    # And out of the space that they span.
    du = product(u, together + against) + (product(dx, v) - product(u, inside)) * _inverse(s)[..., None, :]
    dv = product(v, together - against) + (product(transposed(dx), u) - product(v, turned)) * _inverse(s)[..., None, :]
    ds = jnp.diagonal(inside, axis1=-2, axis2=-1)
    return (u, s, vt), (du, ds, transposed(dv))


def _inverse(x: Array) -> Array:
    """``1 / x``, and 0 where x is 0."""
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def polar(x: Array) -> Array:
    """The orthonormal factor of ``x [..., I, O]``: the nearest matrix whose singular values are 1 (0 where they are 0 in x).

    The solution of the orthogonal Procrustes problem; whitening, in the words of the TSV paper.
    """
    u, _, vt = svd(x)
    return product(u, vt)


def product(*factors: Array) -> Array:
    """The matrix product from left to right in full float32, which accelerators would otherwise round."""
    result, *rest = factors
    for x in rest:
        result = jnp.matmul(result, x, precision=jax.lax.Precision.HIGHEST)
    return result


def transposed(x: Array) -> Array:
    """``x`` with its last two axes exchanged."""
    return jnp.swapaxes(x, -1, -2)


def side_first(x: Array, side: Side) -> Array:
    """``x [..., I, O]`` with ``side`` as its rows, or back again."""
    return x if side == "inputs" else transposed(x)


def weighted(tensor: Tensor) -> Array:
    """``w_i delta_i``, ``[N, ...]``."""
    return tensor.deltas * tensor.weighted()


def on_matrices(tensor: Tensor, merge: Callable[[], Array], matrices: str, other: Callable[[], Array]) -> Array:
    """``merge()`` for a matrix, ``other()`` for vectors and scalars, and with ``matrices="layers"`` outside stacks."""
    if tensor.deltas.ndim != 3 or 0 in tensor.deltas.shape:
        return other()
    return merge() if matrices == "all" else jax.lax.cond(tensor.layers > 0, merge, other)


def combined(tensor: Tensor, others: str) -> Array:
    """``sum_i w_i delta_i``, by the number of models for the ``average``, times zero for ``zero``."""
    factor = {"average": 1 / len(tensor.deltas), "sum": 1.0, "zero": 0.0}[others]
    return factor * jnp.sum(weighted(tensor), axis=0)
