"""SPIDER: values drawn back to the base where they matter more to it than to the task."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.methods.update_rules import Rule, Values, each_leaf

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Importance(Rule):
    """Values are drawn back to the base where they matter more to it than to the task: ``(1 - v) theta0 + v theta``.

    Within each matrix and vector let ``r(x) = sigmoid((|x| - mean |x|) / std |x|)``, or 0 where x is all 0, and G the sum of
    all gradients so far. ``v = r(G) / (r(theta0) + r(G))`` where r(G) > r(theta0), else 0; divided by the mean of those above
    0, and at most 1 (SPIDER, Huang et al. 2024, arXiv:2411.10928). std is that of the sample (n - 1). Memory: G, float32.
    """

    def init(self, trained: Values) -> Any:
        """No gradient so far."""
        return jax.tree.map(jnp.zeros_like, trained)

    def gradient(self, plan: Any, kept: Values, trained: Values, gradient: Values, memory: Any) -> tuple[Any, Any]:
        """The gradient, remembered."""
        return gradient, jax.tree.map(jnp.add, memory, gradient)

    def values(self, plan: Any, kept: Values, trained: Values, memory: Any) -> tuple[Any, Any]:
        """The values with the base's share put back; exactly the base where v is 0."""
        # The change of nothing is minus the base.
        base = plan.change(kept, jax.tree.map(jnp.zeros_like, trained))
        return each_leaf(plan, _projected, trained, base, memory), memory


def _projected(lead: int, now: Array, minus: Array, total: Array) -> Array:
    share = soft_share(-minus, total, lead)
    # Where share is 0 the base itself: the sum beside it would round.
    return jnp.where(share > 0, -(1 - share) * minus + share * now, -minus)


def soft_share(base: Array, total: Array, lead: int) -> Array:
    """v of :class:`Importance` for weights ``base`` and summed gradients ``total``; the first ``lead`` axes are apart."""
    axes = tuple(range(lead, base.ndim))
    ours, theirs = _rank(total, axes), _rank(base, axes)
    share = jnp.where(ours > theirs, ours / (ours + theirs), 0.0)
    above = jnp.sum(share > 0, axis=axes, keepdims=True)
    mean = jnp.sum(share, axis=axes, keepdims=True) / jnp.maximum(above, 1)
    # Where nothing is above 0 the mean is 0 as well.
    return jnp.minimum(share / jnp.where(above > 0, mean, 1.0), 1.0)


def _rank(x: Array, axes: tuple[int, ...]) -> Array:
    size = jnp.abs(x.astype(jnp.float32))
    count = math.prod(x.shape[axis] for axis in axes)
    centred = size - jnp.mean(size, axis=axes, keepdims=True)
    # One value has no sample deviation; max keeps the division by n - 1 defined.
    spread = jnp.sqrt(jnp.sum(jnp.square(centred), axis=axes, keepdims=True) / max(count - 1, 1))
    # Equal sizes have a deviation of 0; their rank is 1/2.
    rank = jax.nn.sigmoid(centred / jnp.where(spread > 0, spread, 1.0))
    return jnp.where(jnp.any(size > 0, axis=axes, keepdims=True), rank, 0.0)


CARD = Card(
    formula="r(x) = sigmoid((|x| - mean |x|) / std |x|) in each matrix or vector, 0 where x is all 0; G the sum of gradients "
    "so far. v = r(G) / (r(theta0) + r(G)) where r(G) > r(theta0), else 0; v <- min(v / mean of v > 0, 1). After each step "
    "theta <- (1 - v) theta0 + v theta.",
    follows="code, which divides v by its mean and has the sample's std",
    code="WenkeHuang/SPIDER@197c9345, Code/train/SPIDER.py",
    departs="A matrix or vector whose entries are all of one size and not 0 has r = 1/2; in the code "
    "0 / 0, which keeps it at its base.",
    check="steps of Adam and v against float64 NumPy, with a bias of zeros in the base",
)


@register("spider", paper="Huang et al. 2024, arXiv:2411.10928", card=CARD)
def spider() -> Method:
    """Train every weight, and after each step draw those back to the base that matter more to it than to the task.

    By the size of the base weight against that of the summed gradient, each ranked within its matrix or vector: see
    :class:`Importance`. This is the authors' code. The optimizer's own moments are not drawn back.
    """
    return Method(Select(), InPlace(), rule=Importance())
