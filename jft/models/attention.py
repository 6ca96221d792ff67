"""Attention as every jft model computes it, and the masks that go into it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jft.kernels import attention as blockwise
from jft.kernels.mask import Mask
from jft.models.core import Execution, softmax

Array = jax.Array
__all__ = ["Mask", "attention"]


def attention(
    execution: Execution,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    *,
    scale: float | Array,
    softcap: float | None = None,
    bias: Array | None = None,
) -> Array:
    """``softmax(scale * q k^T + bias) v`` with grouped queries, all scores at once or, if ``execution`` says so, blockwise.

    q ``[B, T, H, K]``, k and v ``[B, S, G, K]`` with H a multiple of G; mask None: every query sees every key; bias
    ``[H, T, S]`` or None. Scores and softmax are float32 or wider; ``softcap`` c replaces a score s by ``c tanh(s / c)``.
    A query that sees nothing (padding) gets the mean of all values: finite, and read by nobody. Returns ``[B, T, H, K]``.
    """
    if execution.attention == "blockwise":
        block = execution.attention_block
        return blockwise.attention(q, k, v, mask, scale=scale, softcap=softcap, bias=bias, block=block)
    B, T, H, K = q.shape
    G = k.shape[2]
    precise = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btghk,bsgk->bghts", q, k, preferred_element_type=precise) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(precise).reshape(1, G, H // G, *bias.shape[1:])
    if mask is not None:
        scores = jnp.where(mask.dense()[:, None, None], scores, jnp.finfo(precise).min)
    weights = softmax(scores)
    out = jnp.einsum("bghts,bsgk->btghk", weights.astype(v.dtype), v, preferred_element_type=precise)
    return out.reshape(B, T, H, K).astype(v.dtype)
