"""A task of a study: its data, its frozen head, and the score of any parameters on it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import data
from jft.analysis import heads, interpolation, settings
from jft.analysis.bases import Base, write_params
from jft.analysis.interpolation import Forward
from jft.delta import TaskVector
from jft.models.classifier import Classifier
from jft.models.core import Model
from jft.train import evaluate, objective

HELD = 1 << 28  # bytes of a split up to which its batches stay in memory


@dataclasses.dataclass
class Task:
    """head: ``classifier/...`` parameters, or None. examples: of the test split. base: the score of the base on it.

    loaders: of the splits "validation" and "test". bytes: UTF-8 bytes of each split's targets, for bits per byte.
    """

    name: str
    model: Model
    head: dict[str, Any] | None
    loaders: Mapping[str, Any]
    objective: Any
    metric: str
    classes: int | None
    examples: int
    base: float = math.nan
    targets: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    _held: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """Its entry in ``results.json``."""
        return {"name": self.name, "classes": self.classes, "base": self.base, "examples": self.examples}

    def batches(self, split: str) -> Any:
        """Of a split, read once and held where they are small: arithmetic goes through them at every point."""
        loader = self.loaders[split]
        if split not in self._held:
            example = loader.sample()
            nbytes = loader.examples * sum(np.asarray(x).nbytes / len(x) for x in example.values())
            self._held[split] = list(loader) if nbytes <= HELD else loader
        return self._held[split]

    def params(self, backbone: Any) -> Any:
        """The backbone's parameters and this task's head."""
        return backbone if self.head is None else {**backbone, "classifier": self.head}

    def score(self, split: str, backbone: Any) -> float:
        """The study's metric on ``split``."""
        return self._metric(split, evaluate(self.model, self.params(backbone), self.batches(split), self.objective))

    def scores(
        self, split: str, base: Any, taus: Sequence[TaskVector], coefficients: Any, forward: Forward
    ) -> np.ndarray:
        """The metric on ``split`` at ``base + sum_t alpha_t tau_t``, float64 ``[P]``: see :mod:`jft.analysis.interpolation`."""
        arguments = (self.model, self.params(base), taus, coefficients, self.batches(split), self.objective, forward)
        return np.array([self._metric(split, metrics) for metrics in interpolation.scores(*arguments)])

    def _metric(self, split: str, metrics: Mapping[str, float]) -> float:
        """The study's metric, from the metrics of an evaluation."""
        if self.metric != "bits_per_byte":
            return metrics[self.metric]
        tokens, nbytes = self._targets(split)
        # ``nll`` where the loss also has a z-loss.
        return metrics.get("nll", metrics["loss"]) / math.log(2) * tokens / nbytes

    def _targets(self, split: str) -> tuple[float, int]:
        """Target tokens of a split, and the bytes of text they stand for."""
        if split not in self.targets:
            tokens, nbytes = 0.0, 0
            for batch in self.batches(split):
                tokens += float(self.objective.weight(batch, np))
                nbytes += text_bytes(batch, self.objective.weights(batch, np), self.loaders[split].tokenizer)
            self.targets[split] = (tokens, nbytes)
        return self.targets[split]


def text_bytes(batch: Mapping[str, Any], weights: np.ndarray, tokenizer: Any) -> int:
    """UTF-8 bytes of a batch's targets: where ``weights[b, t]`` is set, ``tokens[b, t + 1]`` is one."""
    total = 0
    for row, counts in zip(np.asarray(batch["tokens"]), np.asarray(weights) > 0, strict=True):
        # The target at t is the token at t + 1.
        ids = np.roll(row, -1)[counts]
        if tokenizer.name == "bytes":
            total += int(np.sum(ids < 256))  # the rest are special tokens
        else:
            total += len(tokenizer.core.decode(ids.tolist(), skip_special_tokens=True).encode())
    return total


def prepare_all(config: Mapping[str, Any], base: Base, workdir: Path) -> dict[str, Task]:
    """The tasks of a study's config, their heads fitted here and kept in ``workdir/TASK/head.safetensors``."""
    kind = config["head"]["kind"]
    if kind not in ("probe", "zero_shot", "none"):
        raise ValueError(f"head.kind is {kind!r}; choose probe, zero_shot or none")
    loaders = {name: _loaders(config, base, name) for name in config["tasks"]}
    heads_of = {name: _head(config, base, name, loaders[name]) for name in loaders} if kind != "none" else {}
    if heads_of and config["head"]["pad"]:
        widest = max(head["b"].shape[0] for head in heads_of.values())
        heads_of = {name: heads.widened(head, widest) for name, head in heads_of.items()}
    return {name: _task(config, base, name, loaders[name], heads_of.get(name), workdir) for name in loaders}


def _loaders(config: Mapping[str, Any], base: Base, name: str) -> dict[str, Any]:
    """Loaders of one pass over each split: "train" (for the head), "validation", "test"."""
    parts = settings.data_parts(config, name)
    options = {
        "batch_size": settings.of_run(config, name).batch_size,
        "train": False,
        "tokenizer": base.tokenizer,
        "image_size": base.image_size,
    }
    names = {"train": "data", "validation": "eval_data", "test": "test_data"}
    return {split: data.build(parts[part], **options) for split, part in names.items()}


def _head(config: Mapping[str, Any], base: Base, name: str, loaders: Mapping[str, Any]) -> heads.Head:
    options, task = config["head"], config["tasks"][name]
    names = task.get("names") or loaders["train"].classes
    if not names:
        raise ValueError(f"task {name!r} has no class names, which a head needs; is its data for classification?")
    if options["kind"] == "zero_shot":
        from jft.data.tokenizer import resolve

        templates = task.get("templates") or ("a photo of a {}.",)
        return heads.zero_shot(base.model, base.params, resolve(base.tokenizer, ()), names, templates)
    model = _classifier(base.model, len(names), options["pool"])
    x, labels = heads.features(model, base.params, loaders["train"], options["examples"])
    return heads.linear_probe(x, labels, len(names), options["penalty"])


@functools.cache
def _classifier(backbone: Model, classes: int, pool: str) -> Model:
    """The same object for equal arguments: bound methods compare by it, and equal ones share compiled steps."""
    return Model(Classifier(backbone.config, classes, pool), backbone.execution)


def _task(
    config: Mapping[str, Any], base: Base, name: str, loaders: Mapping[str, Any], head: heads.Head | None, workdir: Path
) -> Task:
    model = base.model
    if head is not None:
        write_params({"classifier": head}, workdir / name / "head.safetensors")
        head = jax.tree.map(jnp.asarray, head)
        model = _classifier(base.model, head["b"].shape[0], config["head"]["pool"])
    task_objective = objective(settings.of_run(config, name).objective or ("lm" if head is None else "classification"))
    classes = loaders["train"].classes
    task = Task(
        name=name,
        model=model,
        head=head,
        loaders={split: loaders[split] for split in ("validation", "test")},
        objective=task_objective,
        metric=config["metric"],
        classes=len(classes) if classes else None,
        examples=loaders["test"].examples,
    )
    task.base = task.score("test", base.params)
    return task
