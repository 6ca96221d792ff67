"""Lottery-ticket sparse fine-tuning: the entries that move furthest in a first phase."""

from __future__ import annotations

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.penalties import L1ToBase
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores
from jft.tree import HEADS

CARD = Card(
    formula="Phase 1: train all, theta0 -> theta1. The k = floor(density * n) entries with the largest |theta1 - theta0| "
    "of all n train in phase 2 from it. Loss + l1 * sum |theta - theta0| / N in either phase, N all the model's parameters.",
    follows="paper: selection, rewind, regulariser; code: N in both phases, a head that trains counts too",
    code="cambridgeltl/composable-sft@29f7872d, src/sft/trainer.py, src/sft/lt_sft.py",
    departs="The number of entries is exact where the code takes >= a threshold. One round of selection, the code's default; "
    "it can do several. Weight decay leaves frozen entries alone; the code masks gradients, and its decay would move them.",
    defaults={"density": ("-", 0.01), "dense_steps": ("-", "-"), "l1": ("-", 0.0), "dense_l1": ("-", 0.0)},
    check="entries, both phases and both penalties over N = all parameters against float64 NumPy Adam, three steps each",
)


@register("lt_sft", paper="Ansell et al. 2022, arXiv:2110.07560", card=CARD)
def lt_sft(
    density: float = 0.01,
    dense_steps: int = 1000,
    l1: float = 0.0,
    dense_l1: float = 0.0,
) -> Method:
    """Train the entries of the whole model, its head apart, that move furthest in a first phase of full training.

    After ``dense_steps`` the weights go back to the base, and the ``density`` of entries with the largest ``|theta1 -
    theta0|`` over all weights train from there, on the batches from their beginning. l1, dense_l1: weight of ``sum |theta -
    theta0| / N`` in the sparse and in the first phase, N all parameters of the model in both (the regulariser of its code, 0
    by default there, 0.1 in its language-modelling script). Task vectors of several runs add up. The code takes ``>=`` a
    threshold, so ties overshoot; here the count is exact. It can also choose in several rounds; here there is one, its
    default. A new head trains in full: ``also="^classifier/"``.
    """
    dense = (L1ToBase(dense_l1, mean=True, of="all"),) if dense_l1 else ()
    sparse = (L1ToBase(l1, mean=True, of="all"),) if l1 else ()
    score = scores.Movement(dense_steps, dense)
    select = Select(exclude=HEADS, score=score, budget=budget.Globally(density=density))
    return Method(select, InPlace(), penalties=sparse)
