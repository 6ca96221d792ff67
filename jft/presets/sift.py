"""SIFT: the entries of each matrix with the largest gradient at the start."""

from __future__ import annotations

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores

CARD = Card(
    formula="Of each matrix of n entries the floor(rate * n) + 1 with the largest |g| train, g the mean gradient of the first "
    "batches at theta0.",
    follows="paper: gradient before training, per matrix; code: the count with its + 1, one batch",
    code="song-wx/SIFT@5bef8a06, sift/sift.py",
    departs="An update belongs to its own step; the code's arrive one step late (two for the weight whose gradient comes last) "
    "and the last never. Training begins with the batch that selects; the code's with the next. floor in decimal arithmetic.",
    defaults={"rate": (0.05, "-"), "batches": ("the first few", 1)},
    check="entries and three Adam steps against float64 NumPy gradients sorted in each matrix",
)


@register("sift", paper="Song et al. 2023, arXiv:2312.11875", card=CARD)
def sift(rate: float = 0.05, batches: int = 1) -> Method:
    """Train the ``int(rate * size) + 1`` entries of each matrix inside the layers with the largest gradient at the start.

    rate: the paper's 5 % of LLaMA (0.8 % in its GLUE scripts). batches: whose mean gradient that is. The paper says the first
    few, its code takes one. Updates here are those of the step they belong to; in the code they arrive one or two steps late
    and the last never, and it does not train on the batch it selects by.
    """
    limit = budget.PerMatrix(density=rate, round="floor+1")
    return Method(Select(linear_only=True, score=scores.Gradient(batches), budget=limit), InPlace())
