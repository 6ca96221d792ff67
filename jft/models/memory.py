"""Memory layers: a large table of values, of which each token reads the few whose keys fit best, in place of an MLP."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jft.dot import take
from jft.models.core import Params, Scope

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Memory:
    """The layers of a decoder that have a memory instead of an MLP, and its sizes (Berges et al. 2024, arXiv:2412.09764).

    One table of ``slots`` S values, ``value_size`` V numbers each (0: the width of the model), which the memory ``layers``
    share; each has its own queries and keys. A token has ``heads`` H queries of ``key_size`` K, and each reads the
    ``top_k`` k best slots. Keys are product keys (Lample et al. 2019, arXiv:1907.05242): slot ``i n + j`` has the key
    ``(keys[0, i], keys[1, j])`` with n = sqrt(S), so that exactly the k best of S are found by 2 n products of K / 2.
    """

    slots: int
    layers: tuple[int, ...]
    heads: int = 4
    top_k: int = 32
    key_size: int = 512
    value_size: int = 0

    def __post_init__(self) -> None:
        """``ValueError`` for sizes that do not fit together."""
        # In order, so that configs which mean the same are equal.
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))
        if self.slots < 1 or math.isqrt(self.slots) ** 2 != self.slots:
            near = max(1, math.isqrt(max(self.slots, 1))) ** 2
            raise ValueError(f"slots is {self.slots}; product keys need a square number, such as {near}")
        if not 1 <= self.top_k <= self.side:
            raise ValueError(f"top_k is {self.top_k}; choose 1 to {self.side}, the square root of slots")
        if self.heads < 1 or self.key_size < 2 or self.key_size % 2:
            raise ValueError(
                f"heads is {self.heads} and key_size {self.key_size}; choose at least 1, and an even number"
            )
        if not self.layers or len(set(self.layers)) < len(self.layers) or self.layers[0] < 0:
            raise ValueError(f"memory layers are {self.layers}; name at least one, each once, counted from 0")

    @property
    def side(self) -> int:
        """Keys in each half: the square root of the number of slots."""
        return math.isqrt(self.slots)

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a memory layer in place of an MLP of that ``width``; the table is no part of the layers."""
        V = self.value_size or width
        return {
            "mlp/q/w": (width, self.heads * self.key_size),
            "mlp/keys": (self.heads, 2, self.side, self.key_size // 2),
            "mlp/gate/w": (width, V),
            "mlp/down/w": (V, width),
        }

    def pieces(self, layers: int) -> list[tuple[bool, int, int, int]]:
        """Runs of layers of a kind, in order: whether they have a memory, their first, and their range in their own stack."""
        out, counts = [], {True: 0, False: 0}
        for has_memory, group in itertools.groupby(range(layers), key=lambda i: i in self.layers):
            index = list(group)
            out.append((has_memory, index[0], counts[has_memory], counts[has_memory] + len(index)))
            counts[has_memory] += len(index)
        return out


def lookup(queries: Array, keys: Array, memory: Memory) -> tuple[Array, Array]:
    """The slots that each query reads, and how much of each: int32 and float32 ``[..., H, k]``.

    queries ``[..., H K]``, keys ``[H, 2, n, K/2]``. The score of slot ``i n + j`` is the product of the query with its key;
    of the k largest the softmax is taken. The k best slots are among the k x k pairs of the k best halves.
    """
    precise = jnp.promote_types(queries.dtype, jnp.float32)
    q = queries.reshape(*queries.shape[:-1], memory.heads, 2, memory.key_size // 2)
    halves = jnp.einsum("...hsk,hsnk->...hsn", q, keys.astype(q.dtype), preferred_element_type=precise)
    best, index = jax.lax.top_k(halves, memory.top_k)
    pairs = best[..., 0, :, None] + best[..., 1, None, :]
    scores, pair = jax.lax.top_k(pairs.reshape(*pairs.shape[:-2], -1), memory.top_k)
    first, second = (
        jnp.take_along_axis(index[..., half, :], position, axis=-1)
        for half, position in enumerate((pair // memory.top_k, pair % memory.top_k))
    )
    return (first * memory.side + second).astype(jnp.int32), jax.nn.softmax(scores, axis=-1)


def remember(scope: Scope, name: str, x: Array, params: Params, table: Any, memory: Memory) -> Array:
    """``(silu(x gate) * sum_i w_i table[i]) down`` over the slots i that ``x[B, T, D]`` reads with all heads.

    Params as :meth:`Memory.shapes`; ``table[S, V]`` an array or a structured weight. The rows read by all tokens exist at
    once: ``B T H k V`` numbers, kept for the backward pass unless the layer is recomputed (remat).
    """
    slots, weights = lookup(scope.dot(f"{name}/q", x, params["q"]), params["keys"], memory)
    read = jnp.einsum("bthk,bthkv->btv", weights.astype(x.dtype), take(table, slots, x.dtype))
    return scope.dot(f"{name}/down", jax.nn.silu(scope.dot(f"{name}/gate", x, params["gate"])) * read, params["down"])
