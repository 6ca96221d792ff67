"""Layers whose activations go with a number known of each example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft import tree
from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import activations
from jft.select.budget import PerLeaf
from jft.select.calibration import Calibration
from jft.select.granularity import Layer
from jft.tree import LAYERS

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """``target(outputs, batch) [B]``: minus the mean loss of each example, the log-likelihood of what is right; 0 without."""

    objective: Any

    def __call__(self, outputs: Any, batch: Any) -> Array:
        # Scalars of a batch (settings) belong to every example and are not mapped over.
        axes = jax.tree.map(lambda x: 0 if x.ndim else None, batch)
        ranks = jax.tree.map(lambda x: x.ndim, batch)

        def one(outputs: Any, row: Any) -> Array:
            # The objective expects a batch; each example becomes one of size 1.
            row = jax.tree.map(lambda x, n: x[None] if n else x, row, ranks)
            loss, weight, _ = self.objective.loss(jax.tree.map(lambda x: x[None], outputs), row)
            # The inner where keeps a division by 0 out, the outer one scores padding rows 0.
            return jnp.where(weight > 0, -loss / jnp.where(weight > 0, weight, 1.0), 0.0)

        return jax.vmap(one, in_axes=(0, axes))(outputs, batch)


@dataclasses.dataclass(frozen=True)
class FromBatch:
    """``target(outputs, batch) [B]``: what the batch has under ``name``."""

    name: str

    def __call__(self, outputs: Any, batch: Any) -> Array:
        if self.name not in batch:
            raise ValueError(
                f"the batch has no {self.name!r} to correlate layers with, only {', '.join(sorted(batch))}"
            )
        return batch[self.name]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """How each layer's residual values go with a number known of each example: see :func:`jft.select.activations.correlation`.

    target: a function ``(outputs, batch) -> [B]``, the name of an entry of the batches, or None for the model's own
    log-likelihood of the right answer.
    """

    target: Callable[[Any, Any], Array] | str | None = None
    batches: int = 8
    site: str = "layers/in"
    pool: Literal["mean", "last"] = "mean"

    def __call__(self, calibration: Calibration) -> dict[str, Array]:
        target = (
            FromBatch(self.target) if isinstance(self.target, str) else self.target or Likelihood(calibration.objective)
        )
        stack = tree.stack_of(self.site) or self.site
        return {stack: activations.correlation(calibration, target, self.batches, self.site, self.pool)}


CARD = Card(
    formula="a layer's score is sqrt(mean over features d of r_d^2), r_d the Pearson correlation of feature d of what enters "
    "the layer, a mean over each example's tokens, with a number known of each example; the k layers with the highest train",
    follows="the abstract: layers whose activations correlate with a number of each example train",
    check="scores from residual streams of a float64 NumPy pass, with the model's own log-likelihood and with a number from "
    "the batch; one and three Adam steps",
    departs="the statistic is jft's own: the abstract gives none, and the paper's text and code are not known here. score= "
    "takes any other",
    defaults={"target": ("prior log-probability of the answer", "-")},
)


@register("layers_by_score", paper="Zhang et al. 2025, arXiv:2504.12585", card=CARD)
def layers_by_score(
    k: int = 1,
    target: Callable[..., Any] | str | None = None,
    batches: int = 8,
    pool: Literal["mean", "last"] = "mean",
    largest: bool = True,
    score: Callable[..., Any] | None = None,
) -> Method:
    """Train all weights of the k layers whose activations go most with a number known of each example.

    target: that number, the name of an entry of the batches (the paper's is the prior log-probability of the answer), or
    ``target(outputs, batch) -> [B]``; None is the model's own log-likelihood of the right answer. The score is the root mean
    square correlation of what enters each layer with it (:func:`jft.select.activations.correlation`): the abstract does not
    give the paper's own. score: any other, ``score(calibration) -> {"layers": [L]}``. Found once, from the first ``batches``.
    """
    score = score or Correlation(target, batches, pool=pool)
    select = Select(LAYERS, score=score, granularity=Layer(), budget=PerLeaf(count=k), largest=largest)
    return Method(select, InPlace())
