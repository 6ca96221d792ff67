"""Skip tuning: the last layers of both towers of a CLIP."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.layers import LastOf


@register("skip_tuning", paper="Wu et al. 2024, arXiv:2412.11509")
def skip_tuning(vision: int = 4, text: int = 4, projections: bool = True) -> Method:
    """Train the last layers of both towers of a CLIP, and what stands behind them.

    vision, text: how many layers of each. projections: final norms and projections as well. Nothing runs backwards below;
    the speed of the paper comes from not running the rest forwards either: ``prefix, suffix = jft.models.split.split(model,
    {"vision/layers": V - vision, "text/layers": T - text})``, ``prefix(params, batch)`` once for each example, and
    ``finetune(suffix, params, ...)`` on what it gave; and from comparing each batch with few classes
    (:func:`jft.select.classes.likely_classes`). The parameters, and the task vector, are those of the whole model.
    """
    return Method(Select(layers=LastOf((("vision", vision), ("text", text)), projections)), InPlace())
