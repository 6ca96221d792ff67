"""`Signs`: a delta that is plus or minus one scale everywhere, one bit per weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jft.delta.encoding import Encoding
from jft.delta.numeric import wide
from jft.delta.registry import register

Array = jax.Array


@register("signs", data=("bits", "scale"), static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class Signs(Encoding):
    """``delta = scale`` where the bit is set and ``-scale`` elsewhere.

    bits: uint8 ``[*shape[:-1], ceil(shape[-1] / 8)]``, packed along the last axis (``jnp.packbits``) so that it shards with
    its weight; scale: float32, a scalar, or ``[L]`` or ``[L, E]`` for one scale a layer or expert: its axes are the first of
    the weight's.
    """

    bits: Array
    scale: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property

    def __post_init__(self) -> None:
        # A file gives the shape as a list; static fields must hash.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        leading = tuple(jnp.shape(self.scale))
        expected = (*self.shape[:-1], -(-self.shape[-1] // 8)) if self.shape else None
        fits = leading == self.shape[: len(leading)] and len(leading) < len(self.shape)
        if tuple(self.bits.shape) != expected or self.bits.dtype != jnp.uint8 or not fits:
            raise ValueError(
                f"the signs of a weight of shape {self.shape} are uint8 {expected} with a scale of its first axes, or none, "
                f"not {self.bits.dtype} {tuple(self.bits.shape)} and {leading}"
            )

    @classmethod
    def of(cls, positive: Array, scale: Any) -> Signs:
        """From a bool array of the shape of the weight, true for plus."""
        positive = jnp.asarray(positive, bool)
        if not positive.ndim:
            raise ValueError("a scalar weight has no signs to pack; Dense fits it")
        return cls(jnp.packbits(positive, axis=-1), jnp.asarray(scale, jnp.float32), positive.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def dense(self) -> Array:
        scale = wide(self.scale)
        scale = scale.reshape(*scale.shape, *(1,) * (len(self.shape) - scale.ndim))
        return jnp.where(jnp.unpackbits(jnp.asarray(self.bits), axis=-1, count=self.shape[-1]), scale, -scale)

    def scaled(self, c: Any) -> Signs:
        return self._with(scale=wide(self.scale) * c)
