"""Precise SFT: the attention heads that carry the right answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.select import structured
from jft.select.heads import rolled
from jft.select.structured import CHOSEN, SIDES


@register("precise_sft", paper="Zhang et al. 2024, arXiv:2409.01659")
def precise_sft(
    heads: float = 0.05,
    mlps: int = 0,
    batches: int = 1,
    counterfactual: Callable[[Any], Any] | None = rolled,
    freeze: bool = True,
) -> Method:
    """Train the few attention heads that carry the right answers: their columns of q, k, v and rows of o.

    heads: how many, of all layers together, as a fraction or a number. Each is scored by how far the right answer's logit
    falls over ``batches`` when the head says what it says on ``counterfactual(batch)``, only along paths through no other
    head (``freeze``; see :func:`jft.select.heads.patching`). The paper makes counterfactuals by hand, from prompts without
    the arithmetic; the default is another example of the batch. mlps: whole MLPs trained as well, the best by the same
    measure; every layer then pays for its MLP's gradient, with those that are not chosen as padding.
    """
    include = r"attn/(q|k|v|o)/w$" + (r"|mlp/(up|gate|down)/w$" if mlps else "")
    choice = structured.PatchedHeads(heads, mlps, batches, counterfactual, freeze)
    select = Select((include,), linear_only=True, score=choice, granularity=SIDES, budget=CHOSEN)
    return Method(select, InPlace())
