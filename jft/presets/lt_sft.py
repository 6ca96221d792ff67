"""Lottery-ticket sparse fine-tuning: the entries that move furthest in a first phase."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.patterns import HEADS
from jft.methods.penalties import L1ToBase
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores


@register("lt_sft", paper="Ansell et al. 2022, arXiv:2110.07560")
def lt_sft(
    density: float = 0.01,
    dense_steps: int = 1000,
    l1: float = 0.0,
    dense_l1: float = 0.0,
) -> Method:
    """Train the entries of the whole model, its head apart, that move furthest in a first phase of full training.

    After ``dense_steps`` the weights go back to the base, and the ``density`` of entries with the largest ``|theta1 -
    theta0|`` over all weights train from there, on the batches from their beginning. l1, dense_l1: weight of the *mean*
    ``|theta - theta0|`` in the sparse and in the first phase (the regulariser of its code, 0 by default there too). Task
    vectors of several runs add up. The code takes ``>=`` a threshold, so ties overshoot; here the count is exact. It can
    also choose in several rounds; here there is one, its default. A new head trains in full: ``also="^classifier/"``.
    """
    dense = (L1ToBase(dense_l1, mean=True),) if dense_l1 else ()
    sparse = (L1ToBase(l1, mean=True),) if l1 else ()
    score = scores.Movement(dense_steps, dense)
    select = Select(exclude=HEADS, score=score, budget=budget.Globally(density=density))
    return Method(select, InPlace(), penalties=sparse)
