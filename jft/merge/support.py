"""The entries of a weight that any of several sparse deltas stores: what an elementwise rule has to look at."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta import Entries
from jft.delta.encoding import Encoding
from jft.delta.numeric import wide
from jft.tree import host, visible

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Support:
    """Positions in a weight of ``shape``, of which the first ``stack`` axes count tensors.

    keys: int64 ``[n]``, flat and sorted. In arrays ``[*stack, m]`` each tensor has its own entries in row-major order, and
    zeros after them; m is the length of the longest, and a little more, so that weights share programs.
    """

    shape: tuple[int, ...]
    stack: int
    keys: np.ndarray

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where each key is in an array ``[*stack, m]``, flat."""
        tensor = self.keys // math.prod(self.shape[self.stack :])
        return tensor * self.length + np.arange(len(tensor)) - np.searchsorted(tensor, tensor)

    @functools.cached_property
    def length(self) -> int:
        """m."""
        counts = np.bincount(self.keys // math.prod(self.shape[self.stack :]), minlength=1)
        longest = int(counts.max())
        step = 1 << max(longest.bit_length() - 3, 0)
        return -(-longest // step) * step

    @property
    def compact(self) -> tuple[int, ...]:
        """``(*stack, m)``."""
        return (*self.shape[: self.stack], self.length)

    def gather(self, delta: Encoding | None) -> Array:
        """``[*stack, m]``, the values of a delta that stores no other entries; zeros for None."""
        zeros = jnp.zeros(math.prod(self.compact), jnp.float32)
        found = None if delta is None else delta.coordinates()
        if found is None:
            return zeros.reshape(self.compact)
        rows, columns, values = found
        places = self.places[np.searchsorted(self.keys, _keys(rows, columns, self.shape))]
        return zeros.at[places].set(wide(values), unique_indices=True).reshape(self.compact)

    def scatter(self, values: Array) -> Entries:
        """The delta of ``[*stack, m]``; zeros are left out where they can be looked at."""
        keys, values = self.keys, values.reshape(-1)[self.places]
        if visible(values):
            kept = np.flatnonzero(host(values))
            keys, values = keys[kept], values[kept]
        rows, columns = (jnp.asarray(x.astype(np.int32)) for x in np.divmod(keys, self.shape[-1]))
        return Entries(rows, columns, values, self.shape)


def support(deltas: Sequence[Encoding], stack: int) -> Support | None:
    """The support of deltas of one shape; None where one of them is not sparse or is traced, or it would save nothing."""
    shape = tuple(deltas[0].shape)
    found = [None if delta.relative or tuple(delta.shape) != shape else delta.coordinates() for delta in deltas]
    coordinates = [x for x in found if x is not None]
    if not shape or len(coordinates) < len(found) or not visible(*(x for c in coordinates for x in c[:2])):
        return None
    keys = np.unique(np.concatenate([_keys(rows, columns, shape) for rows, columns, _ in coordinates]))
    result = Support(shape, stack, keys)
    # Coordinates of the result take twice the room of its values.
    return result if 0 < 2 * math.prod(result.compact) <= math.prod(shape) else None


def _keys(rows: Array, columns: Array, shape: tuple[int, ...]) -> np.ndarray:
    return host(rows).astype(np.int64) * shape[-1] + host(columns)
