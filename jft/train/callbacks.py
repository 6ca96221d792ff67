"""Callbacks: functions of the user's that follow a run from Python, and may end it early.

    jft.finetune(..., callbacks=[lambda event: print(event.step, event.metrics), stop])

Each gets an :class:`Event` for every row of metrics, of training and of evaluation; ``stop`` returns True where the run shall
end, as ``event.split == "eval" and event.metrics["loss"] < 0.1``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Event:
    """A row of metrics as it is logged. step: updates made; steps: of the whole run. split: ``train`` or ``eval``.

    member: the name of a member of a fleet, empty for a run by itself. merged: makes :attr:`params`.
    """

    step: int
    steps: int
    split: str
    metrics: Mapping[str, float]
    member: str
    merged: Callable[[], Any]

    @property
    def params(self) -> Any:
        """The parameters as they are now, plain: the base with what was trained. Each reading makes them anew.

        At ``eval`` those of the evaluation; at ``train`` up to one update newer, since metrics are fetched late. With several
        processes all must read them, or none.
        """
        return self.merged()


class Callback(Protocol):
    """A function of an :class:`Event`; True ends the run after the step that is under way, with its state as the result.

    It is called on every process of a run, and must return the same on all.
    """

    def __call__(self, event: Event, /) -> bool | None: ...
