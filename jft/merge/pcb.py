"""PCB-Merging: coefficients of single entries, from how they compete within a task and between tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range, over_models
from jft.merge.trim import kth_largest

Array = jax.Array

# The released code clips the largest and the smallest 0.01% of the magnitudes of a task.
_CLIPPED = 1e-4


@register(paper="Du et al. 2024, arXiv:2410.02396")
def pcb(*, density: Any = 0.1, balance: Literal["softmax", "tanh"] = "softmax") -> Rule:
    """``sum_i beta_i tau_i / sum_i beta_i``, entry by entry, over the ``density`` of the largest ``beta_i`` of each task.

    ``softmax``, the paper: ``beta_i = softmax(N norm(tau_i tau_i)) sum_j softmax(norm(tau_i tau_j))``, the first factor the
    balance within task i of N, the second that between tasks; products, norm (to [0, 1], by the least and the largest entry)
    and softmax go over the entries of a tensor; other entries of ``beta_i`` become zero.

    ``tanh``, the released code: magnitudes are first clipped to all but the largest and the smallest 0.01%, ``beta_i =
    exp(N norm(|tau_i|)^2) tanh(tau_i sum_j tau_j)``, and of it what exceeds the threshold of ``density``, normed to [0, 1]. So
    the entry at the threshold has the coefficient 0, an entry against the majority is dropped as a rule, and the result is
    not that of ``c tau`` over c.

    density: the ratio r of the paper (its code: 0.1, and 0.05 for vision), one number or one per model. weights multiply the
    deltas first. Here the tensors compete each by itself; the paper has one vector of the whole model.

    Du et al. 2024, arXiv:2410.02396; released code duguodong7/pcb-merging.
    """
    in_range("density", density, 0, 1)
    return Rule(merge=_pcb, options={"balance": balance}, parameters={"density": density}, ranks=_ranks)


def _ranks(entries: int, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    """The ranks, from the largest, of the threshold and of the two magnitudes to which others are clipped."""
    density = parameters["density"]
    kept = entries - np.minimum((entries * (1 - density)).astype(np.int64), entries - 1)
    high = entries - int(entries * (1 - _CLIPPED) - 1)
    low = entries - int(entries * _CLIPPED)
    return np.stack([kept, np.full_like(kept, high), np.full_like(kept, low)], axis=-1)


def _normed(x: Array) -> Array:
    """Each ``x[i]`` moved and scaled to [0, 1]; zero where all its entries are equal."""
    axes = tuple(range(1, x.ndim))
    low, high = jnp.min(x, axis=axes, keepdims=True), jnp.max(x, axis=axes, keepdims=True)
    return (x - low) / jnp.where(high == low, 1, high - low)


def _softmax(x: Array) -> Array:
    # Times the number of entries, which cancels: 1 / n is small, and its product with another smaller.
    e = jnp.exp(x - jnp.max(x, axis=tuple(range(1, x.ndim)), keepdims=True))
    return e / jnp.mean(e, axis=tuple(range(1, x.ndim)), keepdims=True)


def _pcb(tensor: Tensor, balance: str) -> Array:
    assert tensor.ranks is not None, "the ranks of this rule are always known"
    deltas, ranks = tensor.weighted() * tensor.deltas, tensor.ranks
    if balance == "softmax":
        within = _softmax(len(deltas) * _normed(deltas * deltas))
        between = sum((_softmax(_normed(deltas * other)) for other in deltas), jnp.zeros_like(deltas))
        beta = within * between
        beta = jnp.where(beta >= kth_largest(beta, ranks[:, 0]), beta, 0)
    else:
        magnitudes = jnp.abs(deltas)
        high, low = (kth_largest(magnitudes, ranks[:, r]) for r in (1, 2))
        magnitudes = jnp.clip(magnitudes, low, high)
        beta = jnp.exp(len(deltas) * jnp.square(_normed(magnitudes))) * jnp.tanh(deltas * over_models(deltas))
        beta = _normed(jnp.maximum(beta, kth_largest(beta, ranks[:, 0])))
        deltas = jnp.sign(deltas) * magnitudes
    share = over_models(beta)
    return over_models(beta * deltas) / jnp.where(share > 0, share, 1)
