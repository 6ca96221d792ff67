"""Parameters of models of other libraries in files: safetensors by path, for whoever has the module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import tree
from jft.models.hf import writer
from jft.models.hf.checkpoint import NAMES, Checkpoint, LoadError
from jft.tree import host

MODEL_TYPE = "jft_parameters"
"""In ``config.json``: there is no architecture that jft knows."""


def save_params(
    params: Any, directory: str | os.PathLike, dtype: Any = None, shard_bytes: float = 5e9, overwrite: bool = False
) -> Path:
    """Write every array of ``params`` by its path to safetensors in ``directory``, whole or not at all; see ``jft.save``."""
    target = Path(directory).expanduser()
    writer.check_target(target, overwrite)
    tensors = [_tensor(path, x, dtype) for path, x in tree.flatten(params).items()]
    if jax.process_index() == 0:
        with writer.whole_directory(target) as partial:
            writer.write_weights(partial, tensors, shard_bytes)
            writer.write_json(partial / "config.json", {"model_type": MODEL_TYPE})
    else:
        writer.write_weights(None, tensors, shard_bytes)
    return target


def _tensor(path: str, x: Any, dtype: Any) -> writer.Tensor:
    floating = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    kind = np.dtype(jax.numpy.dtype(dtype) if dtype is not None and floating else x.dtype)
    if kind not in NAMES:
        raise ValueError(f"{path!r} has dtype {kind.name}, which safetensors does not have; give dtype='float32'")
    return writer.Tensor(path, tuple(x.shape), kind, lambda: host(x).astype(kind))


def load_params(directory: str | os.PathLike, like: Any) -> Any:
    """The parameters that ``jft.save`` wrote for a model of another library.

    like: arrays or shapes, whose containers, dtypes and shardings the result has. Raises :class:`LoadError` naming the path
    where the two do not match.
    """
    where, flat = Path(directory).expanduser(), tree.flatten(like)
    checkpoint = Checkpoint(where)
    for what, paths in (
        ("lacks", flat.keys() - checkpoint.entries.keys()),
        ("holds", checkpoint.entries.keys() - flat.keys()),
    ):
        if paths:
            raise LoadError(
                f"{where} {what} {min(paths)!r}, unlike the parameters given as like=: it is another model's"
            )
    for path, x in flat.items():
        if checkpoint.entries[path].shape != tuple(x.shape):
            raise LoadError(f"{where}: {path!r} has shape {checkpoint.entries[path].shape}, not {tuple(x.shape)}")
    # A copy: the file may be replaced while its arrays are in use.
    read = {path: np.array(checkpoint.tensor(path), x.dtype) for path, x in flat.items()}
    return tree.like(like, {p: jax.device_put(x, getattr(flat[p], "sharding", None)) for p, x in read.items()})
