"""`Run`: what training comes to, be it finished or stopped by a loss that is not finite."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import delta
from jft.delta.numeric import host, visible
from jft.methods import Plan
from jft.train.state import State


class NonFiniteError(ValueError):
    """The loss or gradient was not finite. step: of the update that was not made; position: of its batch in the data."""

    def __init__(self, message: str, step: int, position: Any):
        super().__init__(message)
        self.step, self.position = step, position

    @classmethod
    def of(cls, values: Mapping[str, Any], step: int, position: Any, then: str, whose: str = "") -> NonFiniteError:
        """That of a step with metrics ``values``; then: what became of the state."""
        what = "has total weight 0 on all processes" if values["weight"] == 0 else "is not finite"
        return cls(
            f"{whose}the loss of step {step} {what}: loss {values['loss']:g}, grad_norm {values['grad_norm']:g}, data "
            f"position {position}; {then}. Look at that batch, lower the learning rate, or clip",
            step,
            position,
        )


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step given to the devices whose metrics nobody has looked at: updates made with it, the learning rate of each member,
    and where each stream stood before its batch.
    """

    step: int
    metrics: Mapping[str, Any]
    rates: Sequence[float]
    positions: list[Any]

    def each(self) -> list[dict[str, float]]:
        """The metrics of each member."""
        values = {k: np.atleast_1d(v) for k, v in jax.device_get(self.metrics).items() if k != "sound"}
        return [{k: float(v[i]) for k, v in values.items()} for i in range(len(self.rates))]


@dataclasses.dataclass
class Run:
    """A finished run. metrics: all rows, ``{"step", "split", ...}``; evaluation: that of the state it ended with.

    error: of a member of a fleet whose loss was not finite, and that ended before the others.
    """

    plan: Plan
    state: State
    metrics: list[dict]
    evaluation: dict[str, float]
    task_vector: delta.TaskVector
    _base: Any
    _kept: Any
    error: NonFiniteError | None = None

    @functools.cached_property
    def params(self) -> Any:
        """The fine-tuned parameters, plain, in the dtypes of the base."""
        return self.merged(self._base)

    def merged(self, like: Any) -> Any:
        """The fine-tuned parameters in the dtypes of ``like``, arrays or shapes."""
        return self.plan.merged(like, self._kept, self.state.trained)


def save(vector: delta.TaskVector, workdir: Path | None) -> None:
    """Write the result of a run into its folder, if it has one."""
    if workdir is None:
        return
    whole = jax.tree.map(lambda x: x if visible(x) else host(x), vector)
    if jax.process_index() == 0:
        whole.save(workdir / "task_vector.safetensors")
