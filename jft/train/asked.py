"""`Asked`: what :func:`jft.finetune` is told, checked, and with its defaults filled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jft import methods, parallel
from jft.methods import Method
from jft.train import feed, step
from jft.train.objectives import infer
from jft.train.objectives import objective as find_objective
from jft.train.state import find_mesh


@dataclasses.dataclass(frozen=True)
class Logging:
    """What is logged. every: steps between rows. progress: show the run on stdout. tensorboard; wandb: a project's name."""

    every: int = 10
    progress: bool = True
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of :func:`jft.finetune`, where they are described: of one run, or of all members of a fleet."""

    model: Any
    params: Any
    data: Any
    steps: int
    method: Any
    optimizer: Any
    objective: Any
    mesh: Any
    eval_data: Any
    eval_every: int
    eval_batches: int
    accumulate: int
    dtype: Any
    seed: int
    workdir: Any
    checkpoint: Any
    log: Any
    tokenizer: Any
    manifest: Mapping[str, Any] | None
    donate: bool
    fleet: Sequence[Mapping[str, Any]] | None

    def __post_init__(self):
        for name, least in (("steps", 1), ("eval_every", 0), ("eval_batches", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        object.__setattr__(self, "workdir", None if self.workdir is None else Path(self.workdir))
        object.__setattr__(self, "log", _options(Logging, self.log))

    def filled(self, batch: Any) -> Asked:
        """The same with the objective, dtype and mesh that the model, its parameters and ``batch``, the first, suggest."""
        objective = infer(batch) if self.objective is None else find_objective(self.objective)
        dtype = step.dtype_of(self.model, self.params) if self.dtype is None else self.dtype
        mesh = find_mesh(self.params) if self.mesh is None else self.mesh
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

    def checkpoints(self, itself: Any, decided: Any) -> Any:
        """The checkpoints of a run that has a workdir; the module that knows Orbax is loaded for them alone."""
        if self.workdir is None:
            if self.checkpoint:
                raise ValueError("checkpoint is given, but no workdir to write to")
            return None
        from jft.train.checkpoints import Checkpointing, Checkpoints

        options = _options(Checkpointing, self.checkpoint)
        every, between = options.every, self.eval_every
        if options.best and self.fleet is not None:
            raise ValueError(
                "checkpoint.best: members are best at steps of their own, and a fleet has one checkpoint; leave it out"
            )
        if options.best and (self.eval_data is None or not between or not every or every % between):
            raise ValueError(
                f"checkpoint.best={options.best!r} needs eval data, and checkpoint.every ({every}) to be a positive "
                f"multiple of eval_every ({between}), so that every checkpoint has been evaluated"
            )
        self.workdir.mkdir(parents=True, exist_ok=True)
        return Checkpoints(self.workdir / "checkpoints", options, itself, decided)

    def begin(self, checkpoints: Any) -> int:
        """The step that training goes on from: that of the newest checkpoint, or 0."""
        begin = checkpoints.latest or 0 if checkpoints else 0
        if begin > self.steps:
            what = "run" if self.fleet is None else "fleet"
            raise ValueError(
                f"the {what} in {self.workdir} stands at step {begin}, beyond steps={self.steps}; ask for at least that many"
            )
        return begin


def find_method(value: str | Mapping[str, Any] | Method) -> Method:
    """A method from its name, ``{"name": ..., **options}`` or itself."""
    if isinstance(value, str):
        return methods.method(value)
    return methods.method(**value) if isinstance(value, Mapping) else value


def _options(kind: type, value: Any) -> Any:
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
