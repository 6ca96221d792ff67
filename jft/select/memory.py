"""Slots of a memory that new data reads more than old: counts of accesses, TF-IDF, the top rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.dot import dot
from jft.models.core import Hooks, inputs
from jft.models.memory import lookup

Array = jax.Array
# The one product whose outputs decide which slots are read.
QUERIES = "memory/layers/mlp/q"


@dataclasses.dataclass(frozen=True)
class Accesses:
    """Counts of the reads of the S slots of a memory.

    counts: int64 ``[S]``, how often each was read, once for each token, head and layer. batches: int64 ``[S]``, how many
    batches read it at all. size: how many batches there were.
    """

    counts: np.ndarray
    batches: np.ndarray
    size: int

    def __add__(self, other: Accesses) -> Accesses:
        return Accesses(self.counts + other.counts, self.batches + other.batches, self.size + other.size)


def accesses(model: Any, params: Any, batch: Any) -> Array:
    """Reads of each slot by one batch, int32 ``[S]``, over all heads and memory layers; padding reads nothing.

    Pure, so it may be jitted. Raises ValueError for a model without a memory.
    """
    config = getattr(model.config, "backbone", model.config)
    memory = getattr(config, "memory", None)
    if memory is None:
        raise ValueError(
            f"this {config.family!r} model has no memory layers; build a DecoderConfig with memory=Memory(...)"
        )

    def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
        y = dot(x, w)
        return y, y if name == QUERIES else None

    _, reads = model.apply(params, batch, Hooks(product=product))
    keys = params["memory"]["layers"]["mlp"]["keys"]
    # The lookup of the model itself, once more: hooks see products, not what they select.
    slots, _ = jax.vmap(lambda q, k: lookup(q, k, memory))(reads[QUERIES], keys)
    is_token = jnp.broadcast_to(inputs(batch).segments > 0, slots.shape[1:3])
    reads_per_slot = jnp.broadcast_to(is_token[None, :, :, None, None], slots.shape).astype(jnp.int32)
    return jnp.zeros(memory.slots, jnp.int32).at[slots.reshape(-1)].add(reads_per_slot.reshape(-1))


@functools.partial(jax.jit, static_argnames="model")
def _accesses(model: Any, params: Any, batch: Any) -> Array:
    return accesses(model, params, batch)


def slot_counts(model: Any, params: Any, batches: Iterable[Any]) -> Accesses:
    """The :class:`Accesses` of ``batches``, exact in 64 bits. Raises ValueError where there are none."""
    total = None
    for batch in batches:
        # int32 is enough for a batch, the sum of many is on the host.
        counts = np.asarray(_accesses(model, params, batch)).astype(np.int64)
        one = Accesses(counts, (counts > 0).astype(np.int64), 1)
        total = one if total is None else total + one
    if total is None:
        raise ValueError("there are no batches to count the accesses of")
    return total


def tf_idf(counts: Any, batches: Any, size: Any) -> Any:
    """``counts_i / sum_j counts_j * log((size + 1) / (batches_i + 1))``: the TF-IDF of reads of the new data, ``[S]``.

    counts: reads of each slot by the new data. batches: how many of ``size`` batches of background data, such as
    pretraining data, read the slot (Lin et al. 2025, arXiv:2510.15103, who score every training batch by itself against
    1000 of them). NumPy arrays give float64; JAX arrays float32, and may be traced. Without any read all scores are 0.
    """
    xp: Any = jnp if isinstance(counts, jax.Array) or isinstance(batches, jax.Array) else np
    dtype = np.float64 if xp is np else jnp.float32
    counts, batches, size = (xp.asarray(x).astype(dtype) for x in (counts, batches, size))
    # The ones are as in the paper: a slot that no batch read divides by 1.
    return counts / xp.maximum(xp.sum(counts), 1) * xp.log((size + 1) / (batches + 1))


def top_rows(scores: Any, count: int) -> Any:
    """The ``count`` rows with the largest of ``scores[S]``, ascending int32; of equal scores the lower row.

    Raises ValueError for a count that is not 1 to S.
    """
    size = scores.shape[-1]
    if not 1 <= count <= size:
        raise ValueError(f"{count} rows of a table of {size}; choose 1 to {size}")
    xp: Any = jnp if isinstance(scores, jax.Array) else np
    if xp is jnp:
        # `top_k` takes the lower index of equals, as the stable sort below does.
        return jnp.sort(jax.lax.top_k(scores, count)[1]).astype(jnp.int32)
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int32)
