"""`BitMask`: a delta that sets weights of the base to zero, one bit per weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.delta.registry import register
from jft.delta.relative import Relative
from jft.tree import host

Array = jax.Array


@register("bit_mask", data=("bits", "scale"), static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class BitMask(Relative):
    """``delta = scale * (mask - 1) * base``: with ``scale`` 1, weights where the mask is 0 become zero, others stay.

    bits: uint8 ``[*shape[:-1], ceil(shape[-1] / 8)]``, the mask packed along its last axis (``jnp.packbits``), so that it
    shards with its weight; scale: a float32 scalar. :meth:`of` packs a mask.
    """

    bits: Array
    scale: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property

    def __post_init__(self) -> None:
        # A file gives the shape as a list; static fields must hash.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        # A scalar has no last axis to pack; None equals no shape, so the check refuses it.
        expected = (*self.shape[:-1], -(-self.shape[-1] // 8)) if self.shape else None
        if tuple(self.bits.shape) != expected or self.bits.dtype != jnp.uint8 or jnp.shape(self.scale):
            raise ValueError(
                f"the mask of a weight of shape {self.shape} is uint8 {expected} (BitMask.of packs one) with a scalar scale, "
                f"not {self.bits.dtype} {tuple(self.bits.shape)} and scale {jnp.shape(self.scale)}"
            )

    @classmethod
    def of(cls, mask: Array, scale: Any = 1.0) -> BitMask:
        """From a bool array of the shape of the weight; numbers are True where they are not zero."""
        mask = jnp.asarray(mask) != 0
        if not mask.ndim:
            raise ValueError("a scalar weight has no mask; Gate fits it")
        return cls(jnp.packbits(mask, axis=-1), jnp.asarray(scale, jnp.float32), mask.shape)

    @property
    def dtype(self) -> Any:
        # That of what grows with the weight; the scale is one number.
        return self.bits.dtype

    @property
    def mask(self) -> Array:
        """The mask, bool, of the shape of the weight."""
        return jnp.unpackbits(jnp.asarray(self.bits), axis=-1, count=self.shape[-1]).astype(bool)

    def gated(self, w: Array) -> Array:
        # Not w * mask, which keeps what is not finite.
        return jnp.where(self.mask, w, jnp.where(self.scale == 1, 0, (1 - self.scale) * w))

    def change(self, w: Array) -> Array:
        # Zero where the mask is set even if the weight is not finite.
        return jnp.where(self.mask, 0, -self.scale * w)

    @property
    def nnz(self) -> int:
        """Masked weights."""
        # `packbits` fills the last byte with zeros, which do not count. Rows are summed in int32, the total on the host: it may
        # be beyond 2**31.
        counts = jnp.sum(jax.lax.population_count(jnp.asarray(self.bits)), axis=-1, dtype=jnp.int32)
        return tree.size(self) - int(host(counts).sum(dtype=np.int64))
