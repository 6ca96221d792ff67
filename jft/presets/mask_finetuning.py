"""Mask fine-tuning: which weights of a tuned model stay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jft.methods.card import Card
from jft.methods.masks import Mask
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.reparametrised import leading
from jft.methods.select import Select
from jft.select.threshold import top_each

Array = jax.Array


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
        # By size, with the sign's derivative (``soft``): a score counts as far as it is from 0 on either side.
        return top_each(jnp.abs(trained), max(1, round(self.keep * math.prod(trained.shape[lead:]))), lead)

    def soft(self, s: Array) -> Array:
        """``|s|``."""
        return jnp.abs(s)


CARD = Card(
    formula="w * 1[|s| among the 90 % largest of its matrix] of a tuned model, s from N(0, 0.02^2), straight through |s|",
    follows="paper; code: the scores' start",
    check="mask, gradients and three steps, float64 NumPy; the count with ties; the spread of the start",
    code="Ming-K9/MFT@b36f2da0, scripts/finetune.py, scripts/apply_masks.py",
    departs="round(keep * n) weights stay (code: n - int((1 - keep) * n), at most one more).",
    defaults={"keep": (0.9, 0.9), "layers": ("4 of 32", "-"), "std": ("-", 0.02)},
)


@register("mask_finetuning", paper="Zhang et al. 2025, arXiv:2503.22764", card=CARD)
def mask_finetuning(
    keep: float = 0.9,
    layers: Sequence[int] | None = None,
    std: float | None = 0.02,
) -> Method:
    """Train which 90% of each matrix stay, in an already tuned model.

    keep: the fraction of each matrix that stays. layers: which ones are masked (the paper: 4 to 7 for mathematics, 20 to 23
    for code, 0 to 3 for instructions, of a LLaMA2-7B); None for all. std: of the initial scores, see :class:`TopMask`.
    """
    chosen = None if layers is None else tuple(layers)
    select = Select(linear_only=True, layers=chosen)
    return Method(select, TopMask(None, keep, std))
