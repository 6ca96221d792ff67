"""`Product`: a delta that is a product of two matrices, each in an encoding of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft.delta.changed import Change
from jft.delta.encoding import Encoding, pack_parts, standing_alone, unpack_parts
from jft.delta.low_rank import LowRank
from jft.delta.registry import by_rule, register, rule

Array = jax.Array


@register("product", data=("a", "b"))
@dataclasses.dataclass(frozen=True, eq=False)
class Product(Encoding):
    """``delta = a @ b`` on the last two axes, a ``[..., I, r]`` and b ``[..., r, O]``: a :class:`LowRank` of quantized factors.

    What needs the factors goes through :attr:`low_rank`; the product is formed only where a dense delta is wanted.
    """

    a: Encoding
    b: Encoding

    def __post_init__(self) -> None:
        standing_alone("a factor", self.a, self.b)
        a, b = self.a.shape, self.b.shape
        if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2]:
            raise ValueError(f"factors must be [..., I, r] and [..., r, O] with equal leading axes, not {a} and {b}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.a.dtype, self.b.dtype)

    @property
    def low_rank(self) -> LowRank:
        """The same with both factors dense."""
        return LowRank(self.a.dense(), self.b.dense())

    def dense(self) -> Array:
        return self.low_rank.dense()

    def scaled(self, c: Any) -> Product:
        # One factor alone, or the scale would enter twice.
        return self._with(b=self.b.scaled(c))

    def stacked(self) -> Change:
        return self.low_rank

    def dot_dense(self, value: Array) -> Array:
        return self.low_rank.dot_dense(value)

    def take(self, rows: Array, columns: Array) -> Array:
        return self.low_rank.take(rows, columns)

    def pack(self) -> tuple[dict[str, Array], dict[str, Any]]:
        return pack_parts((self.a, self.b))

    @classmethod
    def unpack(cls, tensors: Mapping[str, Any], static: Mapping[str, Any]) -> Product:
        parts = unpack_parts(tensors, static)
        if len(parts) != 2:
            raise ValueError(f"a product has two factors, not {len(parts)}")
        return cls(*parts)


@rule("dot", Product, Product)
def _dot(x: Product, y: Product) -> Array:
    return by_rule("dot", x.low_rank, y.low_rank)


@rule("dot", Product, LowRank)
def _dot_with_low_rank(x: Product, y: LowRank) -> Array:
    return by_rule("dot", x.low_rank, y)
