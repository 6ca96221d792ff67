"""Attention as every jft model computes it, and the masks that go into it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jft.models.core import softmax

Array = jax.Array


def mask(
    q_positions: Array,
    k_positions: Array,
    q_segments: Array,
    k_segments: Array,
    *,
    causal: bool,
    window: Array | int | None = None,
) -> Array:
    """Which keys each query may see: bool ``[B, T, S]``.

    Positions and segments are int ``[B, T]`` (``[B, S]`` for keys); segment 0 is padding and is seen by nobody. A query
    sees keys of its own segment, at ``k <= q`` if causal, and at ``|q - k| < window`` where a window is given
    (an int or a traced scalar, so that layers of a scan may differ).
    """
    visible = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0)
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= jnp.abs(distance) < window
    return visible


def attention(
    q: Array,
    k: Array,
    v: Array,
    visible: Array | None,
    *,
    scale: float | Array,
    softcap: float | None = None,
    bias: Array | None = None,
) -> Array:
    """``softmax(scale * q k^T + bias) v`` with grouped queries.

    q ``[B, T, H, K]``, k and v ``[B, S, G, K]`` with H a multiple of G; ``visible`` bool ``[B, T, S]`` or None; bias
    ``[H, T, S]`` or None. Scores and softmax are float32; ``softcap`` c replaces a score s by ``c tanh(s / c)``.
    A query that sees nothing (padding) gets the mean of all values: finite, and read by nobody. Returns ``[B, T, H, K]``.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    precise = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btghk,bsgk->bghts", q, k, preferred_element_type=precise) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(precise).reshape(1, G, H // G, *bias.shape[1:])
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(precise).min)
    weights = softmax(scores)
    out = jnp.einsum("bghts,bsgk->btghk", weights.astype(v.dtype), v, preferred_element_type=precise)
    return out.reshape(B, T, H, K).astype(v.dtype)
