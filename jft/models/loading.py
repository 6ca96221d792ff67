"""`load`: a Hugging Face directory, hub id or GGUF file as a jft model and its (sharded) parameters."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from jft import tree
from jft.gguf import is_gguf
from jft.models.classifier import Classifier
from jft.models.core import Execution, Model
from jft.models.hf import config_schema, heads, reader, registry
from jft.models.hf.checkpoint import Checkpoint, LoadError, read_json
from jft.models.hf.mapping import Family
from jft.models.parameters import MODEL_TYPE

HUB_FILES = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"]
_log = logging.getLogger(__name__)


def load(
    source: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: Any = "float32",
    classes: int = 0,
    pool: str | None = None,
    rules: Any = None,
    revision: str | None = None,
    seed: int = 0,
) -> tuple[Model, dict]:
    """``(model, params)`` from ``config.json`` and safetensors, or a GGUF file, in ``dtype``, laid out over ``mesh``.

    source: a directory, a hub id (``org/name``, with the extra ``jft[hf]``; ``revision`` a branch, tag or commit), or a GGUF
    file of a decoder (extra ``jft[gguf]``), whose quantised weights become plain ones of their values.
    mesh: with it, each process reads only the bytes of its own shards, as :func:`jft.parallel.specs` (and ``rules``) lay
    them out; without, everything goes to the default device. dtype: of floating-point parameters and of the activations
    (``model.execution.dtype``); None keeps each parameter as stored. Values are rounded to nearest.
    classes: a :class:`Classifier` of that many classes with ``pool``; its head is read where the checkpoint has one of
    that shape, else drawn from ``seed`` (``model.drawn``), and then trains under every method that does not freeze it. 0: the
    backbone, or the classifier that :func:`jft.save` wrote.

    Host memory stays near what is kept there: one shard of one parameter beyond it. Nothing of the directory is run: weights
    are safetensors, never pickles, and ``auto_map`` is not read.

    Raises :class:`LoadError` (a ``ValueError``), naming the file or tensor: unknown architecture or feature; missing,
    unexpected, mis-shaped, quantised tensors; truncated or corrupt or missing files; pickles in place of safetensors.
    """
    family, description, checkpoint = _open(fetch(source, revision))
    config = _config(family, description, checkpoint, classes, pool)
    model = Model(config)
    shapes = tree.flatten(model.abstract())
    leaves = _bind(checkpoint, family, config, shapes)
    dtypes = _dtypes(checkpoint, leaves, dtype)
    abstract = tree.unflatten(
        {p: jax.ShapeDtypeStruct(s.shape, dtypes.get(p, dtypes["default"])) for p, s in shapes.items()}
    )
    layouts = _layouts(abstract, mesh, rules)
    flat = {}
    # Largest first: while a parameter is read its host copy exists too, and then the least of the others is in memory.
    for path in sorted(leaves, key=lambda p: -tree.size(shapes[p])):
        flat[path] = _put(checkpoint, leaves[path], dtypes[path], layouts.get(path))
    missing = [path for path in shapes if path not in flat]
    if missing:
        flat |= _draw(config, missing, abstract, layouts, seed)
    # A decoder's head without its bias, which starts at zero, is not a new one.
    drawn = tuple(missing) if "classifier/w" in missing else ()
    return Model(config, Execution(dtype=_activations(dtype, dtypes)), drawn), tree.like(abstract, flat)


def _open(where: Path) -> tuple[Family, dict[str, Any], Any]:
    """The family, ``config.json`` and tensors of a directory, or of a GGUF file."""
    if is_gguf(where):
        from jft.models.hf.gguf import open_gguf  # knows of decoders, which other models need not import

        return open_gguf(where)
    description = describe(where)
    if description.get("model_type") == MODEL_TYPE:
        raise LoadError(
            f"{where} holds parameters of a model of another library: jft.models.load_params({str(where)!r}, like=params) "
            "reads them, for the module that they are of"
        )
    return registry.family_of(description, where / "config.json"), description, Checkpoint(where)


def fetch(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The directory or GGUF file of a checkpoint: ``source``, or the hub repository of that id, downloaded into its cache."""
    directory = Path(source).expanduser()
    if directory.is_dir() or is_gguf(directory):
        return directory
    name = os.fspath(source)
    parts = name.split("/")
    # What is plainly a path must not be looked up on the hub.
    if directory.exists() or len(parts) > 2 or not all(parts) or name.startswith((".", "~", "/")):
        raise LoadError(f"{name!r} is neither a directory, a GGUF file nor a hub id (org/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise LoadError(f"{name!r} is no directory here; to fetch it from the hub, pip install 'jft[hf]'") from None
    try:
        # Files of the root only: repositories keep other formats (onnx, original) in folders.
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's errors share no base class: HTTP, connection, offline, cache, validation
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise LoadError(
            f"{name!r} is no directory here, and could not be fetched from the hub{at}: {reason}"
        ) from error


def describe(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint; ``LoadError`` where there is none, or its weights are quantised."""
    file = directory / "config.json"
    if not file.is_file():
        raise LoadError(f"{directory} has no config.json; it is not a Hugging Face checkpoint")
    description = read_json(file)
    config_schema.check_kinds(description, file)
    if (quantised := description.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LoadError(f"{file}: the weights are quantised ({method}); load the checkpoint they were made from")
    return description


def backbone(family: Family, description: dict, checkpoint: Checkpoint) -> Any:
    """The jft config that a checked ``config.json`` (:func:`describe`) and the names of its tensors make."""
    where = checkpoint.description
    config_schema.check_sizes(description, checkpoint.entries, where)
    try:
        config = family.from_hf(description)
        return config if family.refine is None else family.refine(config, frozenset(checkpoint.entries))
    except KeyError as error:
        raise LoadError(f"{where} lacks {error.args[0]!r}") from error
    except ValueError as error:
        raise LoadError(f"{where}: {error}") from error


def _config(family: Family, description: dict, checkpoint: Checkpoint, classes: int, pool: str | None) -> Any:
    config = backbone(family, description, checkpoint)
    head_config = description.get(heads.KEY)
    if classes < 0:
        raise LoadError(f"classes is a number of classes, or 0 for none, not {classes}")
    if classes or head_config:
        config = _without_output_head(family, config, checkpoint)
    # The head that jft.save wrote, unless the caller wants another.
    if head_config and classes in (0, head_config["classes"]) and pool in (None, "auto", head_config["pool"]):
        return Classifier(config, head_config["classes"], head_config["pool"], head_config["dense"])
    if classes:
        return Classifier(config, classes, pool or "auto")
    if pool:
        raise LoadError(f"pool {pool!r} belongs to a classifier; give classes as well")
    return config


def _without_output_head(family: Family, config: Any, checkpoint: Checkpoint) -> Any:
    """A decoder saved as a classifier has no output head; tied, it wants none, and a classifier never asks for it."""
    # ``tied`` is how a decoder config says that it has no ``head/w``.
    if getattr(config, "tied", True):
        return config
    source = family.table(config)["head/w"]
    has_head = any(name in checkpoint for name in (source.name, *source.aliases))
    return config if has_head else dataclasses.replace(config, tied=True)


def _bind(checkpoint: Checkpoint, family: Family, config: Any, shapes: dict[str, Any]) -> dict[str, reader.Leaf]:
    """Every leaf bound to its tensors, all checked before any is read; the head only where the checkpoint has it."""
    backbone = getattr(config, "backbone", config)
    backbone_paths = [path for path in shapes if not heads.is_head(path)]
    table = family.table(backbone)
    if set(table) != set(backbone_paths):
        unmatched = min(set(table) ^ set(backbone_paths))
        raise ValueError(f"the table of {config.family!r} and its parameters differ in {unmatched!r}: a defect of jft")
    leaves = {path: reader.bind(checkpoint, path, table[path], tuple(shapes[path].shape)) for path in backbone_paths}
    # A head of the checkpoint that this model does not have is dropped on purpose: it is another task's.
    head_patterns = [r"(classifier|score|pre_classifier)\..*"]
    if isinstance(config, Classifier):
        leaves |= _bind_head(checkpoint, family, config, shapes)
    tensor_names = [name for leaf in leaves.values() for name in leaf.names.values()]
    reader.refuse_unexpected(checkpoint, tensor_names, [*family.ignored, *head_patterns])
    return leaves


def _bind_head(checkpoint: Checkpoint, family: Family, config: Any, shapes: dict[str, Any]) -> dict[str, reader.Leaf]:
    """The head's leaves, or nothing (a fresh head) where the checkpoint lacks one or has one of other classes."""
    paths = [path for path in shapes if heads.is_head(path)]
    leaves = {}
    for path, source in heads.table(family, config, paths).items():
        name = next((n for n in (source.name, *source.aliases) if n in checkpoint), None)
        if name is None and path == "classifier/b":
            continue  # decoders' heads have no bias
        if name is None or checkpoint.entries[name].shape != tuple(source.shape):
            _log.info("%s has no head for %d classes; drawing one", checkpoint.directory, config.classes)
            return {}
        leaves[path] = reader.bind(checkpoint, path, source, tuple(shapes[path].shape))
    return leaves


def _dtypes(checkpoint: Checkpoint, leaves: dict[str, reader.Leaf], dtype: Any) -> dict[str, np.dtype]:
    """The dtype of every leaf, and under ``default`` that of leaves which are not read."""
    if dtype is None:
        stored = {path: reader.stored_dtype(checkpoint, leaf) for path, leaf in leaves.items()}
        return {**stored, "default": np.dtype(jnp.result_type(*set(stored.values())))}
    try:
        target_dtype = jnp.dtype(dtype)
    except TypeError:
        raise LoadError(f"dtype {dtype!r} is unknown; choose float32, bfloat16 or float16") from None
    if not jnp.issubdtype(target_dtype, jnp.floating):
        raise LoadError(f"dtype {dtype!r} is not a floating-point type; parameters are float32, bfloat16 or float16")
    return {**dict.fromkeys(leaves, target_dtype), "default": target_dtype}


def _activations(dtype: Any, dtypes: dict[str, np.dtype]) -> np.dtype:
    return dtypes["default"] if dtype is None else jnp.dtype(dtype)


def _layouts(abstract: dict, mesh: Mesh | None, rules: Any) -> dict[str, Sharding]:
    if mesh is None:
        if rules:
            raise LoadError("sharding rules were given without a mesh; give mesh as well")
        return {}
    from jft.parallel import shardings

    return tree.flatten(shardings(abstract, mesh, rules))


def _put(checkpoint: Checkpoint, leaf: reader.Leaf, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """The leaf on its devices, shard by shard.

    Not ``jax.make_array_from_callback``: that holds all shards of the leaf on the host at once, and reads one for each
    of its replicas.
    """
    if sharding is None:
        host = reader.read(checkpoint, leaf, (slice(None),) * len(leaf.shape), dtype)
        return jax.block_until_ready(jax.device_put(host))  # else the host copies of several leaves pile up
    # One read serves all replicas of a shard.
    replicas: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
        replicas.setdefault(key, []).append(device)
    shards = []
    for key, devices in replicas.items():
        host = reader.read(checkpoint, leaf, tuple(slice(*bounds) for bounds in key), dtype)
        # Waiting keeps one host copy at a time.
        shards += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _draw(config: Any, paths: list[str], abstract: dict, layouts: dict[str, Sharding], seed: int) -> dict[str, Any]:
    """The parameters at ``paths`` as ``config.init`` draws them; the others are never computed. A lone bias is zero."""
    shapes = tree.flatten(abstract)

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        params = tree.flatten(config.init(key, jnp.float32))
        return {path: params[path].astype(shapes[path].dtype) for path in paths}

    shardings = {path: layouts[path] for path in paths} if layouts else None
    # Under jit the leaves that are not returned are dead code, and the others are made in their shards.
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))
