"""Surgical fine-tuning by Fisher information: the layers that have most of it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jft import tree
from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.budget import PerLeaf
from jft.select.calibration import Calibration, Per
from jft.select.granularity import Layer
from jft.select.layers import pooled_layers
from jft.tree import LAYERS

Array = jax.Array
# Everything that LAYERS does not match.
OUTSIDE = (r"^(?!(?:.*/)?(?:layers?|blocks?|h)[/_])",)


@dataclasses.dataclass(frozen=True)
class TargetLogit:
    """The sum of the targets' logits in place of a cross entropy: ``z_y = logsumexp(z) - (-log p_y)``, weighted alike."""

    given: Any
    splits: ClassVar[bool] = True

    def weight(self, batch: Any, xp: Any = jnp) -> Any:
        """That of the cross entropy."""
        return self.given.weight(batch, xp)

    def loss(self, outputs: Any, batch: Any) -> tuple[Array, Array, dict[str, Array]]:
        """``(sum of target logits, weight, {})``."""
        # ``nll`` without the z-loss, where the objective reports it apart.
        loss, weight, sums = self.given.loss(outputs, batch)
        partition = jax.nn.logsumexp(outputs.astype(jnp.float32), axis=-1)
        return jnp.sum(self.given.weights(batch) * partition) - sums.get("nll", loss), weight, {}


@dataclasses.dataclass(frozen=True)
class LayerFisher:
    """``{stack: [L]}``: the diagonal F of the empirical Fisher information of each layer as one number.

    F is the mean over ``examples`` of the squared gradient of ``of``. pool: ``frobenius``, ``sum over weights W of
    sqrt(sum F_W^2)``; ``sum`` and ``mean`` of F over all weights of a layer.
    """

    examples: int = 100
    of: Literal["logit", "likelihood"] = "logit"
    per: Per = "example"
    pool: Literal["frobenius", "sum", "mean"] = "frobenius"

    def __post_init__(self) -> None:
        """Refuse an unknown choice before any gradient."""
        for name, known in (("of", ("logit", "likelihood")), ("pool", ("frobenius", "sum", "mean"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")

    def __call__(self, calibration: Calibration) -> dict[str, Array]:
        objective = calibration.objective
        if self.of == "logit" and not hasattr(objective, "weights"):
            raise ValueError(f"{type(objective).__name__} has no target logits; take of='likelihood', per='batch'")
        seen = calibration.with_objective(TargetLogit(objective)) if self.of == "logit" else calibration
        squares = seen.squares(self.examples, self.per)
        if self.pool != "frobenius":
            return pooled_layers(squares, self.pool)
        # Per weight first: the score sums norms, not squares, over the weights of a layer.
        norms = {p: jnp.sqrt(jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), axis=1)) for p, x in squares.items()}
        stacks = dict.fromkeys(s for p in norms if (s := tree.stack_of(p)))
        return {s: jnp.sum(jnp.stack([x for p, x in norms.items() if tree.stack_of(p) == s]), axis=0) for s in stacks}


CARD = Card(
    formula="F_W = mean over examples of (d z_y / d W)^2, z_y the logit of the target; a layer's score is the sum over its "
    "weights W of |F_W|_2; the k layers with the highest train, with all that is no layer",
    follows="the authors' code; the paper writes the gradient of log p(y | x) (of='likelihood')",
    check="scores of every layer from per-example float64 gradients of the target logit; one and three Adam steps",
    code="ymtao5219/surgical_fine_tuning@2c3383c, code/fim_calculator.py and code/fine_tuner.py",
    departs="the code scores with one fixed classifier head of its own; here with the run's. For token targets z_y is the mean "
    "over an example's targets, where the code knows only classes",
    defaults={
        "k": ("-", "1 to 5"),
        "examples": ("-", 100),
        "of": ("likelihood", "logit"),
        "pool": ("-", "frobenius"),
        "outside": ("-", True),
    },
)


@register("surgical_fisher", paper="Lodha et al. 2023, arXiv:2310.17041", card=CARD)
def surgical_fisher(
    k: int = 1,
    examples: int = 100,
    of: Literal["logit", "likelihood"] = "logit",
    per: Per = "example",
    pool: Literal["frobenius", "sum", "mean"] = "frobenius",
    outside: bool = True,
) -> Method:
    """Train all weights of the k layers with the most empirical Fisher information, and all that is no layer.

    Per weight F is the mean over ``examples`` of the squared gradient of the target's logit (of: ``likelihood``, of its log
    probability instead), and a layer's score the sum of the Frobenius norms of F (pool: ``sum`` or ``mean`` of F instead),
    once, at the base. per: ``batch`` squares gradients of whole batches instead, cheaper, and another quantity; ``examples``
    then counts batches. outside: embeddings, pooler and head train as well, as in the code, which freezes layers alone.
    """
    score = LayerFisher(examples, of, per, pool)
    select = Select(LAYERS, score=score, granularity=Layer(), budget=PerLeaf(count=k))
    return Method(select, InPlace(), also=OUTSIDE if outside else ())
