"""`LowRank`: a delta that is a product of two matrices of few columns and rows."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jft.delta.changed import COLUMNS, ROWS, Change, Leaf
from jft.delta.encoding import Encoding
from jft.delta.numeric import inner, matmul, wide
from jft.delta.registry import register, rule
from jft.dot import accumulator, dot, grouped_dot, take

Array = jax.Array


@register("low_rank", data=("a", "b"))
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(Encoding, Change):
    """``delta = a @ b`` on the last two axes: a ``[..., I, r]``, b ``[..., r, O]``, any scale already in ``b``.

    Leading axes (layers, experts) are batched. Sums of two are exact: the factors are concatenated, so ranks add. ``dot``
    goes through r x r Gram matrices, ``sum((a1^T a2) * (b1 b2^T))``; where factors cancel (``x - x``) its rounding error
    is relative to the factors, not to their product.
    """

    a: Array
    b: Array
    factors = ("a", "b")
    leaves: ClassVar[dict[str, Leaf]] = {"a": Leaf((..., ROWS, None)), "b": Leaf((..., None, COLUMNS))}

    def __post_init__(self) -> None:
        a, b = tuple(self.a.shape), tuple(self.b.shape)
        if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2]:
            raise ValueError(
                f"low-rank factors must be [..., I, r] and [..., r, O] with equal leading axes, not {a} and {b}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def dtype(self) -> Any:
        # The wider of the two: scaling widens this factor alone.
        return self.b.dtype

    @property
    def rank(self) -> int:
        """Columns of ``a``: an upper bound on the rank of the delta."""
        return self.a.shape[-1]

    def dense(self) -> Array:
        return matmul(self.a, self.b)

    def whole(self, dtype: Any) -> Array:
        # For programs, in the precision of their other products; `dense`, which is stored and compared, is exact to float32.
        return jnp.matmul(self.a, self.b, preferred_element_type=accumulator(self.b.dtype)).astype(dtype)

    # Never formed: two products more than ``x @ w``, by way of r numbers.

    def product(self, x: Array) -> Array:
        return dot(dot(x, self.a), self.b)

    def grouped_product(self, x: Array, sizes: Array) -> Array:
        return grouped_dot(grouped_dot(x, self.a, sizes), self.b, sizes)

    def rows(self, ids: Array) -> Array:
        return dot(take(self.a, ids, self.a.dtype), self.b)

    def transposed(self) -> LowRank:
        return self._with(a=jnp.swapaxes(self.b, -1, -2), b=jnp.swapaxes(self.a, -1, -2))

    def scaled(self, c: Any) -> LowRank:
        # One factor alone, or the scale would enter twice.
        return self._with(b=wide(self.b) * c)

    def dot_dense(self, value: Array) -> Array:
        # sum((a b) * v) = sum(a * (v b^T)): the product is never formed.
        return inner(self.a, matmul(value, jnp.swapaxes(self.b, -1, -2)))

    def take(self, rows: Array, columns: Array) -> Array:
        return _products(self.a, self.b, rows, columns)


@jax.jit
def _products(a: Array, b: Array, rows: Array, columns: Array) -> Array:
    # One rank at a time: a gathered row of each factor for every entry would take 2r times the entries.
    inputs, rank = a.shape[-2:]
    a, b = wide(a).reshape(-1, rank), wide(b).reshape(-1, *b.shape[-2:])
    add = lambda k, total: total + a[rows, k] * b[rows // inputs, k, columns]
    return jax.lax.fori_loop(0, rank, add, jnp.zeros(rows.shape, jnp.result_type(a, b)))


@rule("+", LowRank, LowRank)
def _concatenate(x: LowRank, y: LowRank) -> LowRank:
    return LowRank(
        jnp.concatenate([wide(x.a), wide(y.a)], axis=-1),
        jnp.concatenate([wide(x.b), wide(y.b)], axis=-2),
    )


@rule("dot", LowRank, LowRank)
def _gram(x: LowRank, y: LowRank) -> Array:
    return inner(matmul(jnp.swapaxes(x.a, -1, -2), y.a), matmul(x.b, jnp.swapaxes(y.b, -1, -2)))
