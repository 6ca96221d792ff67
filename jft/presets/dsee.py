"""DSEE: a low-rank change, the entries that low rank fits worst, and a base that may be pruned."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta
from jft.methods.low_rank import LowRank, WithLowRank
from jft.methods.parametrise import Composed, InPlace, Parametrisation
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores
from jft.select.budget import Globally
from jft.select.threshold import top_each

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Pruned(Composed):
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

    def _left(self, w: Array, base: Array) -> Array:
        """What stays of ``w``: what the mask of the base leaves, and what has trained since."""
        return jnp.where(self.mask(base) | (w != base), w, jnp.zeros((), w.dtype))

    def fitted(self, *, linearized: bool = False, **told: Any) -> Pruned:
        if linearized:
            raise ValueError(
                "Pruned keeps no base to linearize the model at: the mask is part of its change; use forward='standard'"
            )
        return super().fitted(**told)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return self.first.leaves(at)

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        base = w if base is None else base
        return self.first.init(key, self._left(w, base), at, self._left(base, base))

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        return self.first.bind(kept, trained, structured, key)

    def encode(self, base: Array | None, kept: Any, trained: Any) -> delta.Encoding:
        if base is None:
            return self.first.encode(None, kept, trained)
        return delta.BitMask.of(self.mask(base)) + self.first.encode(self._left(base, base), kept, trained)

    def spread(self, kept: Any, values: Any, fill: Array) -> Array:
        return self.first.spread(kept, values, fill)

    def collect(self, kept: Any, dense: Array) -> Any:
        return self.first.collect(kept, dense)


@register("dsee", paper="Chen et al. 2021, arXiv:2111.00160")
def dsee(
    rank: int = 16,
    count: int = 64,
    filter_rank: int = 16,
    keep: float = 1.0,
    alpha: float | None = None,
    exact: bool = False,
) -> Method:
    """Train a low-rank change of every matrix inside the layers and, beside it, the entries that low rank fits worst.

    Those are the ``count`` largest of each matrix's residual ``|W - W_r|``, r the ``filter_rank``: the paper decomposes W
    by GreBsmo into low rank and sparse, here W_r is an SVD (randomised unless ``exact``). keep: the fraction of each frozen
    matrix that stays, by size, ``M * W + U V + S``; 1 for all. The paper prunes by the size of the tuned weight and tunes
    again, and can prune whole heads by learned coefficients; here M is of the base and there from the start. alpha: the
    scale of the low-rank change times ``rank``; default ``rank``.
    """
    select = Select(
        linear_only=True,
        score=scores.LowRank(filter_rank, residual=True, exact=exact),
        budget=budget.PerMatrix(count=count),
    )
    first = Pruned(keep) if keep != 1 else InPlace()
    return Method(select, WithLowRank(first, LowRank(rank, float(rank if alpha is None else alpha))))
