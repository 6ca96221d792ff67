"""Masked weights: which weights are there is what trains, their values stay."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft import delta
from jft.methods.parametrise import Parametrisation, moved_from
from jft.methods.reparametrised import bound, leading, straight_through

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Mask(Parametrisation):
    """What masked parametrisations share: ``w * m(s)`` with a binary m of trained scores s, passed straight through.

    Kept: w. Trained: float32 ``s`` like w. lead: leading axes of the weight (layers, experts); None: those beyond a matrix.
    """

    lead: int | None = None
    # In bfloat16, scores near the threshold would round onto it and flip their bit.
    exact = True

    def mask(self, trained: Array) -> Array:
        """bool like ``trained``: which weights are there."""
        raise TypeError(f"{type(self).__name__} does not say which scores keep their weight")

    def soft(self, s: Array) -> Array:
        """What the mask's derivative is that of."""
        return s

    def form(self, parts: tuple[Array, Array]) -> Array:
        """``w * mask`` in float32, for one matrix."""
        w, s = parts
        # lead=0: under vmap, or in a scan over layers, the scores at hand are those of one matrix.
        mask = self.fitted(lead=0).mask(jax.lax.stop_gradient(s))
        return w.astype(s.dtype) * straight_through(mask.astype(s.dtype), self.soft(s))

    def bind(self, kept: Array, trained: Array, structured: bool, key: Array | None = None) -> Any:
        return bound(self, (kept, trained), kept, leading(kept, self.lead), structured)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return delta.Leaf(), delta.Leaf(decays=False, origin=self._no_base)

    def _no_base(self, kept: Any) -> Array:
        """Refused: scores start from a random draw, and zero means another weight, not the base."""
        raise ValueError(
            f"{type(self).__name__} trains scores, which have no base to stay near; leave out penalties on the change, or "
            "give the scores one of their own (l2)"
        )

    def tangent(self, kept: Array, trained: Array, key: Array | None = None) -> delta.Changed:
        return moved_from(kept, self.bind(kept, trained, False, key))

    def encode(self, base: Array | None, kept: Array, trained: Array) -> delta.Encoding:
        return delta.BitMask.of(self.mask(trained))


@dataclasses.dataclass(frozen=True)
class Masked(Mask):
    """``w * 1[s >= threshold]``, straight through: ``dL/ds = dL/dw_eff * w``. Zhao et al. 2020, arXiv:2004.12406.

    start: how scores start, so that a random fraction ``sparsity`` of the weights is masked at first. ``uniform``: uniformly
    in ``[-low, (low + threshold) / sparsity - low]``. ``two_point``: at ``threshold - margin`` for that fraction and at
    ``threshold + margin`` for the rest; only the ratio of learning rate to margin matters; None: the threshold, so that
    scores start at 0 and twice the threshold.
    strict: mask by ``s > threshold``. l2: weight of a penalty ``sum over matrices of ||s||_2`` (not squared).

    R-AMT (Wu et al. 2023, arXiv:2307.15049) is ``sparsity=0, start="two_point", strict=True, l2=1e-4``: scores of 1e-2 at a
    threshold of 5e-3. Its code holds q, k and v in one tensor, hence under one norm; here each matrix has its own.
    """

    sparsity: float = 0.05
    threshold: float = 1e-2
    start: Literal["uniform", "two_point"] = "uniform"
    low: float | None = None
    margin: float | None = None
    strict: bool = False
    l2: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that mask everything at the start, and those of the other start."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity is {self.sparsity}; it is the fraction masked at the start, from 0 up to below 1"
            )
        if self.start not in ("uniform", "two_point"):
            raise ValueError(f"start {self.start!r} is unknown; scores start uniform or two_point")
        if self.start == "uniform" and not self.sparsity:
            raise ValueError("sparsity=0 has no uniform start, of which a part is masked; use start='two_point'")
        wrong = "margin" if self.start == "uniform" else "low"
        if getattr(self, wrong) is not None:
            raise ValueError(f"{wrong}={getattr(self, wrong)} does nothing with start={self.start!r}; leave it out")
        if self.start == "two_point" and self._margin <= 0:
            raise ValueError(
                f"margin is {self._margin}; scores start that far from the threshold, so it must be above 0"
            )
        if self.start == "uniform" and self._low + self.threshold <= 0:
            raise ValueError(f"low is {self.low}; scores start from -low, which is not below {self.threshold}")

    @property
    def _low(self) -> float:
        return 2e-2 if self.low is None else self.low

    @property
    def _margin(self) -> float:
        return self.threshold if self.margin is None else self.margin

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Array, Array]:
        """``(w, scores)``; the draw depends on the key and the shape alone."""
        if self.start == "uniform":
            # The share ``sparsity`` of the interval [-low, highest] then lies below the threshold.
            highest = (self._low + self.threshold) / self.sparsity - self._low
            return w, jax.random.uniform(key, w.shape, jnp.float32, -self._low, highest)
        dropped = jax.random.bernoulli(key, float(self.sparsity), w.shape)
        above, below = self.threshold + self._margin, self.threshold - self._margin
        return w, jnp.where(dropped, below, above).astype(jnp.float32)

    def mask(self, trained: Array) -> Array:
        """``s >= threshold``."""
        return trained > self.threshold if self.strict else trained >= self.threshold

    def penalty(self, kept: Array, trained: Array) -> Array | None:
        """``l2 * sum of ||s||_2`` over matrices."""
        if not self.l2:
            return None
        axes = tuple(range(leading(kept, self.lead), trained.ndim))
        return self.l2 * jnp.sum(jnp.sqrt(jnp.sum(jnp.square(trained), axis=axes)))
