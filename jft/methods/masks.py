"""Masked weights: which weights are there is what trains, their values stay."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta
from jft.methods.formed import bound, leading, straight_through
from jft.methods.parametrise import Parametrisation, moved_from
from jft.methods.rules import Rule
from jft.select.threshold import top_each

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Mask(Parametrisation):
    """What masked parametrisations share: ``w * m(s)`` with a binary m of trained scores s, passed straight through.

    Kept: w. Trained: float32 ``s`` like w. lead: leading axes of the weight (layers, experts); None: those beyond a matrix.
    """

    lead: int | None = None
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
        there = self.fitted(lead=0).mask(jax.lax.stop_gradient(s))
        return w.astype(s.dtype) * straight_through(there.astype(s.dtype), self.soft(s))

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

    Scores start from two points, ``threshold - margin`` for a random fraction ``sparsity`` of the weights (so the first
    model is already that sparse) and ``threshold + margin`` for the rest; only the ratio of learning rate to margin matters.
    strict: mask by ``s > threshold``. l2: weight of a penalty ``sum over matrices of ||s||_2`` (not squared).

    R-AMT (Wu et al. 2023, arXiv:2307.15049) is ``sparsity=0, strict=True, l2=1e-4``: scores of 1e-2 at a threshold of
    5e-3. Its code holds q, k and v in one tensor, hence under one norm; here each matrix has its own.
    """

    sparsity: float = 0.05
    threshold: float = 5e-3
    margin: float = 5e-3
    strict: bool = False
    l2: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that mask everything at the start."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity is {self.sparsity}; it is the fraction masked at the start, from 0 up to below 1"
            )
        if self.margin <= 0:
            raise ValueError(
                f"margin is {self.margin}; scores start that far from the threshold, so it must be above 0"
            )

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Array, Array]:
        """``(w, scores)``; the draw depends on the key and the shape alone."""
        dropped = jax.random.bernoulli(key, float(self.sparsity), w.shape)
        return w, jnp.where(dropped, self.threshold - self.margin, self.threshold + self.margin).astype(jnp.float32)

    def mask(self, trained: Array) -> Array:
        """``s >= threshold``."""
        return trained > self.threshold if self.strict else trained >= self.threshold

    def penalty(self, kept: Array, trained: Array) -> Array | None:
        """``l2 * sum of ||s||_2`` over matrices."""
        if not self.l2:
            return None
        axes = tuple(range(leading(kept, self.lead), trained.ndim))
        return self.l2 * jnp.sum(jnp.sqrt(jnp.sum(jnp.square(trained), axis=axes)))


@dataclasses.dataclass(frozen=True)
class TopMask(Mask):
    """``w * 1[|s| among the keep * I * O largest of its matrix]``, straight through: ``dL/ds = dL/dw_eff * w * sgn(s)``.

    Mask Fine-Tuning, Zhang et al. 2025, arXiv:2503.22764, which starts from a tuned model and keeps 0.9. Exactly
    ``round(keep * I * O)`` weights stay in each matrix (of ties the earlier in row-major order); the released code keeps
    ``n - int((1 - keep) * n)``, which can be one more. Scores are normal with standard deviation ``std``; ``std=None`` is
    the Kaiming-uniform draw in +-1/sqrt(I) that the code makes first, and its model's initialisation (0.02) overwrites.
    Finding the mask reads the scores of a layer about 16 times, in its forward and again in its backward pass.
    """

    keep: float = 0.9
    std: float | None = 0.02

    def __post_init__(self) -> None:
        """Refuse a fraction that keeps nothing."""
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; it is the fraction of each matrix that stays, above 0 and up to 1")

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Array, Array]:
        """``(w, scores)``."""
        if self.std is not None:
            return w, self.std * jax.random.normal(key, w.shape, jnp.float32)
        limit = 1 / math.sqrt(w.shape[-2])
        return w, jax.random.uniform(key, w.shape, jnp.float32, -limit, limit)

    def mask(self, trained: Array) -> Array:
        """Exactly ``round(keep * I * O)`` True in each matrix."""
        lead = leading(trained, self.lead)
        return top_each(jnp.abs(trained), max(1, round(self.keep * math.prod(trained.shape[lead:]))), lead)

    def soft(self, s: Array) -> Array:
        """``|s|``."""
        return jnp.abs(s)


@dataclasses.dataclass(frozen=True)
class AgreementDropout(Rule):
    """:func:`agreement_dropout` of the step's gradient, against that toward the base's own predictions."""

    strength: float = 1.0
    to_base = True

    def join(self, key: Array, gradient: Any, anchor: Any) -> Any:
        return agreement_dropout(key, gradient, anchor, self.strength)


def agreement_dropout(key: Array, task: Any, anchor: Any, strength: float = 1.0, eps: float = 1e-8) -> Any:
    """The task gradient, each entry kept with the probability that it agrees with an anchor's gradient.

    ``P = (1 + sgn(a) (a + b) / (|a| + |b| + eps)) / 2`` with a the ``task`` and b the ``anchor`` gradient (pytrees alike):
    1 where signs agree, ``|a| / (|a| + |b|)`` where they differ. Dropped entries are multiplied by ``1 - strength``. The
    "gradient dropout regularity" of R-AMT (Wu et al. 2023, arXiv:2307.15049), whose anchor is the cross-entropy to the
    zero-shot model's predictions on the same batch; its task gradient includes the penalties.
    """
    leaves, structure = jax.tree.flatten(task)
    each = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def drop(key: Array, a: Array, b: Array) -> Array:
        likely = (jnp.sign(a) * (a + b) / (jnp.abs(a) + jnp.abs(b) + eps) + 1) / 2
        kept = likely > jax.random.uniform(key, a.shape, a.dtype)
        return jnp.where(kept, a, (1 - strength) * a)

    return jax.tree.map(drop, each, task, anchor)
