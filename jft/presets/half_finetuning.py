"""Half fine-tuning: half of the matrices of every layer, drawn at random."""

from __future__ import annotations

import dataclasses
from typing import Any

from jft.methods.layer_schedules import Staged
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.layers import Halves


@dataclasses.dataclass(frozen=True)
class Redraw(Staged):
    """Another draw of :class:`Halves` in each stage."""

    def select(self, select: Any, stage: int) -> Any:
        return dataclasses.replace(select, layers=dataclasses.replace(select.layers, draw=stage))


@register("half_finetuning", paper="Hui et al. 2024, arXiv:2404.18466")
def half_finetuning(
    every: int = 0,
    stages: int = 1,
    draw: int = 0,
    outside: bool = False,
) -> Method:
    """Train half of the matrices of every layer, drawn at random: of attention, of the MLP and of the norms each half.

    2 of the 4 attention matrices; 2 of the 3 of a gated MLP in half of the layers and 1 in the others; half of the norms. A
    new draw for each stage: of ``every`` steps, or ``stages`` of equal length. draw: the number of the random draws, which
    are otherwise the same in every run. A stage of the paper is a whole run (SFT, then DPO): give each another ``draw``.
    outside: train embeddings and head as well. The paper's baseline that sets half of a tuned model back is
    :func:`jft.merge.half_reset`.
    """
    several = bool(every) or stages > 1
    schedule = Redraw(every, 0 if every else stages) if several else None
    select = Select(layers=Halves(draw, outside=outside))
    return Method(select, InPlace(), schedule=schedule)
