"""What a recipe comes to: one job for every tensor of the output, its files, its manifest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jft.delta import manifest as manifests
from jft.merge.mergekit import PASSTHROUGH, Rules
from jft.merge.recipe import Input, Recipe, Slice, resolve
from jft.merge.sources import Directory, Source, StatisticsFile, VectorFile, open_source
from jft.merge.streaming import Job, Part
from jft.models.hf import writer
from jft.models.hf.checkpoint import DTYPES

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LAYER = re.compile(r"^(.*?\.)?(\d+)\.(.*)$")
# Before the layers: what the first slice gives. The rest, norms and head, is the last one's.
_FIRST = re.compile(r"embed|wte|wpe|word_embeddings|position")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Jobs, ``config.json``, the directory that tokenizer files come from, the manifest, and remarks for whoever runs it."""

    jobs: list[Job]
    config: dict[str, Any]
    companions: Path
    manifest: dict[str, Any]
    notes: list[str]

    @property
    def tensors(self) -> list[writer.Tensor]:
        """The tensors of the output."""
        return [writer.Tensor(job.name, job.shape, job.dtype, _never) for job in self.jobs]

    @property
    def nbytes_read(self) -> int:
        """Bytes of all tensors that are read, each as often as it is."""
        return sum(part.source.nbytes(part.name) for job in self.jobs for part in job.parts)


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe; all headers are read and compared, no tensors but integers and what verifies a base."""
    return _Planner(recipe).plan()


class _Planner:
    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.rules = None if recipe.method == PASSTHROUGH else Rules(recipe)
        self.notes = self.rules.notes if self.rules else []
        self.base = self._directory(recipe.base) if recipe.base else None
        self.sources: dict[str, Source] = {}
        self.whole = all(i.layers is None for s in recipe.slices for i in s.inputs)
        for reference in [*recipe.models, *(s.base for s in recipe.slices if s.base)]:
            if reference == recipe.base and self.base is not None:
                self.sources[reference] = self.base
            elif reference not in self.sources:
                self.sources[reference] = open_source(reference, self.base, recipe.check)
        first = self.sources[recipe.slices[0].inputs[0].model]
        described = self.base or first
        if not isinstance(described, Directory):
            raise ValueError(f"{recipe.slices[0].inputs[0].model} is a change of a model; give its base_model")
        self.reference = described
        files = [i.statistics for s in recipe.slices for i in s.inputs if i.statistics]
        self.statistics = {path: StatisticsFile(path, described) for path in files}
        if len({frozenset(one.values) for one in self.statistics.values()}) > 1:
            raise ValueError(f"statistics are of the same weights for all models; those of {', '.join(files)} differ")
        for opened in dict.fromkeys(self.sources.values()):
            self._check(opened)

    def _directory(self, reference: str) -> Directory:
        source = open_source(reference, None)
        if not isinstance(source, Directory):
            raise ValueError(f"base_model {reference!r} must be a model directory or hub id")
        return source

    def _check(self, source: Source) -> None:
        baseless = self.rules is not None and self.rules.baseless
        if (self.base is None or baseless) and (
            isinstance(source, VectorFile) or getattr(source, "on", source) is None
        ):
            raise ValueError(
                f"{source.path} is a change of a model, and {self.recipe.method} merges "
                + (
                    "models: task_arithmetic merges changes, and MODEL+ADAPTER is a model"
                    if baseless
                    else "it into a base_model"
                )
            )
        if source is self.reference:
            return
        if not self.whole and isinstance(source, Directory):
            # Models of slices may have more layers than their base: what is used is compared tensor by tensor.
            return
        floats = self._floats(self.reference)
        if isinstance(source, Directory):
            self.notes += [
                f"{name} of {source.path} is tied: {source.tensor(name)}"
                for name in floats
                if source.tensor(name) != name
            ]
            if self.recipe.mismatch == "base" and self.base is not None and not baseless:
                self.notes += source.tolerate(floats, self.reference)
                return
        source.check(floats, self.reference)

    def _floats(self, directory: Directory) -> dict[str, Any]:
        return {n: e for n, e in directory.entries.items() if not _integers(e.dtype)}

    def plan(self) -> Plan:
        """Everything; see :func:`plan`."""
        jobs = list(self._jobs())
        config = dict(self.reference.config)
        if not self.whole:
            self._count_layers(config)
        if self.recipe.dtype:
            config.pop("torch_dtype", None)
            config["dtype"] = self.recipe.dtype
        return Plan(jobs, config, self._companions(), self._manifest(), self.notes)

    def _jobs(self) -> Iterator[Job]:
        if self.whole:
            lengths = _stacks(self.reference)
            for name in self.reference.entries:
                layer, layers = _position(name, lengths)
                t = 0.0 if not layers else layer / (layers - 1) if layers > 1 else 1.0
                yield self._job(name, self.recipe.slices[0], {}, t, layer, layers)
            return
        slices = self.recipe.slices
        prefix, total = self._prefix(), sum(_length(s) for s in slices)
        outside = [n for n in self.reference.entries if not n.startswith(prefix) or not _LAYER.match(n)]
        yield from (self._job(n, slices[0], {}, 0.0, 0, 0) for n in outside if _FIRST.search(n))
        number = 0
        for part in slices:
            for i in range(_length(part)):
                t = i / (_length(part) - 1) if _length(part) > 1 else 1.0
                for rest in self._in_layer(part.inputs[0], prefix, i):
                    numbers = {x.model: f"{prefix}{_first(x) + i}.{rest}" for x in part.inputs}
                    yield self._job(f"{prefix}{number}.{rest}", part, numbers, t, number, total)
                number += 1
        yield from (self._job(n, slices[-1], {}, 0.0, 0, 0) for n in outside if not _FIRST.search(n))

    def _job(self, name: str, part: Slice, names: Mapping[str, str], t: float, layer: int, layers: int) -> Job:
        """names: the tensor of each model, where it is not ``name`` itself."""
        inputs = [(x, self.sources[x.model]) for x in part.inputs]
        base = self.sources[part.base] if part.base else None
        of = lambda source, model: Part(source, names.get(model, next(iter(names.values()), name)))
        first = of(base or inputs[0][1], part.base or inputs[0][0].model)
        entry = self._entry(first, name)
        if _integers(entry.dtype):
            self._equal_integers(first, inputs)
            return Job(name, entry.shape, DTYPES[entry.dtype], None, first)
        dtype = np.dtype(DTYPES[_DTYPE_NAMES[self.recipe.dtype]] if self.recipe.dtype else DTYPES[entry.dtype])
        scopes = [part.parameters, self.recipe.parameters]
        if self.rules is None:
            if len(inputs) != 1:
                raise ValueError(f"passthrough takes one model for {name!r}, not {len(inputs)}")
            scale = resolve("scale", [inputs[0][0].parameters, *scopes], first.name, t)
            return Job(name, entry.shape, dtype, None, first, scale=1.0 if scale is None else float(scale))
        baseless = self.rules.baseless
        merged = [(x, s) for x, s in inputs if baseless or s is not base]
        models = tuple(of(source, x.model) for x, source in merged)
        for model in models:
            if isinstance(model.source, Directory) and model.name not in model.source.unchanged:
                other = self._entry(model, name)
                if other.shape != entry.shape:
                    raise ValueError(
                        f"{name!r} has shape {other.shape} in {model.source.path}, {entry.shape} elsewhere"
                    )
        if not models:
            return Job(name, entry.shape, dtype, None, first)
        own = [(m.name, [x.parameters, *scopes]) for m, (x, _) in zip(models, merged, strict=True)]
        rule, scale = self.rules.of(scopes, own, name, t)
        statistics = tuple(self.statistics[x.statistics] for x, _ in merged if x.statistics)
        if statistics and not rule.statistics:
            raise ValueError(f"{self.recipe.method} reads no statistics of data; leave them out of its models")
        if rule.statistics and len(statistics) < len(models):
            raise ValueError(
                f"{self.recipe.method} reads statistics of data: give each model its file, statistics: FILE; "
                f"{len(statistics)} of {len(models)} have one"
            )
        return Job(
            name,
            entry.shape,
            dtype,
            rule,
            None if baseless else self._based(base, first),
            models,
            scale,
            layer,
            layers,
            statistics,
        )

    def _based(self, base: Source | None, first: Part) -> Part:
        if base is None:
            raise ValueError(f"{self.recipe.method} merges changes of a base; give base_model")
        return first

    def _entry(self, part: Part, name: str) -> Any:
        assert isinstance(part.source, Directory), "adapters and task vectors have the shapes of their base"
        entry = part.source.entries.get(part.source.tensor(part.name))
        if entry is None:
            raise ValueError(f"{part.source.path} lacks {part.name!r}, of which {name!r} of the output would be made")
        return entry

    def _equal_integers(self, first: Part, inputs: list[tuple[Input, Source]]) -> None:
        assert isinstance(first.source, Directory), "changes of a model have no integers"
        for _, source in inputs:
            if not isinstance(source, Directory) or first.name not in source.entries:
                continue
            if not np.array_equal(source.stored(first.name), first.source.stored(first.name)):
                raise ValueError(
                    f"{first.name!r} holds integers, and they differ in {source.path}; they cannot be merged"
                )

    def _prefix(self) -> str:
        prefixes = list(_stacks(self.reference))
        if len(prefixes) != 1:
            raise ValueError(f"{self.reference.path} has {len(prefixes)} stacks of layers; slices need one")
        return prefixes[0]

    def _in_layer(self, source: Input, prefix: str, i: int) -> list[str]:
        directory = self.sources[source.model]
        directory = directory if isinstance(directory, Directory) else self.reference
        start = f"{prefix}{_first(source) + i}."
        names = [n.removeprefix(start) for n in directory.entries if n.startswith(start)]
        if not names:
            raise ValueError(
                f"{source.model} has {_stacks(directory).get(prefix, 0)} layers; layer_range {source.layers} ends after"
            )
        return names

    def _count_layers(self, config: dict[str, Any]) -> None:
        total = sum(_length(s) for s in self.recipe.slices)
        for key in LAYER_COUNTS:
            if key in config:
                config[key] = total
        # Which layers look at a window: one entry for each.
        if isinstance(config.get("layer_types"), list):
            picked = []
            for part in self.recipe.slices:
                source = self.sources[part.inputs[0].model]
                types = source.config["layer_types"] if isinstance(source, Directory) else config["layer_types"]
                picked += types[_first(part.inputs[0]) : _first(part.inputs[0]) + _length(part)]
            config["layer_types"] = picked

    def _companions(self) -> Path:
        if self.recipe.tokenizer in (None, "base"):
            return self.reference.path
        source = self.sources.get(self.recipe.tokenizer or "")
        if source is None:
            raise ValueError(
                f"tokenizer_source {self.recipe.tokenizer!r} is none of the models of the recipe, nor base"
            )
        return source.path

    def _manifest(self) -> dict[str, Any]:
        return {
            "method": self.recipe.method,
            "rule": self.rules.method.rule if self.rules else PASSTHROUGH,
            "preset": self.rules.preset if self.rules else "mergekit",
            "seed": self.recipe.seed,
            "recipe": self.recipe.text,
            "inputs": {name: source.fingerprint() for name, source in self.sources.items()}
            | ({self.recipe.base: self.base.fingerprint()} if self.base and self.recipe.base else {})
            | {path: one.fingerprint() for path, one in self.statistics.items()},
            "notes": self.notes,
            "versions": manifests.versions(),
        }


_DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _never() -> np.ndarray:
    raise AssertionError("tensors of a merge are written, not fetched")


def _integers(dtype: str) -> bool:
    return dtype == "BOOL" or dtype[0] in "IU"


def _stacks(directory: Directory) -> dict[str, int]:
    """``{"model.layers.": 32}``: what stands before the number of a layer, and how many there are."""
    stacks: dict[str, int] = {}
    for name in directory.entries:
        match = _LAYER.match(name)
        if match:
            stacks[match[1] or ""] = max(stacks.get(match[1] or "", 0), int(match[2]) + 1)
    return stacks


def _position(name: str, stacks: Mapping[str, int]) -> tuple[int, int]:
    match = _LAYER.match(name)
    return (int(match[2]), stacks[match[1] or ""]) if match else (0, 0)


def _first(source: Input) -> int:
    return source.layers[0] if source.layers else 0


def _length(part: Slice) -> int:
    layers = part.inputs[0].layers
    assert layers is not None, "slices have layers"
    return layers[1] - layers[0]
