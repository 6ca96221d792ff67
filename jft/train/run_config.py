"""`RunConfig`: what all members of a run share: the model and its loss, how far, and where it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jft import parallel
from jft.train import feed, step
from jft.train.metrics import Logging
from jft.train.objectives import infer
from jft.train.objectives import objective as find_objective
from jft.train.state import find_mesh


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Arguments of :func:`jft.finetune`, where they are described; None until :meth:`filled`."""

    model: Any
    steps: int
    objective: Any
    mesh: Any
    dtype: Any
    accumulate: int
    eval_every: int
    eval_batches: int
    log: Logging

    def __post_init__(self):
        for name, least in (("steps", 1), ("eval_every", 0), ("eval_batches", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")

    def filled(self, params: Any, batch: Any) -> RunConfig:
        """The same with the objective, dtype and mesh that the model, its parameters and ``batch``, the first, suggest."""
        objective = infer(batch) if self.objective is None else find_objective(self.objective)
        dtype = step.dtype_of(self.model, params) if self.dtype is None else self.dtype
        mesh = find_mesh(params) if self.mesh is None else self.mesh
        mesh = parallel.make_mesh() if mesh is None and jax.process_count() > 1 else mesh
        feed.check(batch, self.model, mesh)
        return dataclasses.replace(self, objective=objective, dtype=dtype, mesh=mesh)

    def check_evaluation(self, eval_data: Any) -> None:
        """Refuse data for evaluation that ends with the first of several."""
        if 0 < self.eval_every < self.steps and not self.eval_batches and hasattr(eval_data, "__next__"):
            raise ValueError("eval_data is an iterator, which ends with the first evaluation; give a list or a loader")

    def evaluates(self, done: int) -> bool:
        """Whether evaluation is due after ``done`` steps, where there is data for it."""
        return done == self.steps or bool(self.eval_every and done % self.eval_every == 0)


def options(kind: type, value: Any) -> Any:
    """An options object from itself, a mapping of its fields, a number (``every``) or None."""
    if value is None or isinstance(value, int):
        return kind() if value is None else kind(every=value)
    if isinstance(value, Mapping):
        known = [f.name for f in dataclasses.fields(kind)]
        for key in value:
            if key not in known:
                raise ValueError(f"{kind.__name__} has no option {key!r}; it has: {', '.join(known)}")
        return kind(**value)
    return value
