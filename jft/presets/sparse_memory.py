"""Sparse memory fine-tuning: the slots of a memory that the new data reads."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.methods.schedules import Refresh
from jft.select import budget, granularity, memory, structured


@register("sparse_memory", paper="Lin et al. 2025, arXiv:2510.15103")
def sparse_memory(
    slots: int = 512, background: memory.Accesses | str | None = None, batches: int = 1, every: int = 0
) -> Method:
    """Train the slots of a memory that the new data reads and other data does not; everything else is frozen.

    slots: how many rows of the table, those with the best TF-IDF. background: what other data reads
    (:func:`jft.select.memory.slot_counts` over, say, 1000 batches of pretraining data, or its ``.npz`` file); without it the
    most read are taken. The paper scores every batch by itself: ``every=1``, which with ``batches=1`` looks at the batch
    that comes next; 0 chooses once, from the first ``batches``. It forgets least with plain SGD (``optimizer={"name":
    "sgd", "momentum": 0}``), which also leaves a changing selection nothing to carry over; Adam's moments carry over.
    """
    select = Select(
        (r"(^|/)memory/table$",),
        score=structured.Slots(background, batches),
        granularity=granularity.Row(),
        budget=budget.Globally(count=slots),
    )
    return Method(select, InPlace(), schedule=Refresh(every) if every else None)
