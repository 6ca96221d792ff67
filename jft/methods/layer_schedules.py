"""Schedules of layers: which whole layers and matrices train changes on the way."""

from __future__ import annotations

import dataclasses
from typing import Any

from jft.methods.plan import Method
from jft.methods.schedules import Renewal, Schedule, Standing
from jft.select.layers import Choice


@dataclasses.dataclass(frozen=True)
class Staged(Schedule):
    """Stages of ``every`` steps each, or ``stages`` of equal length. What is dropped keeps its value."""

    every: int = 0
    stages: int = 0

    def __post_init__(self) -> None:
        if (self.every > 0) == (self.stages > 0) or min(self.every, self.stages) < 0:
            raise ValueError(f"every={self.every} and stages={self.stages}: give one of them, at least 1")

    def stage(self, step: int, steps: int) -> int:
        """The stage, from 0, of update ``step`` out of ``steps``."""
        # Integer arithmetic, so that stages are equal to within one step and the last one ends with the run.
        return step // self.every if self.every else step * self.stages // steps

    def due(self, step: int, steps: int) -> bool:
        # Not at step 0: the method of the first stage is what the run begins with.
        return step > 0 and self.stage(step, steps) != self.stage(step - 1, steps)

    def method_at(self, method: Method, step: int, steps: int) -> Method:
        return dataclasses.replace(method, select=self.select(method.select, self.stage(step, steps)))

    def select(self, select: Any, stage: int) -> Any:
        """What is selected in ``stage``."""
        raise NotImplementedError

    def renew(self, standing: Standing) -> Renewal:
        return Renewal({}, method=self.method_at(standing.plan.method, standing.step, standing.steps))


@dataclasses.dataclass(frozen=True)
class Decided(Schedule):
    """Every ``every`` steps ``choice`` again, from the weights as they then are and the batches that come next."""

    choice: Choice
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"a decision every {self.every} steps; at least 1")

    def due(self, step: int, steps: int) -> bool:
        # Not at step 0: the run itself decides before its first step.
        return step > 0 and step % self.every == 0

    def renew(self, standing: Standing) -> Renewal:
        return Renewal({}, method=standing.plan.method.decided(self.choice(standing.calibration)))
