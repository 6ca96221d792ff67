"""R-AMT: masks of the attention's projections, regularised by gradient dropout."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jft.methods.card import Card
from jft.methods.masks import Masked
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.methods.update_rules import Rule
from jft.tree import Patterns, patterns

Array = jax.Array


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
    # A key for each leaf, or leaves of one shape would drop the same entries.
    each = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def drop(key: Array, a: Array, b: Array) -> Array:
        # eps: where both gradients are 0 the fraction would be NaN.
        likely = (jnp.sign(a) * (a + b) / (jnp.abs(a) + jnp.abs(b) + eps) + 1) / 2
        kept = likely > jax.random.uniform(key, a.shape, a.dtype)
        return jnp.where(kept, a, (1 - strength) * a)

    return jax.tree.map(drop, each, task, anchor)


# CLIP's text tower is left alone; models of one tower have no such path.
ATTENTION = (r"^(?!text/).*\battn/",)
CARD = Card(
    formula=(
        "w * 1[s > 0.005] in the image encoder's attention, s from 0.01; loss + l2 * sum over matrices of ||s||_2; each entry "
        "of its gradient a is kept with probability (1 + sgn(a) (a + b) / (|a| + |b|)) / 2, b that to the base's predictions"
    ),
    follows="paper; code: threshold, start, l2, the penalty inside a",
    check=(
        "mask, gradients and steps, float64 NumPy; dropout of a compiled step entry by entry from NumPy's probabilities and "
        "the step's uniforms, with the anchor gradient in float64"
    ),
    code="wuw2019/R-AMT@07f8d2c3, code/trainers/masktuning.py, code/configs/trainers/MASK/vit_b16.yaml",
    departs=(
        "q, k and v have a norm each (code: one, of their common tensor: first 3 * l2 * |s| against sqrt(3) * l2 * |s|). "
        "The code masks the patch convolution too. What trains by `also` has its gradient dropped by the same rule."
    ),
    defaults={"l2": ("-", 1e-4), "dropout": (1.0, 1.0)},
)


@register("r_amt", paper="Wu et al. 2023, arXiv:2307.15049", card=CARD)
def r_amt(l2: float = 1e-4, dropout: float = 1.0, include: Patterns = ATTENTION) -> Method:
    """Train which weights of the image encoder's attention are there, all of them at the start.

    Scores start at 1e-2 with a threshold of 5e-3. l2: weight of the scores' norms. dropout: strength of the gradient dropout
    by agreement with the gradient toward the base's own predictions (:class:`AgreementDropout`), which costs a second backward
    pass; 0 leaves it out, the paper's "AMT". include: the matrices, part of the method: other patterns replace the
    projections of the attention, which are those of a CLIP's image tower, or of the only tower there is.
    """
    train = Masked(None, 0.0, 5e-3, "two_point", strict=True, l2=l2)
    rule = AgreementDropout(dropout) if dropout else None
    return Method(Select(patterns(include), linear_only=True), train, rule=rule)
