"""TR-PTS: the entries of matrices with the largest Fisher information, layer by layer."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores
from jft.select.calibration import Per


@register("tr_pts", paper="Luo et al. 2025, arXiv:2507.22872")
def tr_pts(
    density: float = 0.005,
    count: int = 1024,
    per: Per = "example",
) -> Method:
    """Train the entries of the matrices inside the layers with the largest Fisher information; the parameter half of TR-PTS.

    The ``density`` of them all that is largest gives each layer its number, and the layer's largest train; by one score
    both are the same selection. per: as in ``fish_mask``. The other half, tokens dropped by the attention of [CLS], is
    an option of the vision model: ``VisionConfig(selection=TokenSelection(...))``.
    """
    select = Select(linear_only=True, score=scores.Fisher(count, per), budget=budget.Globally(density=density))
    return Method(select, InPlace())
