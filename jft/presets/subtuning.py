"""SubTuning: a greedy search by validation for the layers that train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from jft.methods import Card
from jft.methods.layer_search import better, stacks
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.calibration import Calibration
from jft.select.layers import Choice, Table, table_of
from jft.tree import LAYERS


@dataclasses.dataclass(frozen=True)
class Greedy(Choice):
    """SubTuning's search: layers are added one by one, each time the one with which tuning evaluates best.

    Every candidate is trained from the base for ``steps`` and evaluated; the search ends where the best one gains less than
    ``tolerance``, or with ``most`` layers (0: no limit). Its first round is the finetuning profile. shortlist: in later
    rounds only so many layers are tried, the best of the profile (0: all).
    """

    steps: int
    metric: str = "loss"
    tolerance: float = 0.0
    most: int = 0
    shortlist: int = 0
    from_data = True

    def __call__(self, calibration: Calibration) -> Table:
        order = [(stack, i) for stack, length in stacks(calibration).items() for i in range(length)]
        chosen: list[tuple[str, int]] = []
        best, tried = -np.inf, order
        while tried and (not self.most or len(chosen) < self.most):
            found = [self._worth(calibration, [*chosen, layer]) for layer in tried]
            place = int(np.argmax(found))
            # The first layer need not gain ``tolerance``: there is nothing before it to compare with.
            if (chosen and found[place] < best + self.tolerance) or found[place] <= best:
                break
            best, layer = found[place], tried[place]
            if not chosen and self.shortlist:
                ranked = np.argsort(-np.asarray(found), kind="stable")[: self.shortlist]
                # Back in the order of the layers, so that ties go to the earlier one in every round.
                tried = [tried[i] for i in sorted(ranked)]
            chosen.append(layer)
            tried = [x for x in tried if x != layer]
        if not chosen:
            raise ValueError(f"no evaluation gave a {self.metric} that is a number")
        return _table(calibration, chosen)

    def _worth(self, calibration: Calibration, layers: list[tuple[str, int]]) -> float:
        return better(
            self.metric, calibration.evaluate(calibration.tuned(self.steps, table=_table(calibration, layers)))
        )


def _table(calibration: Calibration, layers: Iterable[tuple[str, int]]) -> Table:
    chosen: dict[str, list[int]] = {}
    for stack, i in layers:
        chosen.setdefault(stack, []).append(i)
    return table_of(calibration, chosen)


CARD = Card(
    formula="S = {}; add the layer with which tuning from the base evaluates best, while that is better by tolerance",
    follows="the paper's greedy search: it ends at the first gain below the threshold",
    check="every candidate set trained and evaluated in float64; the search over a table of gains with tolerance and shortlist",
    code="talswisa/SubTuning@68b64c2, src/greedy_subset_selection.py",
    departs="the code goes on until a round is worse than the best so far by more than its threshold, and returns the "
    "best set; it starts from the linear probe's accuracy, can remove layers from all of them instead, and can evaluate by "
    "five-fold cross-validation. Here one layer at least trains, and metric is the loss by default",
    defaults={"tolerance": ("a threshold", 0.01), "metric": ("accuracy", "accuracy"), "steps": ("-", "10 epochs")},
)


@register("subtuning", paper="Kaplun et al. 2023, arXiv:2302.06354", card=CARD)
def subtuning(
    steps: int = 100,
    metric: str = "loss",
    tolerance: float = 0.0,
    most: int = 0,
    shortlist: int = 0,
) -> Method:
    """Train the layers that a greedy search by validation finds: one more at a time, while tuning gets better by it.

    Each candidate set is trained from the base for ``steps`` and evaluated on the run's ``eval_data``, by ``loss`` or
    ``accuracy``; the first round is the finetuning profile. The search ends where the gain is below ``tolerance``, or with
    ``most`` layers (0: no limit): up to ``L (L + 1) / 2`` short runs, or with ``shortlist`` n about ``L + n^2 / 2``. The
    paper's variant that cross-validates is not offered. The head always trains: ``also="^classifier/"``.
    """
    search = Greedy(steps, metric, tolerance, most, shortlist)
    return Method(Select(LAYERS, layers=search), InPlace())
