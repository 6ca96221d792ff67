"""The file format of task vectors: one safetensors file.

Tensors: every array of the delta of a path, named ``PATH|FIELD`` (``layers/attn/q/w|a``); the parts of a sum are
``PATH|0.FIELD``, ``PATH|1.FIELD``. A path that changes nothing has none. The safetensors metadata has one key, ``jft``,
holding JSON:

    {"format": "jft.task_vector", "version": 1,
     "manifest": {...},                                       see jft.delta.manifest
     "deltas": {PATH: {"kind": "rows", "shape": [50257, 768], "static": {...}}}}

``kind`` names the encoding, ``static`` its constants (:meth:`jft.delta.Encoding.pack`), ``shape`` is that of the weight.
Values are stored as they are typed (float32 from arithmetic), or in the dtype asked for; indices as int32, those of single
entries compressed (:mod:`jft.delta.elias_fano`), masks and signs as bits, quantized values in as many bits as they have. A
reader refuses a version newer than its own; within a version, keys may be added and unknown ones are ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jft import files
from jft.delta.encoding import Encoding
from jft.delta.manifest import Manifest
from jft.delta.registry import kinds
from jft.tree import host

FORMAT = "jft.task_vector"
VERSION = 1
# Paths are full of '/' and '.', and parts of sums use '.' in their fields.
FIELD = "|"


class FileError(ValueError):
    """A file that is no task vector, is damaged, or needs a newer jft."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file says of one path without reading its values."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself without reading any values."""

    manifest: Manifest
    entries: dict[str, Entry]


def save(deltas: Mapping[str, Encoding], manifest: Manifest, path: str | os.PathLike, dtype: Any = None) -> None:
    """Write ``{path: delta}`` and a manifest to ``path``, by way of a temporary file: it is never half a file.

    dtype: store floating-point values in this dtype ("bfloat16" halves the file; the norm changes by about 2**-9). None:
    as they are. Arrays spread over several processes are gathered, and process 0 writes; all must call.
    Raises ``ValueError`` for a path that holds ``|``.
    """
    for name in deltas:
        if FIELD in name:
            raise ValueError(f"path {name!r} cannot be written: {FIELD!r} separates path and field in the file")
    # By all processes, also those that do not write: `host` is a collective operation.
    tensors: dict[str, np.ndarray] = {}
    entries = {}
    for name, delta in deltas.items():
        arrays, static = (delta if dtype is None else delta.astype(dtype)).pack()
        tensors |= {f"{name}{FIELD}{field}": host(array) for field, array in arrays.items()}
        entries[name] = {"kind": delta.kind, "shape": list(delta.shape), "static": static}
    header = {"format": FORMAT, "version": VERSION, "manifest": manifest, "deltas": entries}
    if jax.process_index() == 0:
        _write(Path(path), tensors, {"jft": json.dumps(header)})


def read(path: str | os.PathLike, paths: Iterable[str] | None = None) -> tuple[dict[str, Encoding], Manifest]:
    """``(deltas, manifest)`` of a task vector; with ``paths``, only those deltas.

    Raises :class:`FileError` naming what is wrong with the file.
    """
    with _open(path) as (handle, header):
        names = header["deltas"] if paths is None else list(paths)
        # The caller's mistake, not the file's: no FileError.
        missing = [name for name in names if name not in header["deltas"]]
        if missing:
            raise ValueError(f"{path} has no delta for {missing[0]!r}; it has: {', '.join(header['deltas'])}")
        fields = _fields(handle.keys())
        deltas = {name: _delta(path, handle, name, header["deltas"][name], fields) for name in names}
    return deltas, header["manifest"]


def inspect(path: str | os.PathLike) -> Header:
    """The manifest, and encoding, shape, dtype and bytes of every delta, reading no values."""
    with _open(path) as (handle, header):
        fields = _fields(handle.keys())
        entries = {}
        for name, entry in header["deltas"].items():
            slices = [handle.get_slice(f"{name}{FIELD}{field}") for field in fields.get(name, ())]
            # A scalar, such as the scale of a mask, does not tell the dtype of the values.
            types = [s.get_dtype() for s in slices if s.get_shape()] or [s.get_dtype() for s in slices]
            entries[name] = Entry(
                kind=entry["kind"],
                shape=tuple(entry["shape"]),
                # Floats are F32, BF16, F8_E4M3 and so on: the values, where there are indices as well.
                dtype=next((t for t in types if "F" in t), types[0] if types else "-"),
                nbytes=sum(_slice_bytes(s) for s in slices),
            )
    return Header(header["manifest"], entries)


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its checked header."""
    # Before it is opened, since a missing file would be called damaged below.
    if not os.path.isfile(path):
        raise FileError(f"{os.fspath(path)}: no such file")
    try:
        # JAX's arrays, because NumPy has no bfloat16 of its own.
        handle = safetensors.safe_open(path, framework="flax")
    except (safetensors.SafetensorError, OSError) as error:
        raise FileError(f"{os.fspath(path)} is truncated, damaged or no safetensors file: {error}") from None
    with handle:
        yield handle, _header(path, handle.metadata() or {})


def _header(path: str | os.PathLike, metadata: dict[str, str]) -> dict[str, Any]:
    name = os.fspath(path)
    if "jft" not in metadata:
        raise FileError(f"{name} is a safetensors file, but no task vector; jft.load reads model checkpoints")
    try:
        header = json.loads(metadata["jft"])
    except json.JSONDecodeError as error:
        raise FileError(f"{name} has a damaged header: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise FileError(f"{name} is no task vector")
    # Older versions are read for good.
    if not isinstance(header.get("version"), int) or header["version"] > VERSION:
        raise FileError(f"{name} has format version {header.get('version')}, this jft reads {VERSION}; upgrade jft")
    if not isinstance(header.get("manifest"), dict) or not isinstance(header.get("deltas"), dict):
        raise FileError(f"{name} has a damaged header: no manifest or no deltas")
    return header


def _delta(path: Any, handle: Any, name: str, entry: dict[str, Any], fields: dict[str, list[str]]) -> Encoding:
    kind = entry.get("kind")
    if kind not in kinds():
        raise FileError(f"{os.fspath(path)}: {name!r} has encoding {kind!r}, this jft knows {', '.join(kinds())}")
    tensors = {field: handle.get_tensor(f"{name}{FIELD}{field}") for field in fields.get(name, ())}
    try:
        delta = kinds()[kind].unpack(tensors, entry["static"])
    # `unpack` gets what the file says, so whatever it stumbles over is the file's fault.
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{os.fspath(path)}: the delta of {name!r} is damaged: {error}") from None
    if list(delta.shape) != entry.get("shape"):
        raise FileError(f"{os.fspath(path)}: {name!r} has shape {delta.shape}, its header says {entry.get('shape')}")
    return delta


def _fields(names: Iterable[str]) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    for name in names:
        path, _, field = name.rpartition(FIELD)
        fields.setdefault(path, []).append(field)
    return fields


def _slice_bytes(piece: Any) -> int:
    # F8_E4M3 has digits of which only the first name its bits; BOOL has none and takes a byte.
    bits = int("".join(c for c in piece.get_dtype().split("_")[0] if c.isdigit()) or 8)
    return int(np.prod(piece.get_shape(), dtype=np.int64)) * bits // 8


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with files.whole(path) as temporary:
        # What open() gives a new file by the umask; safetensors makes its own readable by the owner alone.
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.numpy.save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
