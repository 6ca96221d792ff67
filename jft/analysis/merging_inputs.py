"""`Inputs`: what merging rules read: the base, the task vectors of one method and seed, and training data of each task."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import data, merge, tree
from jft.analysis import run_store, seeds, settings, task_runs
from jft.analysis.bases import Base
from jft.analysis.tasks import Task
from jft.delta import TaskVector, apply
from jft.models.core import Scope
from jft.select import grams
from jft.train.calibration import RunCalibration

Statistics = Literal["fisher", "grams", "factors"]


# The parts of a study that all rows of merging depend on.
PARTS = ("merging", "tasks", "splits", "common", "head")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """vectors: resolved task vectors; runs: their entries of ``results.json``; files: where they lie; all by task.

    batches: training examples of each task. Test data are not among them, and of validation data there is
    :meth:`score` alone. config: of the study.
    """

    config: Mapping[str, Any]
    base: Base
    tasks: Mapping[str, Task]
    vectors: Mapping[str, TaskVector]
    runs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Path]
    batches: Mapping[str, Sequence[Any]]
    seed: int | None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        base: Base,
        tasks: Mapping[str, Task],
        runs: Sequence[Mapping[str, Any]],
        method: str,
        seed: int | None,
        workdir: Path,
    ) -> Inputs:
        """Of one method and seed (None: of a study without seeds) in a study's ``workdir``."""
        files = {task: seeds.folder(workdir, task, method, seed) / task_runs.VECTOR for task in tasks}
        vectors = {task: TaskVector.load(file).resolve(base.params) for task, file in files.items()}
        of_seed = {r["task"]: r for r in runs if r["method"] == method and seed in (None, r["seed"])}
        return cls(config, base, tasks, vectors, of_seed, files, _training(config, tasks, base, seed or 0), seed)

    @property
    def taus(self) -> list[TaskVector]:
        return list(self.vectors.values())

    @property
    def data(self) -> str:
        """What rules look at, for manifests."""
        count = sum(len(batch["labels"]) for batch in next(iter(self.batches.values())))
        return f"{count} training examples of each of {', '.join(self.tasks)}"

    @property
    def count(self) -> int:
        """Batches of each task."""
        return len(next(iter(self.batches.values())))

    def dependencies(self, *parts: str) -> dict[str, Any]:
        """What a stored row depends on: ``parts`` of the config, base and vectors."""
        return {
            **{part: self.config[part] for part in (*PARTS, *parts)},
            "base": self.base.fingerprint,
            "vectors": run_store.digests(self.files),
        }

    def chosen(self, names: Sequence[str]) -> Inputs:
        """The same of some of the tasks."""
        by_task = ("tasks", "vectors", "runs", "files", "batches")
        parts: dict[str, Any] = {key: {n: getattr(self, key)[n] for n in names} for key in by_task}
        return dataclasses.replace(self, **parts)

    @functools.cached_property
    def numbered(self) -> list[list[Any]]:
        """The batches of each task, with the number of the ``task`` of their examples."""
        return [
            [{**batch, "task": np.full(len(batch["labels"]), i, np.int32)} for batch in batches]
            for i, batches in enumerate(self.batches.values())
        ]

    @functools.cached_property
    def together(self) -> list[Any]:
        """Batches of all tasks, each with the examples of one batch of every task."""
        return [jax.tree.map(lambda *x: np.concatenate(x), *parts) for parts in zip(*self.numbered, strict=True)]

    @functools.cached_property
    def logits(self) -> Callable[[Any, Any], jax.Array]:
        """``(backbone's parameters, batch) -> logits [B, C]``, each example by the head of its ``task``."""
        tasks = list(self.tasks.values())
        heads = [task.head for task in tasks]
        if any(head is None for head in heads):
            raise ValueError("rules that read predictions need a head for each task: head.kind probe or zero_shot")
        w, b = (jnp.stack([head[key] for head in heads if head is not None]) for key in ("w", "b"))
        model = tasks[0].model

        def logits(params: Any, batch: Any) -> jax.Array:
            features = model.config.pooled(Scope(model.execution), params, batch)
            return jnp.einsum("bd,bdc->bc", features, w[batch["task"]]) + b[batch["task"]]

        return logits

    @functools.cached_property
    def objectives(self) -> dict[str, merge.learned.Objective]:
        """The means over examples of the entropy of predictions, and of the cross entropy of labels."""
        return {"entropy": merge.entropy(self.logits), "cross_entropy": merge.cross_entropy(self.logits)}

    def mean(self, objective: str, tau: TaskVector, batches: Sequence[Any]) -> float:
        """The mean of an objective over batches of one size, at ``base + tau``."""
        params = apply(self.base.params, tau, check=False)
        return float(np.mean([self._compiled[objective](params, batch) for batch in batches]))

    @functools.cached_property
    def _compiled(self) -> dict[str, Callable[[Any, Any], jax.Array]]:
        return {name: jax.jit(objective) for name, objective in self.objectives.items()}

    def score(self, params: Any) -> float:
        """Mean validation accuracy over the tasks."""
        return float(np.mean([task.score("validation", params) for task in self.tasks.values()]))

    def calibrations(self, tuned: bool = True) -> list[RunCalibration]:
        """One for each task, of the backbone on its data: at the fine-tuned weights, or at the base."""
        params = [apply(self.base.params, tau, check=False) if tuned else self.base.params for tau in self.taus]
        return [
            RunCalibration(self.base.model, at, self.base.matrices, task.objective, self.batches[name])
            for at, (name, task) in zip(params, self.tasks.items(), strict=True)
        ]

    def statistics(self, kind: Statistics) -> list[Mapping[str, Any]]:
        """One ``{path: ...}`` for each task, measured at its fine-tuned weights; of gradients, in the loss of its own head."""
        return getattr(self, kind)

    @functools.cached_property
    def grams(self) -> list[Mapping[str, Any]]:
        """See :func:`jft.select.grams.grams`."""
        return [grams.grams(c, self.count) for c in self.calibrations()]

    @functools.cached_property
    def factors(self) -> list[Mapping[str, Any]]:
        """See :func:`jft.select.grams.factors`."""
        return [grams.factors(self._with_head(name, self.base.matrices), self.count) for name in self.tasks]

    @functools.cached_property
    def fisher(self) -> list[Mapping[str, Any]]:
        """The diagonal, from one label of each example drawn from the model's own prediction."""
        every, examples = tree.flatten(self.base.params), self.count * self.config["merging"]["batch_size"]
        return [self._with_head(name, every).squares(examples, per="sampled") for name in self.tasks]

    def _with_head(self, name: str, paths: Iterable[str]) -> RunCalibration:
        task, tau = self.tasks[name], self.vectors[name]
        params = task.params(apply(self.base.params, tau, check=False))
        return RunCalibration(task.model, params, paths, task.objective, self.batches[name])


def _training(config: Mapping[str, Any], tasks: Mapping[str, Task], base: Base, seed: int) -> dict[str, list[Any]]:
    """``{task: batches}`` of training data, ``merging.examples`` of each task."""
    size = config["merging"]["batch_size"]
    options = {"batch_size": size, "seed": seed, "tokenizer": base.tokenizer, "image_size": base.image_size}
    loaders = {name: data.build(settings.data_parts(config, name)["data"], **options) for name in tasks}
    count = max(1, config["merging"]["examples"] // size)
    return {name: list(itertools.islice(iter(loader), count)) for name, loader in loaders.items()}
