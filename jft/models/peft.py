"""LoRA adapters in the directories that peft reads and writes, as task vectors of low rank."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import safetensors_files, tree
from jft.delta import LowRank, TaskVector
from jft.delta import manifest as manifests
from jft.delta.singular import factors
from jft.models.core import Model
from jft.models.hf import adapter_config, reader, registry, writer
from jft.models.hf.checkpoint import LoadError
from jft.models.hf.mapping import Source
from jft.tree import host

CONFIG, WEIGHTS = adapter_config.FILE, "adapter_model.safetensors"
PREFIX = "base_model.model."
# These change the base when they start, so that their factors alone are not the change.
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one matrix of a leaf lies in the weight of a torch module: the module, and the inputs and outputs it has there."""

    modules: tuple[str, ...]  # its names, that which is written first
    inputs: np.ndarray
    outputs: np.ndarray
    total: tuple[int, int]  # inputs and outputs of the module
    linear: bool  # a Linear, [out, in]; else a Conv1D, [in, out]


def save_adapter(model: Model, tau: TaskVector, directory: str | os.PathLike, base: str | None = None) -> Path:
    """Write ``tau`` as a LoRA adapter that ``peft.PeftModel.from_pretrained`` loads, whole or not at all.

    Every delta must be of low rank (:class:`jft.delta.LowRank`, or a sum of such): the factors are written as they are, and
    ``lora_alpha = r``, so that the change is exactly theirs. Dense deltas get factors by ``jft.merge.compress(tau,
    "low_rank", rank=...)``. Where several leaves are parts of one torch module (q, k, v of GPT-2), their factors are put side
    by side. base: name of the base model, for whoever loads the adapter. Returns the directory.

    Raises ``ValueError`` naming a path that an adapter cannot hold: norms and biases, embeddings, experts
    (``tau.exclude(pattern)`` leaves them out), and for an occupied directory.
    """
    target = Path(directory).expanduser()
    writer.check_target(target, overwrite=False)
    table = _table(model)
    parts: dict[str, list[tuple[_Place, np.ndarray, np.ndarray]]] = collections.defaultdict(list)
    templates: dict[str, str] = {}
    for path, delta in tau.items():
        if path not in table:
            raise ValueError(f"{path!r} is no parameter of this {model.config.family!r} model")
        low = factors(delta)
        if low is None:
            raise ValueError(
                f"the delta of {path!r} is {delta.kind}, and an adapter holds factors: jft.merge.compress(tau, 'low_rank', "
                "rank=...) makes them of matrices, tau.select or tau.exclude leaves other paths out"
            )
        for position, place in _places(path, table[path], delta.shape):
            parts[place.modules[0]].append((place, host(low.a[position]), host(low.b[position])))
            templates[place.modules[0]] = table[path].name
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    linear = True
    for module, pieces in parts.items():
        a, b = _joined(pieces)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        ranks[module] = len(a)
        linear = linear and pieces[0][0].linear
    config = _config(ranks, templates) | {"base_model_name_or_path": base, "fan_in_fan_out": not linear}
    if jax.process_index() == 0:
        with writer.whole_directory(target) as partial:
            safetensors_files.save(tensors, partial / WEIGHTS, {"format": "pt"})
            writer.write_json(partial / CONFIG, config)
    return target


def load_adapter(model: Model, directory: str | os.PathLike, base: Any = None) -> TaskVector:
    """The task vector of a LoRA adapter of peft: :class:`jft.delta.LowRank` deltas, layers stacked, the scale in ``b``.

    Layers that the adapter leaves out have zero factors, and of different ranks the largest counts. base: the parameters that
    the adapter is for, which the manifest then describes. Raises :class:`LoadError` for another kind of adapter, tensors
    that are no factors of this model's matrices (embeddings, biases, DoRA's magnitudes, whole modules), and for those that
    changed the base when they started (PiSSA, OLoRA, CorDA, LoftQ): the factors are then not the whole change.
    """
    folder = Path(directory).expanduser()
    config = adapter_config.read(folder)
    start = str(config.get("init_lora_weights"))
    if config.get("peft_type") != "LORA" or start.startswith(_CHANGING_STARTS):
        kind = start if config.get("peft_type") == "LORA" else config.get("peft_type")
        raise LoadError(
            f"{folder / CONFIG}: an adapter of kind {kind!r}; LoRA that leaves the base as it is can be read"
        )
    if not (folder / WEIGHTS).is_file():
        raise LoadError(f"{folder} has no {WEIGHTS}; save the adapter with safe_serialization=True")
    tensors = safetensors_files.load(folder / WEIGHTS, LoadError)
    shapes = tree.flatten(model.abstract())
    stabilised = bool(config.get("use_rslora"))
    deltas: dict[str, LowRank] = {}
    known: set[str] = set()
    for path, source in _table(model).items():
        try:
            places = list(_places(path, source, shapes[path].shape))
        except ValueError:
            continue  # no matrix that an adapter could change
        pairs = {}
        for position, place in places:
            module = next((m for m in place.modules if f"{PREFIX}{m}.lora_A.weight" in tensors), None)
            if module is not None:
                first, second = (f"{PREFIX}{module}.lora_{factor}.weight" for factor in "AB")
                known |= {first, second}
                alpha = _alpha(config, module)
                pairs[position] = _pair(place, tensors[first], tensors.get(second), alpha, stabilised)
        if pairs:
            deltas[path] = _stacked(pairs, shapes[path].shape)
    # Beside the factors of an output head peft may write the base's weight, which has not changed.
    unknown = [name for name in tensors if name not in known and not name.endswith(".base_layer.weight")]
    if unknown:
        raise LoadError(
            f"{folder / WEIGHTS}: {unknown[0]!r} is no factor of a matrix of this {model.config.family!r} model"
        )
    note = {"adapter": os.fspath(directory), "adapter_config": config}
    return TaskVector(deltas, manifests.describe(base, operation="adapter", **note))


def _table(model: Model) -> Mapping[str, Source]:
    config: Any = model.config
    return registry.family_named(config.family).table(getattr(config, "backbone", config))


def _places(path: str, source: Source, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], _Place]]:
    """``(position, place)`` of every matrix of a leaf. Raises ``ValueError`` where a LoRA of peft has no such place."""
    refusal = f"{path!r} is no matrix of a module that peft adapts one by one; tau.exclude leaves it out"
    if (
        len(source.shape) != 2
        or source.out is not None
        or "{expert}" in source.name
        or not source.name.endswith(".weight")
    ):
        raise ValueError(refusal)
    # Arrays that hold the index along one axis of the tensor (and no memory) show what the view selects of it.
    first = np.broadcast_to(np.arange(source.shape[0])[:, None], source.shape)
    second = np.broadcast_to(np.arange(source.shape[1]), source.shape)
    rows, columns = source.view(first), source.view(second)
    if rows.ndim != 2:
        raise ValueError(refusal)
    # The leaf is [in, out], and so is the tensor of a Conv1D: their inputs run along the same axis.
    linear = rows[0, 0] == rows[-1, 0]
    outputs, inputs = (rows[0], columns[:, 0]) if linear else (columns[0], rows[:, 0])
    # A table that is looked up lies as a Conv1D does, but outside the layers.
    if not linear and tree.stack_of(path) is None:
        raise ValueError(refusal)
    total = (source.shape[1], source.shape[0]) if linear else (source.shape[0], source.shape[1])
    for position in reader.stack_indices(source, shape):
        names = (reader.tensor_name(name, position) for name in (source.name, *source.aliases))
        modules = tuple(name.removesuffix(".weight") for name in names)
        yield position, _Place(modules, inputs, outputs, total, linear)


def _joined(pieces: list[tuple[_Place, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """``lora_A [r, in]`` and ``lora_B [out, r]`` of a module from the factors of its parts, side by side."""
    rank = sum(a.shape[1] for _, a, _ in pieces)
    inputs, outputs = pieces[0][0].total
    dtype = np.result_type(*(x.dtype for _, a, b in pieces for x in (a, b)))
    lora_a, lora_b, start = np.zeros((rank, inputs), dtype), np.zeros((outputs, rank), dtype), 0
    for place, a, b in pieces:
        stop = start + a.shape[1]
        lora_a[start:stop, place.inputs] = a.T
        lora_b[place.outputs, start:stop] = b.T
        start = stop
    return lora_a, lora_b


def _config(ranks: Mapping[str, int], templates: Mapping[str, str]) -> dict[str, Any]:
    """``adapter_config.json`` without what names the base: the commonest rank, and the others by patterns of names."""
    common = collections.Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {
        re.escape(templates[module].removesuffix(".weight")).replace(r"\{layer\}", r"\d+"): rank
        for module, rank in ranks.items()
        if rank != common
    }
    return {
        "peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none", "lora_dropout": 0.0,
        "r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
        "target_modules": list(ranks), "use_rslora": False, "use_dora": False, "modules_to_save": None,
    }  # fmt: skip


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """The ``lora_alpha`` of a module, as peft finds it."""
    return adapter_config.value_of(config.get("alpha_pattern"), module, config["lora_alpha"])


def _pair(
    place: _Place, a: np.ndarray, b: np.ndarray | None, alpha: float, stabilised: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The factors ``[I, r]`` and ``[r, O]`` of a part of a module; ``alpha / r``, or ``alpha / sqrt(r)``, is in the second."""
    if b is None or (a.shape[1], b.shape[0]) != place.total:
        raise LoadError(
            f"the factors of {place.modules[0]!r} are {a.shape} and {None if b is None else b.shape}, its weight has "
            f"{place.total[0]} inputs and {place.total[1]} outputs; the adapter is for another model"
        )
    scale = alpha / (math.sqrt(len(a)) if stabilised else len(a))
    # In float32, or a scale that is no power of two would round bfloat16 anew.
    scaled = b if scale == 1 else b.astype(np.promote_types(b.dtype, np.float32)) * np.float32(scale)
    return a[:, place.inputs].T, scaled[place.outputs].T


def _stacked(pairs: Mapping[tuple[int, ...], tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]) -> LowRank:
    """The factors of a leaf, zero where a layer has none and past the rank of its own."""
    *lead, inputs, outputs = shape
    rank = max(a.shape[1] for a, _ in pairs.values())
    dtype = np.result_type(*(x.dtype for pair in pairs.values() for x in pair))
    a, b = np.zeros((*lead, inputs, rank), dtype), np.zeros((*lead, rank, outputs), dtype)
    for position, (left, right) in pairs.items():
        a[position][:, : left.shape[1]] = left  # views: a position names whole matrices
        b[position][: right.shape[0]] = right
    return LowRank(jnp.asarray(a), jnp.asarray(b))
