"""`RunConfig`: the settings that all members of a run share, and the facts of a run that checkpoints and task vectors carry."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jft import delta, parallel, tree
from jft.methods import Method
from jft.train import feed, step
from jft.train.metrics import Logging
from jft.train.objectives import infer
from jft.train.objectives import objective as find_objective
from jft.train.optimizers import Given
from jft.train.samples import Samples
from jft.train.state import State, find_mesh


@dataclasses.dataclass(frozen=True)
class Profiling:
    """Options of the profile. steps: how many to trace, 0 for none. start: steps before them, since the run began or went on.

    The first steps of a run warm up the devices, hence those that are passed over.
    """

    steps: int = 0
    start: int = 3

    def __post_init__(self):
        if self.steps < 0 or self.start < 0:
            raise ValueError(f"profile.steps is {self.steps} and start {self.start}; they must be at least 0")


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
    profile: Profiling
    samples: Samples | None = None

    def __post_init__(self):
        for name, least in (("steps", 1), ("eval_every", 0), ("eval_batches", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        # A run that goes on may have fewer steps left, and traces those.
        if self.profile.steps and self.profile.start + self.profile.steps > self.steps:
            raise ValueError(
                f"profile.start ({self.profile.start}) + profile.steps ({self.profile.steps}) is beyond steps={self.steps}"
            )

    def filled(self, params: Any, batch: Any) -> RunConfig:
        """The same with the objective, dtype and mesh that the model, its parameters and ``batch``, the first, suggest."""
        objective = infer(batch) if self.objective is None else find_objective(self.objective)
        dtype = step.dtype_of(self.model, params) if self.dtype is None else _dtype(self.dtype)
        mesh = find_mesh(params) if self.mesh is None else self.mesh
        # One process may use one device of many, but several processes must compute one program together.
        mesh = parallel.make_mesh() if mesh is None and jax.process_count() > 1 else mesh
        feed.check(batch, self.model, mesh)
        return dataclasses.replace(self, objective=objective, dtype=dtype, mesh=mesh)

    def check_evaluation(self, eval_data: Any) -> None:
        """Refuse data for evaluation that ends with the first of several, or never."""
        if not self.eval_batches and getattr(eval_data, "train", False) is True:
            raise ValueError(
                "eval_data is a loader for training, which is endless: build it with train=False, or give eval_batches, so "
                "many batches of it"
            )
        # With eval_batches an endless iterator serves: each evaluation takes the next ones.
        if 0 < self.eval_every < self.steps and not self.eval_batches and hasattr(eval_data, "__next__"):
            raise ValueError("eval_data is an iterator, which ends with the first evaluation; give a list or a loader")
        if self.samples is not None:
            self.samples.check(self.model, eval_data)

    def evaluates(self, done: int) -> bool:
        """Whether evaluation is due after ``done`` steps, where there is data for it."""
        return done == self.steps or bool(self.eval_every and done % self.eval_every == 0)


def _dtype(name: Any) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        raise ValueError(f"dtype {name!r} is unknown; choose float32, bfloat16 or float16") from None


def options(kind: type, value: Any) -> Any:
    """An options object from itself, a mapping of its fields, a number (its first field) or None."""
    if value is None or isinstance(value, int):
        return kind() if value is None else kind(value)
    if isinstance(value, Mapping):
        known = [f.name for f in dataclasses.fields(kind)]
        for key in value:
            if key not in known:
                raise ValueError(f"{kind.__name__} has no option {key!r}; it has: {', '.join(known)}")
        return kind(**value)
    return value


def check_manifest(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's manifest entries; those that no task vector could hold are refused now, not after training."""
    entries = delta.manifest.check(manifest or {})
    for key in ("base", "operation"):
        if key in entries:
            raise ValueError(f"manifest entry {key!r} is written by finetune itself; choose another name")
    return entries


def describe(
    method: Method, optimizer: Any, objective: Any, state: State, batch: Any, dtype: Any, seed: int
) -> dict[str, Any]:
    """The identity of a run, as JSON: it may only resume from checkpoints with the same one."""
    if isinstance(optimizer, Given):
        # A closure cannot be compared between processes; the paths of its state are what can.
        options: Any = {"name": "optax", "state": sorted(tree.flatten(state.opt_state))}
    else:
        options = dataclasses.asdict(optimizer)
    # The standard forward pass is not named, so that it never shows as a change.
    linear = {} if method.forward == "standard" else {"forward": method.forward, "until": method.until}
    return {
        "method": {"name": method.name, "options": _json(method.options), **linear},
        "optimizer": _json(options),
        "objective": {"name": type(objective).__name__, **_json(getattr(objective, "__dict__", {}))},
        "batch": {p: [list(x.shape), np.dtype(x.dtype).name] for p, x in tree.flatten(batch).items()},
        # Shapes of what trains catch a changed base config or selection that the options do not show.
        "trained": {p: [list(x.shape), np.dtype(x.dtype).name] for p, x in tree.flatten(state.trained).items()},
        "dtype": None if dtype is None else np.dtype(dtype).name,
        "seed": seed,
    }


def _json(value: Any) -> Any:
    """``value`` as JSON would give it back; functions by their name, what else it cannot hold by its ``repr``."""

    def name_of(value: Any) -> str:
        # The repr of a function has its address, which another process puts elsewhere.
        name = getattr(value, "__qualname__", None)
        return f"{value.__module__}.{name}" if name else repr(value)

    return json.loads(json.dumps(value, default=name_of))
