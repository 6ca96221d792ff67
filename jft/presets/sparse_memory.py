"""Sparse memory fine-tuning: the slots of a memory that the new data reads."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import files
from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import Refresh
from jft.methods.select import Select
from jft.select import budget, granularity, memory
from jft.select.calibration import Calibration
from jft.select.scores import Scores

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Reads:
    """How often a batch reads each slot of the memory."""

    model: Any

    def __call__(self, params: Any, batch: Any) -> Array:
        return memory.accesses(self.model, params, batch)


# eq=False: arrays have no truth value to compare by, and no hash.
@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """TF-IDF of the slots of a memory: what ``batches`` of the training data read, and the background does not.

    background: :class:`jft.select.memory.Accesses` of data whose skills should stay, made by
    :func:`jft.select.memory.slot_counts`; a ``.npz`` file of its three fields; None for reads alone. Equal to itself alone.
    """

    background: memory.Accesses | str | None = None
    batches: int = 1

    def __call__(self, calibration: Calibration) -> Scores:
        reads = calibration.sums(_Reads(calibration.model), self.batches)
        known = self._known(reads.shape[0])
        scores = memory.tf_idf(reads, jnp.asarray(known.batches, jnp.float32), jnp.float32(known.size))
        return dict.fromkeys(calibration.paths, scores)

    def _known(self, slots: int) -> memory.Accesses:
        nothing = np.zeros(slots, np.int64)
        known = self.background
        if known is None:
            # A background of one batch that reads nothing: all slots are equally rare, and the counts decide.
            return memory.Accesses(nothing, nothing, 1)
        # Read here, not in the preset: a config may name a file that is on the machine of the run alone.
        if isinstance(known, str | os.PathLike):
            held = files.read_npz(known)
            if not {"counts", "batches", "size"} <= set(held):
                raise ValueError(f"{known} has the arrays {', '.join(held)}; a background has counts, batches and size")
            known = memory.Accesses(held["counts"], held["batches"], int(held["size"]))
        if known.batches.shape != nothing.shape:
            raise ValueError(f"the background counts {known.batches.shape[0]} slots, and the memory has {slots}")
        return known


CARD = Card(
    formula=(
        "score_i = c_i / sum_j c_j * log((|B| + 1) / (|{b in B: slot i is read in b}| + 1)), c_i the reads of slot i by the "
        "new batch, B the background batches; the rows of the memory's table with the `slots` best train"
    ),
    follows="Paper: formula, every batch by itself, a background of 1000 pretraining batches. No public code.",
    departs=(
        "Without a background, which a preset cannot know, the most read slots train. The optimizer is the run's: Adam's "
        "moments of slots that stay are carried over, where the paper's plain SGD has none."
    ),
    defaults={"every": (1, "-"), "batches": (1, "-")},
    check="reads of a decoder and TF-IDF in float64 NumPy; steps of the chosen rows, chosen once and anew for every batch",
)


@register("sparse_memory", paper="Lin et al. 2025, arXiv:2510.15103", card=CARD)
def sparse_memory(
    slots: int = 512, background: memory.Accesses | str | None = None, batches: int = 1, every: int = 1
) -> Method:
    """Train the slots of a memory that the new data reads and other data does not; everything else is frozen.

    slots: how many rows of the table, those with the best TF-IDF. background: what other data reads
    (:func:`jft.select.memory.slot_counts` over, say, 1000 batches of pretraining data, or its ``.npz`` file); without it the
    most read are taken. every: steps from one selection to the next. The paper scores every batch by itself, which is 1 and,
    with ``batches=1``, looks at the batch that comes next; 0 chooses once, from the first ``batches``. It forgets least with
    plain SGD (``optimizer={"name": "sgd", "momentum": 0}``), which also leaves a changing selection nothing to carry over;
    Adam's moments carry over.
    """
    select = Select(
        (r"(^|/)memory/table$",),
        score=Slots(background, batches),
        granularity=granularity.Row(),
        budget=budget.Globally(count=slots),
    )
    return Method(select, InPlace(), schedule=Refresh(every) if every else None)
