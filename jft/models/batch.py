"""What every token model reads from a batch: tokens, segments, positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Inputs(NamedTuple):
    """Token inputs, all int32 ``[B, T]``; ``segments`` may be ``[1, T]`` where every row is one unpadded sequence.

    plain: no segments and no positions were given: position t is t and nothing is padded.
    """

    tokens: Array
    segments: Array
    positions: Array
    plain: bool


def inputs(batch: Any, prefix: str = "") -> Inputs:
    """Tokens with their segments and positions, from a batch: an integer array ``[B, T]``, or a dict.

    ``segments`` (0: padding; 1, 2, ...: the sequences packed in a row) default to one segment, or, where ``positions``
    are given, to a new one wherever positions fall back. ``positions`` default to counting from the start of each
    segment. ``prefix`` is that of the keys (``decoder_``). Raises ValueError for a missing key, a wrong shape or dtype.
    """
    given = batch if hasattr(batch, "keys") else {"tokens": batch}
    if prefix + "tokens" not in given:
        raise ValueError(f"the batch has no {prefix + 'tokens'!r}, only {sorted(given)}")
    tokens = _integers(given[prefix + "tokens"], prefix + "tokens")
    segments, positions = (given.get(prefix + key) for key in ("segments", "positions"))
    if segments is None and positions is None:
        T = tokens.shape[1]
        return Inputs(tokens, jnp.ones((1, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None], True)
    if positions is not None:
        positions = _integers(positions, prefix + "positions", tokens.shape)
    if segments is None and positions is not None:
        falls = jnp.pad(positions[:, 1:] <= positions[:, :-1], ((0, 0), (1, 0)))
        segments = 1 + jnp.cumsum(falls, axis=1, dtype=jnp.int32)
    segments = _integers(segments, prefix + "segments", tokens.shape)
    return Inputs(tokens, segments, count_within(segments) if positions is None else positions, False)


def count_within(segments: Array) -> Array:
    """Positions ``[B, T]`` that restart at 0 wherever the segment changes."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _integers(x: Any, name: str, shape: tuple[int, ...] | None = None) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers; got {x.dtype}")
    if x.ndim != 2 or (shape is not None and x.shape != shape):
        raise ValueError(f"{name} must have shape {shape or '[B, T]'}; got {x.shape}")
    return x.astype(jnp.int32)
