"""BitFit: the bias terms alone."""

from __future__ import annotations

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select

CARD = Card(
    formula="Only vectors added to a product or a norm (b, bias) train; all else is frozen.",
    follows="paper: every bias term",
    code="benzakenelad/BitFit@7ead19a, glue_evaluator.py",
    departs="The paper and its code also train the task head (and the pooler): also='^head/'.",
    check="the paths that train of a model with biases of products and of norms",
)


@register("bitfit", paper="Ben Zaken, Ravfogel and Goldberg 2021, arXiv:2106.10199", card=CARD)
def bitfit() -> Method:
    """Train the bias terms only, those of norms included; the paper also trains the task head: add ``also="^head/"``."""
    # jft's own models name a bias ``b``, most others ``bias``; norms have theirs under the same name.
    return Method(Select(include=(r"(^|/)(b|bias)$",)), InPlace())
