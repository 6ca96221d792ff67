"""`Rows`: a delta that is zero but for some rows (of an embedding table), or some layers of a stack."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jft.delta.encoding import Encoding, entry_index
from jft.delta.low_rank import LowRank
from jft.delta.numeric import inner, matmul
from jft.delta.registry import register, rule
from jft.delta.slices import Slicing, matched, union
from jft.delta.sparse import overlaid
from jft.tree import host

Array = jax.Array


@register("rows", data=("indices", "values"), static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Slicing):
    """``delta[indices] = values`` along axis 0, zero elsewhere: indices int32 ``[k]``, values ``[k, *shape[1:]]``.

    The indices are distinct, in any order; what can be looked at is checked. Of a stack ``[L, I, O]`` they are layers;
    rows of its matrices are :class:`jft.delta.Slices`.
    """

    indices: Array
    values: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property

    def _check_shape(self) -> None:
        if not self.shape:
            raise ValueError("rows of a scalar: there are none; Dense fits it")

    @property
    def extent(self) -> int:
        return self.shape[0]

    @property
    def slice_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def at(self) -> tuple:
        return (self.indices,)

    def coordinates(self) -> tuple[Array, Array, Array]:
        indices, values = jnp.asarray(self.indices), jnp.asarray(self.values)
        # A vector is one row, so that what this calls rows are its columns.
        if len(self.shape) == 1:
            return jnp.zeros_like(indices), indices, values
        height, width = math.prod(self.shape[1:-1]), self.shape[-1]
        rows = indices[:, None, None] * height + jnp.arange(height, dtype=jnp.int32)[:, None]
        flat = lambda x: jnp.broadcast_to(x, (len(indices), height, width)).reshape(-1)
        return flat(rows), flat(jnp.arange(width, dtype=jnp.int32)), values.reshape(-1)

    def under(self, above: Encoding) -> Encoding:
        if not isinstance(above, Rows):
            return super().under(above)
        # By whole rows: as entries each value would need coordinates.
        indices, values = overlaid(host(self.indices), host(above.indices), self.values, above.values)
        return self._with(indices=jnp.asarray(indices), values=values)

    def locate(self, rows: Array, columns: Array) -> tuple[Array, ...]:
        return entry_index(self.shape, rows, columns)


rule("+", Rows, Rows)(union)
rule("dot", Rows, Rows)(matched)


@rule("dot", Rows, LowRank)
def _rows_of_product(x: Rows, y: LowRank) -> Array:
    # In a stack the indices are layers, of both factors; in one matrix they are rows, of `a` only.
    b = jnp.asarray(y.b)[x.indices] if len(y.shape) > 2 else y.b
    return inner(matmul(x.values, jnp.swapaxes(b, -1, -2)), jnp.asarray(y.a)[x.indices])
