"""SIFT: the entries of each matrix with the largest gradient at the start."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores


@register("sift", paper="Song et al. 2023, arXiv:2312.11875")
def sift(rate: float = 0.05, batches: int = 1) -> Method:
    """Train the ``int(rate * size) + 1`` entries of each matrix inside the layers with the largest gradient at the start.

    batches: whose mean gradient that is. The paper says the first few, its code takes one. Updates here are those of the
    step they belong to; in the code they arrive one or two steps late and the last never, and it does not train on the
    batch it selects by.
    """
    limit = budget.PerMatrix(density=rate, round="floor+1")
    return Method(Select(linear_only=True, score=scores.Gradient(batches), budget=limit), InPlace())
