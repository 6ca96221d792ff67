"""Trimming: which entries of each delta stay, by magnitude or by chance, and how those that stay are rescaled."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jft.merge.rule import Tensor, over_models
from jft.select.threshold import top_each

Array = jax.Array

# A tensor whose magnitudes sum to less is not rescaled: mergekit's limit.
_LEAST_SUM = 1e-7


def largest(tensor: Tensor, r: int = 0, exact: bool = True, axis: int | None = None) -> Array:
    """Bool ``[N, ...]``: for each model the ``ranks[:, r]`` entries of the largest magnitude.

    exact: of entries equal to the last, only the first in row-major order, so that the count is the rank; otherwise all of
    them, which is what ``|delta| >= threshold`` means in released code (and needs ``tensor.thresholds``). axis: among the
    entries along this axis of the tensor rather than among all of them, to which thresholds do not apply; a vector is one
    row, whatever the axis.
    """
    magnitudes = jnp.abs(tensor.deltas)
    if not exact:
        assert tensor.thresholds is not None, "the thresholds of the whole model are known"
        return magnitudes >= _expanded(tensor.thresholds[:, r], magnitudes)
    assert tensor.ranks is not None, "a rule that trims has `ranks`"
    ranks = tensor.ranks[:, r]
    if axis is not None and magnitudes.ndim > 2:
        axis = along(magnitudes, axis)
        rows = jnp.moveaxis(magnitudes, axis, -1)
        counts = jnp.broadcast_to(_expanded(ranks, rows[..., 0]), rows.shape[:-1])
        return jnp.moveaxis(top_each(rows, counts, rows.ndim - 1), -1, axis)
    if tensor.thresholds is None:
        return top_each(magnitudes, ranks, 1)
    limit = _expanded(tensor.thresholds[:, r], magnitudes)
    if tensor.ends is not None:
        shape = magnitudes.shape[1:]
        positions = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(1, *shape)
        return (magnitudes > limit) | (magnitudes == limit) & (positions < _expanded(tensor.ends[:, r], magnitudes))
    return _first(magnitudes, limit, ranks)


def along(x: Array, axis: int) -> int:
    """The axis of ``x [N, ...]`` that is ``axis`` of each of its N tensors; of a vector, its only one."""
    axes = x.ndim - 1
    if axes == 1:
        return 1
    if not -axes <= axis < axes:
        raise ValueError(f"axis is {axis}, and a tensor of shape {tuple(x.shape[1:])} has axes 0 to {axes - 1}")
    return axis % axes + 1


def kth_largest(scores: Array, ranks: Array) -> Array:
    """The ``ranks[i]``-th largest entry of each ``scores[i]``, ``[N, 1, ...]``, found by counting rather than sorting."""
    axes = tuple(range(1, scores.ndim))
    return jnp.min(jnp.where(top_each(scores, ranks, 1), scores, jnp.inf), axis=axes, keepdims=True)


def uniform(tensor: Tensor) -> Array:
    """Numbers in [0, 1) of the shape of the deltas, ``[N, ...]``: what every random mask of a rule is made of.

    They depend on the seed, the name of the tensor and the position of the model alone: the same on any devices, and for
    a model whatever others come after it.
    """
    draw = lambda i: jax.random.uniform(jax.random.fold_in(tensor.key, i), tensor.deltas.shape[1:])
    return jax.vmap(draw)(jnp.arange(len(tensor.deltas)))


def l1_matched(deltas: Array, mask: Array) -> Array:
    """The deltas ``[N, ...]`` where ``mask``, times what makes the sum of magnitudes of each what it was: mergekit's `rescale`.

    The factor is 1 where either sum is below 1e-7.
    """
    kept = jnp.where(mask, deltas, 0)
    axes = tuple(range(1, deltas.ndim))
    before, after = (jnp.sum(jnp.abs(x), axis=axes, keepdims=True) for x in (deltas, kept))
    small = (before < _LEAST_SUM) | (after < _LEAST_SUM)
    return kept * jnp.where(small, 1, before / jnp.where(small, 1, after))


def rescaled(deltas: Array, mask: Array, rescale: str, probability: Array) -> Array:
    """The deltas where ``mask``: divided by their ``probability`` to stay, matched in L1 norm, or as they are (``none``)."""
    if rescale == "l1":
        return l1_matched(deltas, mask)
    kept = jnp.where(mask, deltas, 0)
    # Where the probability is zero nothing is kept.
    return kept / jnp.where(probability > 0, probability, 1) if rescale == "probability" else kept


def weighted_sum(tensor: Tensor, deltas: Array, normalize: bool = False) -> Array:
    """``sum_i w_i deltas_i``; with ``normalize`` by the sum of the weights, where that is not zero."""
    total = over_models(tensor.weighted() * deltas)
    if not normalize:
        return total
    weights = jnp.sum(tensor.parameters["weight"])
    # mergekit's limit: weights like 0.1 + 0.2 - 0.3 do not sum to zero exactly.
    return total / jnp.where(jnp.abs(weights) < 1e-8, 1, weights)


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
