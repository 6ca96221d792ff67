"""Weights formed where they are used, from a frozen weight and from what trains beside it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jft.dot import dot, grouped_dot, take

Array = jax.Array


class Forms(Protocol):
    """A hashable rule that makes one weight, without leading axes, of its parts."""

    def form(self, parts: Any) -> Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FormedWeight:
    """The structured weight ``how.form(parts)``: formed in the layer that uses it, and again in that layer's backward pass.

    parts: a pytree whose leaves all carry the weight's leading axes (layers, experts), so that it slices under a scan and
    the formed weights of all layers never exist at once. how: static, hence hashable.
    """

    parts: Any
    how: Forms = dataclasses.field(metadata={"static": True})

    def __jft_dot__(self, x: Array) -> Array:
        return _recomputed(lambda x, parts: dot(x, self.how.form(parts)), x, self.parts)

    def __jft_grouped_dot__(self, x: Array, sizes: Array) -> Array:
        return _recomputed(lambda x, parts: grouped_dot(x, jax.vmap(self.how.form)(parts), sizes), x, self.parts)

    def __jft_take__(self, ids: Array) -> Array:
        return _recomputed(lambda ids, parts: take(self.how.form(parts), ids, jnp.float32), ids, self.parts)

    def __jft_transpose__(self) -> Array:
        return jnp.swapaxes(self.how.form(self.parts), -1, -2)


def _recomputed(product: Any, x: Array, parts: Any) -> Array:
    # Otherwise a scan would stack every layer's formed weight for the way back.
    return jax.checkpoint(product, prevent_cse=False)(x, parts)


def leading(w: Any, lead: int | None) -> int:
    """How many leading axes of ``w`` are layers and experts: ``lead``, or where that is None what the shape suggests.

    A weight of three axes or more is taken for stacked matrices, one of two for a single matrix.
    """
    return max(len(w.shape) - 2, 0) if lead is None else lead


def keys(key: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Independent keys of ``shape``, one for each matrix; None where there is none."""
    return None if key is None else jax.random.split(key, shape) if shape else key


def bound(how: Forms, parts: Any, w: Array, lead: int, structured: bool) -> Any:
    """The weight of ``parts`` (like ``w``, with ``lead`` leading axes) as a model takes it.

    Structured where a layer's product will form it; else an array in the dtype of ``w``: always for what stands outside
    layers, and for vectors, which models read as arrays.
    """
    if structured and lead and w.ndim - lead == 2:
        return FormedWeight(parts, how)
    # One vmap for each leading axis: the rule itself knows single weights only.
    form = how.form
    for _ in range(lead):
        form = jax.vmap(form)
    return form(parts).astype(w.dtype)


@jax.custom_jvp
def straight_through(hard: Array, soft: Array) -> Array:
    """The value ``hard`` with the derivative of ``soft`` (Bengio, Leonard and Courville 2013, arXiv:1308.3432)."""
    return hard


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    # The primal goes through the function again, so that derivatives of higher order use the same rule.
    return straight_through(*primals), tangents[1]


def matrices(w: Any, lead: int) -> int:
    """How many weights the leading axes hold."""
    return math.prod(w.shape[:lead])


def append_axes(x: Array, ndim: int) -> Array:
    """``x`` [*lead] with axes of length 1 up to ``ndim``."""
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))
