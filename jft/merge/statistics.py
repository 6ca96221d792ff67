"""Statistics of data that merging reads (Fisher information, Gram matrices), in files, by the paths of the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jft import safetensors_files, strict_json, tree

FORMAT, VERSION = "jft.statistics", 1


def save_statistics(statistics: Mapping[str, Any], path: str | os.PathLike, *, data: str) -> None:
    """Write the statistics of one model, ``{path: array}`` or ``{path: {name: array}}``, to one safetensors file.

    What :func:`jft.tangent.fisher_diagonal` and :func:`jft.select.grams.grams` give. data: a name for what they were measured
    on; the file has it. Raises ``ValueError`` for no statistics, and for one that is not finite.
    """
    tensors = {}
    for weight, value in statistics.items():
        for name, x in (value if isinstance(value, Mapping) else {"": value}).items():
            array = tree.host(x)
            if not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(f"the statistics of {weight!r} are not finite; look at the data and the model")
            tensors[f"{weight}|{name}"] = array
    if not tensors:
        raise ValueError("there are no statistics to save")
    if jax.process_index() == 0:
        header = {"format": FORMAT, "version": VERSION, "data": data}
        safetensors_files.save(tensors, path, {"jft": json.dumps(header)})


def load_statistics(path: str | os.PathLike) -> dict[str, Any]:
    """What :func:`save_statistics` wrote, NumPy arrays over the mapped file; ``ValueError`` for another file."""
    tensors = _opened(path)
    out: dict[str, Any] = {}
    for key in tensors:
        weight, _, name = key.rpartition("|")
        if name:
            out.setdefault(weight, {})[name] = tensors.array(key)
        else:
            out[weight] = tensors.array(key)
    return out


def _opened(path: str | os.PathLike) -> safetensors_files.Tensors:
    tensors = safetensors_files.Tensors(path)
    header = strict_json.loads(tensors.metadata.get("jft", "{}"), path)
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(f"{path} holds no statistics of version {VERSION}; jft.merge.save_statistics writes them")
    strict_json.need(header, {"data": strict_json.TEXT}, path)
    return tensors
