"""L2-SP: decay to the pretrained values."""

from __future__ import annotations

from jft.methods.card import Card
from jft.methods.parametrise import InPlace
from jft.methods.penalties import L2SP
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.tree import HEADS

CARD = Card(
    formula="loss + weight / 2 * |w - w0|^2 + head / 2 * |h|^2, w what is pretrained and h the new head",
    follows="paper; code: both weights",
    check="value and gradient of both terms, float64 NumPy",
    code="holyseven/TransferLearningClassification@14263561, model/network_base.py, run_classification/run_exp.py",
    departs="Every value is drawn, as in the paper; the code's default mode leaves biases and norms out.",
    defaults={"weight": ("swept", 0.01), "head": (0.01, 0.01)},
)


@register("l2_sp", paper="Li, Grandvalet and Davoine 2018, arXiv:1802.01483", card=CARD)
def l2_sp(weight: float = 0.01, head: float = 0.01) -> Method:
    """Train every weight but the head's, drawn to its pretrained value by ``weight / 2`` times the squared distance.

    weight, head: the paper's alpha and beta. A new head trains with ``also="^classifier/"``, and is drawn to 0 by ``head / 2``
    times its squared norm: it has no pretrained value.
    """
    return Method(Select(exclude=HEADS), InPlace(), penalties=(L2SP(weight, new=HEADS, new_weight=head),))
