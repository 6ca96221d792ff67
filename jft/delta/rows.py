"""`Rows`: a delta that is zero but for some rows (of an embedding table), or some layers of a stack."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta.encoding import Encoding, concrete, count_nonzero, inner, matmul, register, rule, wide
from jft.delta.low_rank import LowRank

Array = jax.Array


@register("rows", data=("indices", "values"), static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Encoding):
    """``delta[indices] = values`` along axis 0, zero elsewhere: indices int32 ``[k]``, values ``[k, *shape[1:]]``.

    The indices are distinct and in ``[0, shape[0])``; what can be looked at is checked. The sum of two is the union of
    their rows; under ``jit``, where the union has no static size, it is a :class:`jft.delta.Sum`.
    """

    indices: Array
    values: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        k = tuple(self.indices.shape)
        if len(k) != 1 or tuple(self.values.shape) != (*k, *self.shape[1:]) or not self.shape:
            raise ValueError(
                f"rows of a weight of shape {self.shape} need indices [k] and values [k, *{self.shape[1:]}], "
                f"not {k} and {tuple(self.values.shape)}"
            )
        if not concrete(self.indices) or not k[0]:
            return
        indices = np.asarray(self.indices)
        if indices.min() < 0 or indices.max() >= self.shape[0]:
            raise ValueError(f"row indices {indices.min()}..{indices.max()} leave the {self.shape[0]} rows there are")
        if len(np.unique(indices)) != len(indices):
            raise ValueError("row indices must be distinct; add the rows that belong together first")

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def dense(self) -> Array:
        values = wide(self.values)
        return jnp.zeros(self.shape, values.dtype).at[self.indices].set(values, unique_indices=True)

    def scaled(self, c: Any) -> Rows:
        return self._with(values=wide(self.values) * c)

    def add_to(self, w: Array) -> Array:
        return w.at[self.indices].add(wide(self.values), unique_indices=True)

    def dot_dense(self, value: Array) -> Array:
        return inner(self.values, jnp.asarray(value)[self.indices])

    @property
    def nnz(self) -> int:
        return count_nonzero(jnp.asarray(self.values))


@rule("+", Rows, Rows)
def _union(x: Rows, y: Rows) -> Rows | None:
    if not (concrete(x.indices) and concrete(y.indices)):
        return None
    i, j = np.asarray(x.indices), np.asarray(y.indices)
    union = np.union1d(i, j)
    shape = (len(union), *x.shape[1:])
    values = jnp.zeros(shape, jnp.promote_types(wide(x.values).dtype, wide(y.values).dtype))
    values = values.at[np.searchsorted(union, i)].add(wide(x.values), unique_indices=True)
    values = values.at[np.searchsorted(union, j)].add(wide(y.values), unique_indices=True)
    return x._with(indices=jnp.asarray(union, jnp.int32), values=values)


@rule("dot", Rows, Rows)
def _matched(x: Rows, y: Rows) -> Array:
    # A row of y for each row of the weight; the last, zero, stands for the rows y does not have.
    count = y.indices.shape[0]
    if not count:
        return jnp.float32(0)
    place = jnp.full(x.shape[0], count, jnp.int32).at[y.indices].set(jnp.arange(count, dtype=jnp.int32))
    match = place[x.indices]
    rows = jnp.take(wide(y.values), match, axis=0, mode="fill", fill_value=0)
    return inner(x.values, rows)


@rule("dot", Rows, LowRank)
def _rows_of_product(x: Rows, y: LowRank) -> Array:
    b = jnp.asarray(y.b)[x.indices] if len(y.shape) > 2 else y.b
    return inner(matmul(x.values, jnp.swapaxes(b, -1, -2)), jnp.asarray(y.a)[x.indices])
