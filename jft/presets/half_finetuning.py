"""Half fine-tuning: half of the matrices of every layer, drawn at random."""

from __future__ import annotations

import dataclasses
from typing import Any

from jft.methods import Card
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


CARD = Card(
    formula="in each layer 2 of q, k, v, o, 1 of 2 norms, and of gate, up, down 2 in ceil(L / 2) layers and 1 in the others, "
    "all at random; embeddings, head and final norm always",
    follows="the paper as its baseline in SSU's code has it (the authors released none): counts, and what always trains",
    check="counts in every layer for odd and even depths; three stages of Adam against float64, embeddings and head among "
    "what moves",
    code="gucci-j/ssu@e4421e9, training/src/utils/model_utils.py (_freeze_hft_parameters)",
    departs="an MLP without gate trains 1 of its 2 matrices in every layer, where that code trains 0 or 1; of four norms or "
    "more half train, where that code freezes one. Biases go with their matrices",
    defaults={"outside": (True, True), "stages": ("SFT, DPO or a task each", 1)},
)


@register("half_finetuning", paper="Hui et al. 2024, arXiv:2404.18466", card=CARD)
def half_finetuning(
    every: int = 0,
    stages: int = 1,
    draw: int = 0,
    outside: bool = True,
) -> Method:
    """Train half of the matrices of every layer, drawn at random: of attention, of the MLP and of the norms each half.

    2 of the 4 attention matrices; 2 of the 3 of a gated MLP in half of the layers and 1 in the others; half of the norms. A
    new draw for each stage: of ``every`` steps, or ``stages`` of equal length. draw: the seed of the draws, which are
    otherwise the same in every run. A stage of the paper is a whole run (SFT, then DPO): give each another ``draw``. outside:
    embeddings, head and final norm always train, as in the paper. The paper's baseline that sets half of a tuned model back
    is :func:`jft.merge.half_reset`.
    """
    several = bool(every) or stages != 1
    # stages=1 is the default and not a request, so ``every`` alone must not clash with it.
    schedule = Redraw(every, 0 if every and stages == 1 else stages) if several else None
    select = Select(layers=Halves(draw, outside=outside))
    return Method(select, InPlace(), schedule=schedule)
