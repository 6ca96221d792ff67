"""Skip tuning: the last layers of both towers of a CLIP."""

from __future__ import annotations

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.layers import LastOf

CARD = Card(
    formula="layers 6 to 11 of 12 of either tower, their final norms and both projections train; all else is frozen",
    follows="the authors' code (START_LAYER 6 of the 12 layers of ViT-B/16 and of its text tower)",
    check="what the plan changes of a CLIP of 12 and 12 layers at the defaults, and of a smaller one, weight by weight",
    code="Koorye/SkipTuning@8c4636e, train.py and trainers/skip_tuning.py",
    departs="that the layers below do not run forwards either, and that few classes are compared with, are steps of their own "
    "(jft.models.split, jft.select.classes)",
    defaults={"vision": ("-", 6), "text": ("-", 6), "projections": ("-", True)},
)


@register("skip_tuning", paper="Wu et al. 2024, arXiv:2412.11509", card=CARD)
def skip_tuning(vision: int = 6, text: int = 6, projections: bool = True) -> Method:
    """Train the last layers of both towers of a CLIP, and what stands behind them.

    vision, text: how many layers of each; the authors' are six of twelve. projections: final norms and projections as well.
    Nothing runs backwards below; the speed of the paper comes from not running the rest forwards either: ``prefix, suffix =
    jft.models.split.split(model, {"vision/layers": V - vision, "text/layers": T - text})``, ``prefix(params, batch)`` once
    for each example, and ``finetune(suffix, params, ...)`` on what it gave; and from comparing each batch with few classes
    (:mod:`jft.select.classes`). The parameters, and the task vector, are those of the whole model.
    """
    return Method(Select(layers=LastOf((("vision", vision), ("text", text)), projections)), InPlace())
