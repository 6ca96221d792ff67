"""Arcee Fusion: of one model's changes only the important ones, by a threshold that each tensor sets itself."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor
from jft.merge.trim import along, kth_largest

Array = jax.Array


@register(paper="Goddard et al. 2024, arXiv:2403.13257 (mergekit)", presets={"mergekit": {}})
def arcee_fusion(*, axis: int = -1) -> Rule:
    """``tau`` where ``importance >= median + 1.5 (q3 - q1)``, of one model; base is needed.

    ``importance = |tau| KL(p || q)``, with p and q the softmax of each row of ``base + tau`` and of the base, each plus 1e-8;
    median and quartiles q1, q3 are those of the importance of all entries of the tensor, entry ``floor(f (n - 1))`` of the
    sorted n. axis: rows go along this axis: the last in ``[out, in]``, as the files of torch have it, 0 in a weight ``[in,
    out]`` of jft: the inputs of one output in both. A vector is one row. The weight multiplies tau first.

    mergekit estimates the quartiles of a tensor of more than a million entries from a random sample; here they are exact, so
    that the same models give the same result. The divergence is computed as ``sum p (t - log(1 + t))`` with ``t = q/p - 1``,
    which is that of mergekit without its cancellation, by which rows that hardly change are ranked by their rounding errors.
    """
    return Rule(merge=_fusion, options={"axis": axis}, ranks=_ranks, base=True, models=(1, 1))


def _ranks(entries: int, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    """The ranks, from the largest, of the first quartile, the median and the third quartile."""
    return np.asarray([[entries - int(f * (entries - 1)) for f in (0.25, 0.5, 0.75)]])


def _fusion(tensor: Tensor, axis: int) -> Array:
    assert tensor.ranks is not None and tensor.base is not None, "the rule has ranks and reads the base"
    deltas = tensor.weighted() * tensor.deltas
    base = tensor.base[None]
    # A scalar is a row of one, which does not diverge.
    rows = along(deltas, axis) if deltas.ndim > 1 else 0
    importance = jnp.abs(deltas) * _divergence(base + deltas, base, rows)
    q1, median, q3 = (kth_largest(importance, tensor.ranks[:, r]) for r in range(3))
    return jnp.where(importance >= median + 1.5 * (q3 - q1), deltas, 0)[0]


def _divergence(x: Array, y: Array, axis: int) -> Array:
    p, q = (jax.nn.softmax(z, axis=axis) + 1e-8 for z in (x, y))
    t = (q - p) / p
    # p and q have equal sums, so that the sum of p t is zero: what is added to each term, never negative, adds nothing.
    return jnp.sum(p * (t - jnp.log1p(t)), axis=axis, keepdims=True)
