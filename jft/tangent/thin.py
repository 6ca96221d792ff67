"""`ThinWeight`: a weight and the direction ``a b`` in which it is differentiated, one factor being zero at the base."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jft.models.core import dot, grouped_dot, take, transpose

Array = jax.Array


def _dot(x: Array, w: Any, sizes: Array | None) -> Array:
    return dot(x, w) if sizes is None else grouped_dot(x, w, sizes)


_Zero = jax.custom_derivatives.SymbolicZero


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _moved(first: Callable[..., Array], x: Array, a: Array, b: Array, sizes: Array | None) -> Array:
    """Zero, with the derivative of ``first(x, a) @ b`` in the factor that moves; the other factor is zero."""
    shape = jax.eval_shape(lambda x, a, b, sizes: _dot(first(x, a, sizes), b, sizes), x, a, b, sizes)
    return jnp.zeros(shape.shape, shape.dtype)


@functools.partial(_moved.defjvp, symbolic_zeros=True)
def _moved_jvp(first: Callable[..., Array], primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, a, b, sizes = primals
    _, da, db, _ = tangents
    zero = _moved(first, x, a, b, sizes)
    parts = [] if isinstance(db, _Zero) else [_dot(first(x, a, sizes), db, sizes)]
    if not isinstance(da, _Zero):
        parts.append(_dot(first(x, da, sizes), b, sizes))
    return zero, sum(parts[1:], parts[0]) if parts else zero


def _taken(ids: Array, a: Array, sizes: None) -> Array:
    return take(a, ids, a.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThinWeight:
    """The structured weight ``w + a b`` at ``a b = 0``: products cost those with ``w``, their tangents two thin ones more.

    Unlike :class:`jft.models.low_rank.LowRankWeight` it multiplies by no zeros, and its outputs do not depend on ``a``:
    under ``vmap`` over several directions there is one primal pass.
    """

    w: Array
    a: Array
    b: Array

    def __jft_dot__(self, x: Array) -> Array:
        return dot(x, self.w) + _moved(_dot, x, self.a, self.b, None).astype(x.dtype)

    def __jft_grouped_dot__(self, x: Array, sizes: Array) -> Array:
        return grouped_dot(x, self.w, sizes) + _moved(_dot, x, self.a, self.b, sizes).astype(x.dtype)

    def __jft_take__(self, ids: Array) -> Array:
        return take(self.w, ids, self.w.dtype) + _moved(_taken, ids, self.a, self.b, None).astype(self.w.dtype)

    def __jft_transpose__(self) -> ThinWeight:
        a, b = (jnp.swapaxes(x, -1, -2) for x in (self.b, self.a))
        return ThinWeight(transpose(self.w), a, b)
