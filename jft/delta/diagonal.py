"""`DiagonalBlocks`: a delta that is zero but for blocks on the diagonal of each matrix."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jft.delta.changed import Change, Leaf
from jft.delta.encoding import Encoding
from jft.delta.numeric import count_nonzero, inner, wide
from jft.delta.registry import register, rule
from jft.dot import accumulator, grouped_dot

Array = jax.Array


@register("diagonal_blocks", data=("blocks",))
@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalBlocks(Encoding, Change):
    """``blockdiag(D_1, ..., D_N)`` on the last two axes: blocks ``[*lead, N, I/N, O/N]`` of a weight ``[*lead, I, O]``."""

    blocks: Array
    factors = ("blocks",)
    # A block spans part of both axes, so none of its axes can be sharded as the weight's are.
    leaves = Leaf((..., None, None, None))

    def __post_init__(self) -> None:
        if len(self.blocks.shape) < 3:
            raise ValueError(f"diagonal blocks are [*lead, N, I/N, O/N], not of shape {tuple(self.blocks.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, n, height, width = self.blocks.shape
        return (*lead, n * height, n * width)

    @property
    def dtype(self) -> Any:
        return self.blocks.dtype

    def whole(self, dtype: Any) -> Array:
        n = self.blocks.shape[-3]
        # An outer product with the identity: `block_diag` takes no leading axes.
        blocks = self.blocks.astype(dtype)[..., None, :] * jnp.eye(n, dtype=dtype)[:, None, :, None]
        return blocks.reshape(self.shape)

    def product(self, x: Array) -> Array:
        n, height, _ = self.blocks.shape
        parts = x.reshape(*x.shape[:-1], n, height)
        # As `dot` does: sums in float32, the result in the dtype of x.
        precise = accumulator(x.dtype)
        y = jnp.einsum("...ni,nio->...no", parts, self.blocks.astype(x.dtype), preferred_element_type=precise)
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)

    def grouped_product(self, x: Array, sizes: Array) -> Array:
        n, height = self.blocks.shape[1:3]
        parts = x.reshape(x.shape[0], n, height)
        # One product for each block: `ragged_dot` takes one matrix per group, and no batch of them.
        return jnp.concatenate([grouped_dot(parts[:, i], self.blocks[:, i], sizes) for i in range(n)], axis=-1)

    def rows(self, ids: Array) -> Array:
        n, height, _ = self.blocks.shape
        block, row = ids // height, ids % height
        # A comparison in place of a scatter: XLA fuses it into the select.
        is_block = block[..., None] == jnp.arange(n)
        values = jnp.where(is_block[..., None], self.blocks[block, row][..., None, :], 0)
        return values.reshape(*ids.shape, -1)

    def transposed(self) -> DiagonalBlocks:
        return self._with(blocks=jnp.swapaxes(self.blocks, -1, -2))

    def dense(self) -> Array:
        return self.whole(wide(self.blocks).dtype)

    def scaled(self, c: Any) -> DiagonalBlocks:
        return self._with(blocks=wide(self.blocks) * c)

    def dot_dense(self, value: Array) -> Array:
        *lead, n, height, width = self.blocks.shape
        blocks = jnp.asarray(value).reshape(*lead, n, height, n, width)
        # `jnp.diagonal` puts the axis of blocks last.
        return inner(self.blocks, jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3))

    @property
    def nnz(self) -> int:
        return count_nonzero(jnp.asarray(self.blocks))


@rule("+", DiagonalBlocks, DiagonalBlocks)
def _sum(x: DiagonalBlocks, y: DiagonalBlocks) -> DiagonalBlocks | None:
    return x._with(blocks=wide(x.blocks) + wide(y.blocks)) if x.blocks.shape == y.blocks.shape else None


@rule("dot", DiagonalBlocks, DiagonalBlocks)
def _dot(x: DiagonalBlocks, y: DiagonalBlocks) -> Array | None:
    return inner(x.blocks, y.blocks) if x.blocks.shape == y.blocks.shape else None
