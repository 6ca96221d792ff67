"""PCB-Merging: coefficients of single entries, from how they compete within a task and between tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, in_range, over_models
from jft.merge.trim import kth_largest

Array = jax.Array
Numbers = Mapping[str, np.ndarray]

# The released code clips the largest and the smallest 0.01% of the magnitudes of a task.
_CLIPPED = 1e-4


@register(paper="Du et al. 2024, arXiv:2410.02396")
def pcb(
    *,
    density: Any = 0.1,
    balance: Literal["softmax", "tanh"] = "softmax",
    scope: Literal["model", "tensor"] = "model",
) -> Rule:
    """``sum_i beta_i tau_i / sum_i beta_i``, entry by entry, over the ``density`` of the largest ``beta_i`` of each task.

    ``softmax``, the paper: ``beta_i = softmax(N norm(tau_i tau_i)) sum_j softmax(norm(tau_i tau_j))``, the first factor the
    balance within task i of N, the second that between tasks; products, norm (to [0, 1], by the least and the largest entry)
    and softmax go over the entries; other entries of ``beta_i`` become zero.

    ``tanh``, the released code: magnitudes are first clipped to all but the largest and the smallest 0.01%, ``beta_i =
    exp(N norm(|tau_i|)^2) tanh(tau_i sum_j tau_j)``, and of it what exceeds the threshold of ``density``, normed to [0, 1]. So
    the entry at the threshold has the coefficient 0, an entry against the majority is dropped as a rule, and the result is
    not that of ``c tau`` over c.

    density: the ratio r of the paper (its code: 0.1, and 0.05 for vision), one number or one per model. weights multiply the
    deltas first. scope: the entries that compete are those of the whole ``model``, one vector for each task (the paper and its
    code), which is read four times before it is merged; or those of each ``tensor``.

    Du et al. 2024, arXiv:2410.02396; released code duguodong7/pcb-merging.
    """
    in_range("density", density, 0, 1)
    whole = scope == "model"
    passes = {
        "softmax": (Pass(_extremes, reduce="max"), Pass(_sums), Pass(_beta, _kept)),
        "tanh": (Pass(_sizes, _clipped), Pass(_score, _cut)),
    }
    return Rule(
        merge=_softmax if balance == "softmax" else _tanh,
        options={"scope": scope},
        parameters={"density": density},
        ranks=None if whole else _kept if balance == "softmax" else _clipped_and_cut,
        passes=passes[balance] if whole else (),
    )


def _kept(entries: int, parameters: Numbers) -> np.ndarray:
    """The rank, from the largest, of the threshold."""
    density = parameters["density"]
    return (entries - np.minimum((entries * (1 - density)).astype(np.int64), entries - 1))[:, None]


def _cut(entries: int, parameters: Numbers) -> np.ndarray:
    """The ranks of the threshold and of the largest."""
    return np.pad(_kept(entries, parameters), ((0, 0), (0, 1)), constant_values=1)


def _clipped(entries: int, parameters: Numbers) -> np.ndarray:
    """The ranks of the two magnitudes to which others are clipped."""
    high = entries - int(entries * (1 - _CLIPPED) - 1)
    return np.tile([high, entries - int(entries * _CLIPPED)], (len(parameters["density"]), 1))


def _clipped_and_cut(entries: int, parameters: Numbers) -> np.ndarray:
    return np.concatenate([_clipped(entries, parameters), _cut(entries, parameters)], axis=1)


def _softmax(tensor: Tensor, scope: str) -> Array:
    if scope == "tensor":
        assert tensor.ranks is not None, "the ranks of each tensor are known"
        ranks = tensor.ranks[:, 0]
        for function in (_extremes, _sums):
            tensor = tensor._replace(passes=(*tensor.passes, function(tensor)))
        beta = _beta(tensor)
        limit = kth_largest(beta, ranks)
    else:
        assert tensor.scores is not None, "the coefficients of the model are ranked"
        beta, limit = tensor.scores, _column(tensor, tensor.passes[2])
    return _mean(jnp.where(beta >= limit, beta, 0), _weighted(tensor))


def _extremes(tensor: Tensor, **_: Any) -> tuple[Array, Array]:
    """The largest of ``tau_i tau_j`` and of its negative, ``[N, N]`` each."""
    deltas, axes = _weighted(tensor), tuple(range(1, tensor.deltas.ndim))
    products = [deltas * other for other in deltas]
    largest = lambda xs: jnp.stack([jnp.max(x, axis=axes, initial=-jnp.inf) for x in xs])
    return largest(products), largest([-x for x in products])


def _powers(tensor: Tensor) -> list[Array]:
    """``exp`` of the normed products, each ``[N, ...]``: within the tasks, then with each of them; all at most 1."""
    deltas, (high, negative) = _weighted(tensor), tensor.passes[0]
    count, span = len(deltas), high + negative

    def power(x: Array, span: Array, negative: Array, factor: int) -> Array:
        normed = (x + _column(tensor, negative)) / _column(tensor, jnp.where(span == 0, 1, span))
        return jnp.exp(factor * (normed - 1))

    within = power(deltas * deltas, jnp.diagonal(span), jnp.diagonal(negative), count)
    return [within, *(power(deltas * deltas[j], span[j], negative[j], 1) for j in range(count))]


def _sums(tensor: Tensor, **_: Any) -> tuple[Array, Array]:
    """What the softmaxes divide by, ``[1 + N, N]``, and how many entries that sums up."""
    axes = tuple(range(1, tensor.deltas.ndim))
    entries = jnp.float32(tensor.deltas[0].size)
    return jnp.stack([jnp.sum(x, axis=axes) for x in _powers(tensor)]), entries


def _beta(tensor: Tensor, **_: Any) -> Array:
    sums, entries = tensor.passes[1]
    # Times the number of entries, which cancels: 1 / n is small, and its product with another smaller.
    within, *between = (x / _column(tensor, s / entries) for x, s in zip(_powers(tensor), sums, strict=True))
    return within * sum(between[1:], between[0])


def _tanh(tensor: Tensor, scope: str) -> Array:
    if scope == "tensor":
        assert tensor.ranks is not None, "the ranks of each tensor are known"
        clipped, cut = jnp.split(tensor.ranks, 2, axis=1)
        for function, ranks in ((_sizes, clipped), (_score, cut)):
            score = function(tensor)
            values = [kth_largest(score, ranks[:, r]).reshape(-1) for r in (0, 1)]
            tensor = tensor._replace(passes=(*tensor.passes, jnp.stack(values, axis=-1)), scores=score)
    assert tensor.scores is not None, "the coefficients are ranked"
    low, high = (_column(tensor, tensor.passes[1][:, r]) for r in (0, 1))
    beta = (jnp.maximum(tensor.scores, low) - low) / jnp.where(high == low, 1, high - low)
    return _mean(beta, jnp.sign(_weighted(tensor)) * _clip(tensor))


def _sizes(tensor: Tensor, **_: Any) -> Array:
    return jnp.abs(_weighted(tensor))


def _clip(tensor: Tensor) -> Array:
    high, low = (_column(tensor, tensor.passes[0][:, r]) for r in (0, 1))
    return jnp.clip(_sizes(tensor), low, high)


def _score(tensor: Tensor, **_: Any) -> Array:
    deltas = _weighted(tensor)
    high, low = (_column(tensor, tensor.passes[0][:, r]) for r in (0, 1))
    size = (_clip(tensor) - low) / jnp.where(high == low, 1, high - low)
    return jnp.exp(len(deltas) * jnp.square(size)) * jnp.tanh(deltas * over_models(deltas))


def _weighted(tensor: Tensor) -> Array:
    return tensor.weighted() * tensor.deltas


def _column(tensor: Tensor, x: Array) -> Array:
    """``[N]`` with axes of size one, to be computed with the deltas."""
    return x.reshape(-1, *(1,) * (tensor.deltas.ndim - 1))


def _mean(beta: Array, deltas: Array) -> Array:
    share = over_models(beta)
    return over_models(beta * deltas) / jnp.where(share > 0, share, 1)
