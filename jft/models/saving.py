"""`save`: a model as a directory that transformers loads, with equal outputs."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.gguf import is_gguf
from jft.models.classifier import Classifier
from jft.models.core import Model, is_jft_model, model_of
from jft.models.hf import heads, reader, registry, writer
from jft.models.hf.checkpoint import NAMES, read_json
from jft.models.hf.config_schema import check_kinds
from jft.models.hf.mapping import Family, Source
from jft.models.loading import fetch
from jft.models.parameters import save_params
from jft.tree import host

KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "id2label",
    "label2id",
)
"""Entries of ``config.json`` that say nothing about parameters and that generation and labels need."""

_log = logging.getLogger(__name__)

Part = tuple[str, Source, tuple[int, ...]]


def save(
    model: Any,
    params: Any,
    directory: str | os.PathLike,
    like: str | os.PathLike | None = None,
    dtype: Any = None,
    shard_bytes: float = 5e9,
    overwrite: bool = False,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write ``config.json`` and safetensors to ``directory``, whole or not at all; returns it.

    params: plain arrays, sharded or not; ``jft.load(directory, dtype=None)`` gives them back bit for bit. dtype: casts
    floating-point parameters (None: as they are). like: a checkpoint (directory, hub id, GGUF file) whose tokenizer and ids
    come along. labels: names of a classifier's classes (``id2label``); default those of ``like``. shard_bytes: a larger
    model is cut into files of at most this size, with an index. overwrite: replace the checkpoint that stands there, once
    the new one is written. The host holds one tensor at a time. In a multi-host run every process calls this; process 0
    writes, so ``directory`` must be its own or shared.

    Of a model of another library (:mod:`jft.models.adapters`, any function) the arrays are written by their paths, for
    :func:`jft.models.load_params`.

    Raises ``ValueError`` for structured weights (merge them first), parameters that are not the model's, a dtype that
    safetensors does not have, an occupied directory, labels that are not as many as the classes.
    """
    if not is_jft_model(model := model_of(model)):
        if labels is not None:
            raise ValueError("labels are for jft's own classifiers; another library's model keeps its own")
        return save_params(params, directory, dtype, shard_bytes, overwrite)
    classes = getattr(model.config, "classes", 0)
    if labels is not None and len(labels) != classes:
        raise ValueError(f"{len(labels)} labels are given, and the model has {classes} classes; give one name for each")
    target = Path(directory).expanduser()
    writer.check_target(target, overwrite)
    _barrier("jft.save: begin")  # no process may look at the target after process 0 has made it
    family = registry.family_named(model.config.family)
    flat = _plain_arrays(model, params)
    origin = fetch(like) if like is not None else None
    tensors = _tensors(_table(family, model.config, flat), flat, dtype)
    description = _describe(family, model.config, tensors, origin)
    if labels is not None:
        description["id2label"] = {str(i): str(name) for i, name in enumerate(labels)}
        description["label2id"] = {str(name): i for i, name in enumerate(labels)}
    if jax.process_index() == 0:
        with writer.whole_directory(target) as partial:
            writer.write_weights(partial, tensors, shard_bytes)
            writer.write_json(partial / "config.json", description)
            if origin is not None:
                _copy_companions(origin, partial)
    else:
        writer.write_weights(None, tensors, shard_bytes)
    _barrier("jft.save: end")
    return target


def _copy_companions(origin: Path, directory: Path) -> None:
    """The tokenizer files of a checkpoint; those of a GGUF file are written from what it holds."""
    if is_gguf(origin):
        from jft.gguf import read, tokenizer

        file = read(origin)
        tokenizer.core(file).save(str(directory / "tokenizer.json"))
        writer.write_json(directory / "tokenizer_config.json", tokenizer.config(file))
        return
    writer.copy_companions(origin, directory)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _plain_arrays(model: Model, params: Any) -> dict[str, Any]:
    """``{path: array}``: plain arrays at exactly the model's paths, of its shapes."""
    # Structured weights are pytrees too: their own leaves would pass for parameters.
    flat = tree.flatten(params, is_leaf=lambda x: not isinstance(x, Mapping))
    for path, leaf in flat.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(
                f"{path!r} is a {type(leaf).__name__}, not an array: a weight in the form in which it trains. Save the merged "
                "parameters: run.params after jft.finetune, or plan.merged(kept, trained)"
            )
    shapes = tree.flatten(model.abstract())
    for what, paths in (("lack", shapes.keys() - flat.keys()), ("hold the unknown", flat.keys() - shapes.keys())):
        if paths:
            raise ValueError(f"params {what} {min(paths)!r}; they are not those of this {model.config.family!r} model")
    for path, leaf in flat.items():
        if tuple(leaf.shape) != tuple(shapes[path].shape):
            raise ValueError(f"{path!r} has shape {tuple(leaf.shape)}, the model wants {tuple(shapes[path].shape)}")
    return flat


def _table(family: Family, config: Any, flat: dict[str, Any]) -> dict[str, Source]:
    if not isinstance(config, Classifier):
        return family.table(config)
    head = heads.table(family, config, [path for path in flat if heads.is_head(path)])
    bias = head["classifier/b"].name
    if bias == "score.bias":  # the heads that transformers puts on decoders have none; load draws it as zeros
        if not np.any(_host(flat["classifier/b"], ())):
            del head["classifier/b"]
        else:
            _log.warning("%r is saved, but transformers' class has no such bias and will leave it out", bias)
    return family.table(config.backbone) | head


def _tensors(table: dict[str, Source], flat: dict[str, Any], dtype: Any) -> list[writer.Tensor]:
    """Every tensor of the checkpoint, with the leaves it is put together from, in the order of the table."""
    parts: dict[str, list[Part]] = defaultdict(list)
    for path, source in table.items():
        for position in reader.stack_indices(source, flat[path].shape):
            parts[reader.tensor_name(source.name, position)].append((path, source, position))
    return [_tensor(name, leaves, flat, dtype) for name, leaves in parts.items()]


def _tensor(name: str, parts: list[Part], flat: dict[str, Any], dtype: Any) -> writer.Tensor:
    dtypes = {np.dtype(flat[path].dtype) for path, _, _ in parts}
    target_dtype = np.dtype(jnp.result_type(*dtypes) if dtype is None else jnp.dtype(dtype))
    if target_dtype not in NAMES:
        raise ValueError(
            f"{name!r} would have dtype {target_dtype.name}, which safetensors does not have; give dtype='float32'"
        )
    shape = tuple(parts[0][1].shape)

    def fetch() -> np.ndarray:
        if len(parts) == 1 and parts[0][1].out is None:
            tensor = _whole(parts[0][1], shape, _host(flat[parts[0][0]], parts[0][2]))
            if tensor is not None:
                return tensor.astype(target_dtype, copy=False)
        out = np.zeros(shape, target_dtype)
        for path, source, position in parts:
            view = source.view(out)
            view[...] = _host(flat[path], position).reshape(view.shape)
        return out

    return writer.Tensor(name, shape, target_dtype, fetch)


def _whole(source: Source, shape: tuple[int, ...], value: np.ndarray) -> np.ndarray | None:
    """The tensor as a view of its only leaf, for the two commonest views; None for others."""
    # The strides of an array that nobody fills tell what the view does.
    view = source.view(np.empty(shape, np.bool_))
    if view.shape == shape and view.flags.c_contiguous:
        return value
    return value.T if view.ndim == 2 and view.T.shape == shape and view.T.flags.c_contiguous else None


def _host(leaf: Any, position: tuple[int, ...]) -> np.ndarray:
    """One layer (and expert) of a leaf on this host; cut on the device, so that no more is gathered."""
    if isinstance(leaf, np.ndarray):
        return leaf[position]
    for number in position:
        leaf = jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
    if not position:
        # numpy's copy is cached in the array it was made from: in this one, which is gone at once, not the caller's.
        shards = [shard.data for shard in leaf.addressable_shards]
        leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    return host(leaf)


def _describe(family: Family, config: Any, tensors: list[writer.Tensor], origin: Path | None) -> dict[str, Any]:
    """``config.json``: the family's, what ``like`` adds, the dtype most bytes have, and the head."""
    backbone = getattr(config, "backbone", config)
    description = family.to_hf(backbone)
    if origin is not None and (origin / "config.json").is_file():
        known = read_json(origin / "config.json")
        check_kinds(known, origin / "config.json")
        description |= {key: known[key] for key in KEPT if known.get(key) is not None}
    largest: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        largest[tensor.dtype.name] += tensor.nbytes
    description["dtype"] = max(largest, key=largest.__getitem__)
    if isinstance(config, Classifier):
        description |= _describe_head(family, config, description)
    return description


def _describe_head(family: Family, config: Classifier, description: dict[str, Any]) -> dict[str, Any]:
    head: dict[str, Any] = {heads.KEY: {"classes": config.classes, "pool": config.pool, "dense": config.dense}}
    # transformers takes the number of classes from the labels.
    if len(description.get("id2label") or ()) != config.classes:
        head["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.classes)}
        head["label2id"] = {f"LABEL_{i}": i for i in range(config.classes)}
    architecture = heads.architecture(family, config)
    if architecture is not None:
        head["architectures"] = [architecture]
    return head
