"""The L1 distance from the base as a penalty."""

from __future__ import annotations

from jft.methods.card import Card
from jft.methods.parametrise import InPlace
from jft.methods.penalties import L1ToBase
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.tree import HEADS

CARD = Card(
    formula="loss + weight * mean |w - w0| over what trains",
    follows="paper and code of lottery-ticket sparse fine-tuning, in its phase of full fine-tuning",
    check="value and gradient, also at no change, float64 NumPy",
    code="cambridgeltl/composable-sft@29f7872d, src/sft/trainer.py",
    departs="The code divides by the number of all values of the model; a head that does not train is not among them here.",
    defaults={"weight": (0.1, 0.0)},
)


@register("l1_to_base", paper="Ansell et al. 2022, arXiv:2110.07560", card=CARD)
def l1_to_base(weight: float = 0.1, mean: bool = True) -> Method:
    """Train every weight but the head's, drawn to its pretrained value by ``weight`` times the mean absolute distance.

    The regulariser of lottery-ticket sparse fine-tuning, by itself. mean: their mean, or with False their sum.
    """
    return Method(Select(exclude=HEADS), InPlace(), penalties=(L1ToBase(weight, mean),))
