"""Gradual unfreezing of ULMFiT: from the top down, one more layer at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

from jft.methods.layer_schedules import Staged
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.layers import Last


@dataclasses.dataclass(frozen=True)
class Unfreezing(Staged):
    """The last layers first: ``first`` of them, then ``by`` more in each stage; with ``stages``, an equal share in each."""

    first: int = 1
    by: int = 1

    def select(self, select: Any, stage: int) -> Any:
        last = Last(share=(stage + 1, self.stages)) if self.stages else Last(self.first + stage * self.by)
        return dataclasses.replace(select, layers=last)


@register("gradual_unfreezing", paper="Howard and Ruder 2018, arXiv:1801.06146")
def gradual_unfreezing(
    every: int = 0,
    stages: int = 4,
    first: int = 1,
    by: int = 1,
) -> Method:
    """Train the last layer, then one more at a time, from the top down.

    every: steps of a stage (the paper's is an epoch), ``first`` layers in the first and ``by`` more in each; 0 for ``stages``
    of equal length with equal shares of the layers, all of them in the last. What trains goes on with its values and moments.
    No backward pass runs below what trains. Embeddings stay frozen; the paper's last stage has them as well. A task head
    trains from the start with ``also="^classifier/"``. Its learning rates that fall with depth and its slanted triangular
    schedule are not part of this.
    """
    schedule = Unfreezing(every, 0 if every else stages, first=first, by=by)
    start = Last(first) if every else Last(share=(1, stages))
    return Method(Select(layers=start), InPlace(), schedule=schedule)
