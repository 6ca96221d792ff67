"""FISH mask: the entries with the largest Fisher information."""

from __future__ import annotations

from typing import Literal

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores
from jft.select.calibration import Per
from jft.tree import HEADS

CARD = Card(
    formula="F = (1/N) sum_n (d log p(y_n|x_n) / d theta)^2; the k = floor(density * n) entries with the largest F of all n "
    "train, chosen once before training.",
    follows="paper: squared gradients of single examples, one threshold for the whole model; code: N, density, the head apart",
    code="varunnair18/FISH@b5bff1e6, transformers/examples/text-classification/run_glue_sparse_update.py",
    departs="The code's k is floor(density * all parameters) minus those of the head, here floor(density * all but these): "
    "0.1 % of k for BERT-large, and a language model's head would leave the code none. per='sampled' draws one target "
    "an example where the code's expect-* sums over all classes.",
    defaults={"density": (0.005, 0.005), "count": ("-", 1024), "per": ("example", "example"), "power": (2, 1)},
    check="entries and three Adam steps against float64 NumPy: per-example squared gradients sorted over all weights together",
)


@register("fish_mask", paper="Sung, Nair and Raffel 2021, arXiv:2111.09839", card=CARD)
def fish_mask(
    density: float = 0.005,
    count: int = 1024,
    per: Per = "example",
    power: Literal[1, 2] = 2,
    tokens: Literal["mean", "sum"] = "mean",
) -> Method:
    """Train the entries of the whole model, its head apart, with the largest Fisher information.

    density: of all those weights together. count, per: the information is a mean over ``count`` single examples (the
    paper), whole batches (cheaper, and another quantity), or examples whose target is ``sampled`` from the model (the true
    one). power 2 is the paper's squared gradient and its scripts' ``label-square``; 1 is ``label-absolute``, the default of
    its code. A new head always trains in full: add ``also="^classifier/"``; the code takes its size off the number of
    entries, which is not done here.
    """
    score = scores.Fisher(count, per, power, tokens)
    return Method(Select(exclude=HEADS, score=score, budget=budget.Globally(density=density)), InPlace())
