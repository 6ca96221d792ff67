"""Which keys each query of an attention sees: a rule over rows of tokens, never an array of all pairs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Query t sees key s if both are of one segment, and, where the mask is causal or has a window, by their places.

    q_segments int ``[B, T]``, k_segments int ``[B, S]``, B possibly 1 for rows that are alike; segment 0 is padding, and is
    seen by nobody. Places count tokens of the row, from 0. causal: ``s <= t``. window: ``|t - s| < window``, an int or a
    traced scalar, so that layers of a scan may differ.
    """

    q_segments: Array
    k_segments: Array
    window: Array | int | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def within(cls, segments: Array, **rules: Any) -> Mask:
        """Of tokens ``segments[B, T]`` that look at each other."""
        return cls(segments, segments, **rules)

    def dense(self) -> Array:
        """Bool ``[B, T, S]``."""
        return self.block(0, 0, self.q_segments.shape[-1], self.k_segments.shape[-1])

    def block(self, row: Array | int, column: Array | int, rows: int, columns: int) -> Array:
        """Bool ``[B, rows, columns]``: the queries from ``row`` on, the keys from ``column`` on."""
        q = jax.lax.dynamic_slice_in_dim(self.q_segments, row, rows, axis=-1)[..., :, None]
        k = jax.lax.dynamic_slice_in_dim(self.k_segments, column, columns, axis=-1)[..., None, :]
        distance = (row + jnp.arange(rows))[:, None] - (column + jnp.arange(columns))
        visible = (q == k) & (k > 0)
        if self.causal:
            visible &= distance >= 0
        if self.window is not None:
            visible &= jnp.abs(distance) < self.window
        return visible

    def padded(self, rows: int, columns: int) -> Mask:
        """The same for ``rows`` queries and ``columns`` keys, those that are new being padding."""

        def pad(segments: Array, size: int) -> Array:
            return jnp.pad(segments, ((0, 0), (0, size - segments.shape[-1])))

        return dataclasses.replace(
            self, q_segments=pad(self.q_segments, rows), k_segments=pad(self.k_segments, columns)
        )

    def reaches(self, row: Array | int, column: Array | int, rows: int, columns: int) -> Array | bool:
        """Whether a pair of this block is of places that see each other; segments aside."""
        reached: Array | bool = True
        if self.causal:
            reached = column < row + rows
        if self.window is not None:
            gap = jnp.maximum(row - (column + columns - 1), column - (row + rows - 1))
            reached &= gap < self.window
        return reached
