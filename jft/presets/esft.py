"""ESFT: the experts that the data uses most."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import activations, granularity
from jft.select.calibration import Calibration
from jft.select.scores import Scores
from jft.select.structured import CHOSEN


@dataclasses.dataclass(frozen=True)
class ExpertUse:
    """1 for the experts of each layer that the data uses most, until they have the share ``p`` of it.

    kind: ``token``, an expert's share of the tokens, or ``gate``, its mean gate value: see
    :func:`jft.select.activations.experts`.
    """

    p: float
    kind: Literal["token", "gate"] = "token"
    batches: int = 1

    def __call__(self, calibration: Calibration) -> Scores:
        shares = activations.experts(calibration, self.batches, self.kind)
        masks = {n.removesuffix("router"): activations.until(jax.device_get(x), self.p) for n, x in shares.items()}
        out = {}
        for path in calibration.paths:
            # Scores come by router, weights by expert matrix: both stand in the same module.
            mask = next((m for stack, m in masks.items() if path.startswith(f"{stack}experts/")), None)
            if mask is None:
                raise ValueError(f"{path} is no weight of experts")
            out[path] = jnp.asarray(mask, jnp.float32)
        return out


CARD = Card(
    formula=(
        "r_e, expert e's share of the routed tokens of its layer, count / k (token), or its mean gate value (gate), each "
        "layer's summing to 1; experts train in descending order of r until the sum of those taken is at least p"
    ),
    follows="Paper: both scores, the rule, what is frozen. Code: the order, when it stops, 0.2 for tokens.",
    code="deepseek-ai/ESFT@579a7711e4b332b4c57b47e378a0cf240d85caa6, scripts/expert/generate_expert_config.py",
    departs=(
        "The stored script divides scores by their sums over layers rather than experts, and rounds them to four places; here "
        "each layer's scores sum to 1. Experts without any token never train. The sample is `batches` of the training data; "
        "the script takes a number of tokens."
    ),
    defaults={"p": ("0.2 for tokens, 0.1 for gates", "0.2 for tokens"), "kind": ("both", "token")},
    check="experts by both scores and steps of them on a mixture of experts against float64 NumPy",
)


@register("esft", paper="Wang et al. 2024, arXiv:2407.01906", card=CARD)
def esft(p: float | None = None, kind: Literal["token", "gate"] = "token", batches: int = 8) -> Method:
    """Train the experts of each layer that the data uses most; the router, other experts and the rest are frozen.

    kind: an expert's score is the share of ``batches``' tokens that go to it (ESFT-Token), or its mean gate value
    (ESFT-Gate), each layer's scores summing to 1. p: the best are taken until their scores reach it; default 0.2 for
    tokens and 0.1 for gates. One stored script of the authors sums scores over layers instead; that is not followed. The
    backward pass multiplies the chosen experts' matrices alone. For their options that train all else too: ``also``.
    """
    share = (0.2 if kind == "token" else 0.1) if p is None else p
    select = Select(
        (r"/experts/",),
        score=ExpertUse(share, kind, batches),
        granularity=granularity.Expert(),
        budget=CHOSEN,
    )
    return Method(select, InPlace())
