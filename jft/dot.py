"""The one matrix product of every model, and the lookup, grouped product and transpose that go with it.

A weight is an array or a *structured weight*, a pytree that says itself how it multiplies: ``__jft_dot__(x)``,
``__jft_grouped_dot__(x, sizes)``, ``__jft_expert_dot__(x)``, ``__jft_take__(ids)`` and ``__jft_transpose__()``, those that it
has a use for. Its leaves carry the leading axes of the weight (layers, experts), so it slices under ``lax.scan`` like an array.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def dot(x: Array, w: Any) -> Array:
    """``x[..., in] @ w[in, out]`` in the dtype of ``x``, accumulated in float32; ``w`` an array or a structured weight."""
    if hasattr(w, "__jft_dot__"):
        return w.__jft_dot__(x)
    # Rows in one axis: with two, XLA's CPU backend copies a transposed dy before the weight's gradient (2x slower).
    rows = x.reshape(-1, x.shape[-1]) if x.ndim > 2 and w.ndim == 2 else x
    y = jnp.matmul(rows, w.astype(x.dtype), preferred_element_type=accumulator(x.dtype)).astype(x.dtype)
    return y.reshape(*x.shape[:-1], w.shape[-1]) if rows is not x else y


def take(w: Any, ids: Array, dtype: Any) -> Array:
    """Rows ``ids`` of an embedding table ``w[rows, D]``, in ``dtype``."""
    if hasattr(w, "__jft_take__"):
        return w.__jft_take__(ids).astype(dtype)
    # The default mode, fill, compares every id with the bounds and selects NaN for those outside them.
    return jnp.take(w, ids, axis=0, mode="clip").astype(dtype)


def grouped_dot(x: Array, w: Any, sizes: Array) -> Array:
    """Rows of ``x[N, in]`` in E consecutive groups of int ``sizes[E]``, each times its own matrix of ``w[E, in, out]``."""
    if hasattr(w, "__jft_grouped_dot__"):
        return w.__jft_grouped_dot__(x, sizes)
    w = w.astype(x.dtype)
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=accumulator(x.dtype)).astype(x.dtype)


def has_grouped_dot(w: Any) -> bool:
    """Whether :func:`grouped_dot` can take ``w``: an array, or a structured weight that says how."""
    return hasattr(w, "__jft_grouped_dot__") or not hasattr(w, "__jft_dot__")


def expert_dot(x: Array, w: Any) -> Array:
    """``[E, N, out]`` of every matrix of ``w[E, in, out]``: x ``[N, in]``, the same rows for all, or ``[E, N, in]``."""
    if hasattr(w, "__jft_expert_dot__"):
        return w.__jft_expert_dot__(x)
    # A structured weight is a pytree with the leading axis E in every leaf, so vmap maps over it as over an array.
    return jax.vmap(dot, in_axes=(0 if x.ndim == 3 else None, 0))(x, w)


def transpose(w: Any) -> Any:
    """``w`` with its last two axes swapped, structured or not: a tied output head is ``dot(h, transpose(table))``."""
    return w.__jft_transpose__() if hasattr(w, "__jft_transpose__") else jnp.swapaxes(w, -1, -2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExpert:
    """Matrices ``w[E, in, out]``, an array or structured, as one weight whose product is :func:`expert_dot`."""

    w: Any

    def __jft_dot__(self, x: Array) -> Array:
        return expert_dot(x, self.w)


def accumulator(dtype: Any) -> Any:
    """The dtype that products of ``dtype`` are summed in: float32, or wider."""
    return jnp.promote_types(dtype, jnp.float32)
