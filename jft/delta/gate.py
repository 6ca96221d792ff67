"""`Gate`: a delta that multiplies weights of the base, one factor for each row, column, head, matrix or weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.delta.numeric import count_nonzero, wide
from jft.delta.registry import register, rule
from jft.delta.relative import Relative

Array = jax.Array


@register("gate", data=("gate", "scale"), static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class Gate(Relative):
    """``delta = scale * (gate - 1) * base``: with ``scale`` 1 the weight becomes ``gate * base``.

    gate: one axis for each of the weight (leading ones may be left out), whose extent divides that of the weight; each
    value gates as many neighbours as that takes. For a weight ``[L, I, O]``: ``[L, I, 1]`` rows, ``[L, 1, O]`` columns,
    ``[L, 1, H]`` heads of ``O / H`` columns, ``[L, 1, 1]`` or a scalar whole matrices, ``[L, I / b, O / c]`` blocks,
    ``[L, I, O]`` weights. scale: a float32 scalar.
    """

    gate: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property
    # Of NumPy: an array of JAX would start its backend on import. After `shape`, since it has a default.
    scale: Array = np.float32(1)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # A file gives the shape as a list; static fields must hash.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        extents = tuple(self.gate.shape)
        extents = (1,) * (len(self.shape) - len(extents)) + extents
        fits = len(extents) == len(self.shape) and all(
            g and n % g == 0 for g, n in zip(extents, self.shape, strict=True)
        )
        if not fits or jnp.shape(self.scale):
            raise ValueError(
                f"a gate of shape {tuple(self.gate.shape)} with scale {jnp.shape(self.scale)} does not fit a weight of "
                f"shape {self.shape}: every extent must divide the weight's, and the scale is a scalar"
            )

    @property
    def dtype(self) -> Any:
        return self.gate.dtype

    def gated(self, w: Array) -> Array:
        # Not 1 + scale * (gate - 1): this is the gate itself at scale 1, so that it applies exactly.
        return w * _repeat((1 - self.scale) + self.scale * wide(self.gate), self.shape)

    def change(self, w: Array) -> Array:
        return w * _repeat(self.scale * (wide(self.gate) - 1), self.shape)

    @property
    def nnz(self) -> int:
        """Weights whose gate is not 1."""
        gate = jnp.asarray(self.gate)
        # Each value gates equally many weights; an empty gate divides nothing.
        return count_nonzero(gate != 1) * (tree.size(self) // max(gate.size, 1))


def _repeat(gate: Array, shape: tuple[int, ...]) -> Array:
    """``gate`` so that it broadcasts against ``shape``: repeated along axes that it groups."""
    gate = gate.reshape((1,) * (len(shape) - gate.ndim) + gate.shape)
    for axis, n in enumerate(shape):
        # An extent of 1 broadcasts by itself and takes no memory.
        if gate.shape[axis] not in (1, n):
            gate = jnp.repeat(gate, n // gate.shape[axis], axis)
    return gate


@rule("+", Gate, Gate)
def _sum(x: Gate, y: Gate) -> Gate | None:
    if jnp.shape(x.gate) != jnp.shape(y.gate):
        return None
    # Changes add up where gates do not: each is of the base itself.
    change = x.scale * (wide(x.gate) - 1) + y.scale * (wide(y.gate) - 1)
    return Gate(1 + change, x.shape)
