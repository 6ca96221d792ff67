"""Selected parts of a weight that is pruned: of the rest, only what is largest stays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta
from jft.methods.around import Around
from jft.methods.parametrise import InPlace, Parametrisation
from jft.select.budget import Globally
from jft.select.threshold import top_each

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Pruned(Around):
    """``m * w + S``: of each matrix the fraction ``keep`` of entries that is largest in size stays, and selected entries train.

    They train from ``m * w``, so one that is pruned away starts at zero. Kept and trained are those of ``first``; the change
    is a bit mask and what the selected entries moved. Magnitude pruning as in DSEE (Chen et al. 2021, arXiv:2111.00160).
    """

    keep: float
    first: Parametrisation = InPlace()

    def __post_init__(self) -> None:
        """Refuse what is no fraction."""
        self._count((1, 1))

    def _count(self, matrix: tuple[int, ...]) -> int:
        return Globally(density=self.keep, round="nearest").units(math.prod(matrix), 1, "a matrix")

    def mask(self, w: Array) -> Array:
        """bool like ``w``: what stays of the base."""
        return top_each(jnp.abs(w.astype(jnp.float32)), self._count(w.shape[-2:]), w.ndim - 2)

    def _left(self, w: Array) -> Array:
        return jnp.where(self.mask(w), w, jnp.zeros((), w.dtype))

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        return self.first.init(key, self._left(w), at)

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        return delta.BitMask.of(self.mask(base)) + self.first.encode(self._left(base), kept, trained)

    def linearized(self) -> Pruned:
        raise ValueError(
            "Pruned keeps no base to linearize the model at: the mask is part of its change; use forward='standard'"
        )

    def reset(self, kept: Any, w: Array, base: Array) -> Array:
        return self.first.reset(kept, w, self._left(base))

    def rebased(self, kept: Any, base: Array) -> Any:
        return self.first.rebased(kept, self._left(base))
