"""`LowRankWeight`: a weight and a low-rank change of it, as one structured weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jft.models.core import dot, grouped_dot, take, transpose

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankWeight:
    """The structured weight ``w + scale * a @ b``, never formed: ``dot`` costs two thin products more than ``x @ w``.

    w: an array, or a structured weight itself.
    """

    w: Any
    a: Array
    b: Array
    scale: float = dataclasses.field(metadata={"static": True})

    def __jft_dot__(self, x: Array) -> Array:
        return dot(x, self.w) + self.scale * dot(dot(x, self.a), self.b)

    def __jft_grouped_dot__(self, x: Array, sizes: Array) -> Array:
        thin = grouped_dot(grouped_dot(x, self.a, sizes), self.b, sizes)
        return grouped_dot(x, self.w, sizes) + self.scale * thin

    def __jft_take__(self, ids: Array) -> Array:
        rows = take(self.a, ids, self.a.dtype)
        return take(self.w, ids, self.a.dtype) + self.scale * dot(rows, self.b)

    def __jft_transpose__(self) -> LowRankWeight:
        a, b = (jnp.swapaxes(x, -1, -2) for x in (self.b, self.a))
        return LowRankWeight(transpose(self.w), a, b, self.scale)
