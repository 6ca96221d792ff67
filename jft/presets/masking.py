"""Masking: which weights are there is what trains."""

from __future__ import annotations

from typing import Literal

from jft.methods.card import Card
from jft.methods.masks import Masked
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select

CARD = Card(
    formula="w * 1[s >= 0.01], straight through, s uniform in [-0.02, 0.03 / sparsity - 0.02] at the start",
    follows="paper; code: threshold and start",
    check="both starts as numbers of the code; forward, gradients and three steps from given scores, float64 NumPy",
    code="ptlmasking/maskbert@8d6d8df8, code/masking/maskers.py, code/parameters.py",
    departs=(
        "The paper also masks the pooler and the classifier; here the matrices inside the layers. With two_point a draw for "
        "each weight decides (code: int(sparsity * n) draws with repetition)."
    ),
    defaults={
        "sparsity": ("about 0.05", "-"),
        "threshold": ("-", 1e-2),
        "start": ("-", "uniform (controlled_init=None)"),
        "low": ("-", 2e-2),
        "margin": ("-", 1e-2),
    },
)


@register("masking", paper="Zhao et al. 2020, arXiv:2004.12406", card=CARD)
def masking(
    sparsity: float = 0.05,
    threshold: float = 1e-2,
    start: Literal["uniform", "two_point"] = "uniform",
    low: float | None = None,
    margin: float | None = None,
) -> Method:
    """Train which weights of the matrices inside the layers are there; their values stay. One bit for each is stored.

    sparsity: the fraction masked at random at the start (the paper's best is about 0.05). start: ``uniform``, scores from
    ``-low`` (None: 0.02) upwards, of which that fraction is below the threshold: U(-0.02, 0.58), as in the released code; or
    its ``two_point``, at the threshold plus or minus ``margin`` (None: the threshold, so 0 and 0.02), where more weights change
    for one learning rate. The paper also masks the pooler and the classifier.
    """
    return Method(Select(linear_only=True), Masked(None, sparsity, threshold, start, low, margin))
