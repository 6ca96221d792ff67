"""Gradient-mask tuning: in each step the largest entries of the gradient."""

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
from jft.select.budget import Globally
from jft.select.threshold import top_each

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TopGradient(Rule):
    """Of the gradient of each matrix and vector only the ``density`` of entries that are largest in size.

    Which these are changes from step to step (GMT, Li et al. 2024, arXiv:2406.15330). Counts are rounded to the nearest,
    at least one; ties go to earlier positions.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what is no density."""
        # The budget knows which densities are valid; ask it once, early.
        self._count(1)

    def _count(self, size: int) -> int:
        return Globally(density=self.density, round="nearest").units(size, 1, "a gradient")

    def gradient(self, plan: Any, kept: Values, trained: Values, gradient: Values, memory: Any) -> tuple[Any, Any]:
        """The gradient with zeros at all other entries."""

        def largest(lead: int, g: Array) -> Array:
            count = self._count(math.prod(g.shape[lead:]))
            return jnp.where(top_each(jnp.abs(g), count, lead), g, 0.0)

        return each_leaf(plan, largest, gradient), memory


CARD = Card(
    formula="G: the mean gradient of a step's microbatches. In each matrix and vector of n entries the round(density * n) "
    "largest |G| stay, the others become 0; theta <- theta - lr * (mask * G), the mask anew at every step.",
    follows="paper; no code is public",
    departs="The paper's update is plain descent; here the masked gradient goes to the run's optimizer, whose momentum "
    "still moves entries that were not chosen.",
    defaults={"density": ("0.1 to 0.4", "-")},
    check="steps of Adam on NumPy gradients cut to the largest of each matrix and vector, with and without accumulation",
)


@register("gmt", paper="Li et al. 2024, arXiv:2406.15330", card=CARD)
def gmt(density: float = 0.2) -> Method:
    """Train every weight, in each step by the largest ``density`` of the gradient's entries in each matrix and vector.

    The gradient is the mean over the batch's microbatches (the paper's accumulation), and what is masked is the gradient:
    the optimizer's momentum still moves entries that were not chosen. The paper has densities of 0.1 to 0.4.
    """
    return Method(Select(), InPlace(), rule=TopGradient(density))
