"""ESFT: the experts that the data uses most."""

from __future__ import annotations

from typing import Literal

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.select import granularity, structured
from jft.select.structured import CHOSEN


@register("esft", paper="Wang et al. 2024, arXiv:2407.01906")
def esft(p: float | None = None, kind: Literal["token", "gate"] = "token", batches: int = 8) -> Method:
    """Train the experts of each layer that the data uses most; the router, other experts and the rest are frozen.

    kind: an expert's score is the share of ``batches``' tokens that go to it (ESFT-Token), or its mean gate value
    (ESFT-Gate), each layer's scores summing to 1. p: the best are taken until their scores reach it; default 0.2 for
    tokens and 0.1 for gates. One stored script of the authors sums scores over layers instead; that is not followed. The
    backward pass multiplies the chosen experts' matrices alone. For their options that train all else too: ``also``.
    """
    share = (0.2 if kind == "token" else 0.1) if p is None else p
    select = Select(
        (r"/experts/",),
        score=structured.ExpertUse(share, kind, batches),
        granularity=granularity.Expert(),
        budget=CHOSEN,
    )
    return Method(select, InPlace())
