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
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    support = s > TOLERANCE * (s[..., :1] if size is None else size[..., None])
    return u * support[..., None, :], s * support, vt * support[..., :, None]


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


def options(**choices: Any) -> dict[str, Any]:
    """The choices as the options of a rule; ``ValueError`` naming one that is none of its values."""
    for name, value in choices.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{name} must be {' or '.join(map(repr, _CHOICES[name]))}, not {value!r}")
    return choices


_CHOICES = {
    "matrices": ("all", "layers"),
    "others": ("average", "sum", "zero"),
    "side": ("inputs", "outputs"),
    "solver": ("adam", "closed_form"),
}
