"""The file format of task vectors: one safetensors file.

Tensors: every array of the delta of a path, named ``PATH|FIELD`` (``layers/attn/q/w|a``); the parts of a sum are
``PATH|0.FIELD``, ``PATH|1.FIELD``. A path that changes nothing has none. The safetensors metadata has two keys, ``jft``,
holding JSON, and ``crc32``, the checksum of that text, in hexadecimal digits:

    {"format": "jft.task_vector", "version": 1,
     "manifest": {...},                                       see jft.delta.manifest
     "deltas": {PATH: {"kind": "rows", "shape": [50257, 768], "static": {...}, "crc32": {FIELD: "0f3c21aa", ...}}}}

``kind`` names the encoding, ``static`` its constants (:meth:`jft.delta.Encoding.pack`), ``shape`` is that of the weight, and
``crc32`` the checksum of each of its tensors (:func:`checksum`). So every byte of a file is under a checksum: what was
damaged is refused, also where one delta alone is read. Files written before there were checksums, without ``crc32``, load.
Values are stored as they are typed (float32 from arithmetic), or in the dtype asked for; indices as int32, those of single
entries compressed (:mod:`jft.delta.elias_fano`), masks and signs as bits, quantized values in as many bits as they have. A
reader refuses a version newer than its own; within a version, keys may be added and unknown ones are ignored. Values that
are not finite are neither written nor read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import safetensors_files, strict_json
from jft.delta import manifest as manifests
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
        values = {field: host(array) for field, array in arrays.items()}
        for field, value in values.items():
            if not finite(value):
                raise ValueError(
                    f"the delta of {name!r} is not finite ({field}, as {value.dtype}); nothing was written"
                )
        tensors |= {f"{name}{FIELD}{field}": value for field, value in values.items()}
        sums = {field: checksum(value) for field, value in values.items()}
        entries[name] = {"kind": delta.kind, "shape": list(delta.shape), "static": static, "crc32": sums}
    text = json.dumps({"format": FORMAT, "version": VERSION, "manifest": manifest, "deltas": entries})
    if jax.process_index() == 0:
        safetensors_files.save(tensors, path, {"jft": text, "crc32": _crc32(text.encode())})


def checksum(value: np.ndarray) -> str:
    """CRC-32 of an array's dtype, shape and bytes in C order, as eight hexadecimal digits."""
    name = safetensors_files.NAMES.get(value.dtype, value.dtype.name)
    start = zlib.crc32(f"{name}{list(value.shape)}".encode())
    return f"{zlib.crc32(_bytes(value).data, start):08x}"


def finite(value: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; integers always are."""
    return not jnp.issubdtype(value.dtype, jnp.inexact) or bool(np.isfinite(value).all())


def _bytes(value: np.ndarray) -> np.ndarray:
    # As bytes: the buffer protocol knows no bfloat16.
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _crc32(raw: bytes) -> str:
    return f"{zlib.crc32(raw):08x}"


def read(path: str | os.PathLike, paths: Iterable[str] | None = None) -> tuple[dict[str, Encoding], Manifest]:
    """``(deltas, manifest)`` of a task vector; with ``paths``, only those deltas.

    Raises :class:`FileError` naming what is wrong with the file.
    """
    tensors, header = _open(path)
    names = header["deltas"] if paths is None else list(paths)
    # The caller's mistake, not the file's: no FileError.
    missing = [name for name in names if name not in header["deltas"]]
    if missing:
        raise ValueError(f"{path} has no delta for {missing[0]!r}; it has: {', '.join(header['deltas'])}")
    fields = _fields(tensors)
    deltas = {name: _delta(tensors, name, header["deltas"][name], fields.get(name, [])) for name in names}
    return deltas, header["manifest"]


def verify(path: str | os.PathLike) -> None:
    """Read every value of a task vector, one tensor at a time; :class:`FileError` where one is damaged or not finite."""
    tensors, header = _open(path)
    for name, fields in _fields(tensors).items():
        _values(tensors, name, header["deltas"][name], fields)


def inspect(path: str | os.PathLike) -> Header:
    """The manifest, and encoding, shape, dtype and bytes of every delta, reading no values."""
    tensors, header = _open(path)
    fields = _fields(tensors)
    entries = {}
    for name, entry in header["deltas"].items():
        held = [tensors.entries[f"{name}{FIELD}{field}"] for field in fields.get(name, ())]
        # A scalar, such as the scale of a mask, does not tell the dtype of the values.
        types = [t.dtype for t in held if t.shape] or [t.dtype for t in held]
        entries[name] = Entry(
            kind=entry["kind"],
            shape=tuple(entry["shape"]),
            # Floats are F32, BF16, F8_E4M3 and so on: the values, where there are indices as well.
            dtype=next((t for t in types if "F" in t), types[0] if types else "-"),
            nbytes=sum(t.nbytes for t in held),
        )
    return Header(header["manifest"], entries)


def _open(path: str | os.PathLike) -> tuple[safetensors_files.Tensors, dict[str, Any]]:
    """The mapped file and its checked header."""
    # Before it is opened, since a missing file would be called damaged below.
    if not os.path.isfile(path):
        raise FileError(f"{os.fspath(path)}: no such file")
    try:
        tensors = safetensors_files.Tensors(path, FileError)
    except FileError as error:
        raise FileError(f"{os.fspath(path)} is truncated, damaged or no safetensors file: {error}") from None
    header = _header(path, tensors.metadata)
    lost = [name for name in _fields(tensors) if name not in header["deltas"]]
    if lost:
        raise FileError(f"{os.fspath(path)} has a damaged header: it says nothing of the tensors of {lost[0]!r:.80}")
    return tensors, header


_SHAPE = strict_json.listed(strict_json.COUNT)
_DELTA = {"kind": strict_json.TEXT, "shape": _SHAPE, "static": strict_json.OBJECT}
_SUMS = {
    "crc32": strict_json.Kind(
        "the checksum of each tensor", lambda x: isinstance(x, dict) and all(isinstance(y, str) for y in x.values())
    )
}


def _header(path: str | os.PathLike, metadata: Mapping[str, str]) -> dict[str, Any]:
    name = os.fspath(path)
    if "jft" not in metadata:
        raise FileError(f"{name} is a safetensors file, but no task vector; jft.load reads model checkpoints")
    # A key that is not known may be what damage made of one that is, such as that of the checksum.
    strange = set(metadata) - {"jft", "crc32", "format"}
    if strange:
        raise FileError(f"{name} has a damaged header: metadata {min(strange)!r:.80}, which no task vector has")
    text = metadata["jft"]
    if metadata.get("crc32", _crc32(text.encode())) != _crc32(text.encode()):
        raise FileError(f"{name} has a damaged header: another checksum than when it was written")
    header = strict_json.loads(text, f"{name} has a damaged header", nan=True, error=FileError)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise FileError(f"{name} is no task vector")
    # Older versions are read for good.
    if type(header.get("version")) is not int or header["version"] > VERSION:
        raise FileError(
            f"{name} has format version {header.get('version')!r:.40}, this jft reads {VERSION}; upgrade jft"
        )
    if not isinstance(header.get("manifest"), dict) or not isinstance(header.get("deltas"), dict):
        raise FileError(f"{name} has a damaged header: no manifest or no deltas")
    where = f"{name} has a damaged header"
    schema = _DELTA | (_SUMS if "crc32" in metadata else {})
    for of, entry in header["deltas"].items():
        strict_json.need(entry, schema, f"{where}: {of!r:.80}", FileError)
        strict_json.check(entry, _SUMS, f"{where}: {of!r:.80}", FileError)
        strict_json.check(entry["static"], {"shape": _SHAPE}, f"{where}: {of!r:.80}", FileError)
    try:
        manifests.check_read(header["manifest"])
    except ValueError as error:
        raise FileError(f"{where}: {error}") from None
    # Null says the same as none at all, which is what readers look for.
    if header["manifest"].get("base", False) is None:
        del header["manifest"]["base"]
    return header


def _values(
    tensors: safetensors_files.Tensors, name: str, entry: dict[str, Any], fields: list[str]
) -> dict[str, np.ndarray]:
    """The tensors of a delta by field, over the mapped file, each as it was when it was written, and finite."""
    where, sums = os.fspath(tensors.file), entry.get("crc32")
    if sums is not None and set(sums) != set(fields):
        raise FileError(f"{where}: the delta of {name!r} is damaged: it has {fields}, and checksums of {[*sums]}")
    values = {}
    for field in fields:
        values[field] = value = tensors.array(f"{name}{FIELD}{field}")
        if sums is not None and checksum(value) != sums[field]:
            raise FileError(
                f"{where}: the delta of {name!r} is damaged: its {field} have another checksum than when they were written"
            )
        if not finite(value):
            raise FileError(
                f"{where}: the delta of {name!r} has {field} that are not finite; the run that made it diverged"
            )
    return values


def _delta(tensors: safetensors_files.Tensors, name: str, entry: dict[str, Any], fields: list[str]) -> Encoding:
    path, kind = os.fspath(tensors.file), entry["kind"]
    if kind not in kinds():
        raise FileError(f"{path}: {name!r} has encoding {kind!r}, this jft knows {', '.join(kinds())}")
    # In NumPy, in which what the file says is looked at as it is: JAX would cut 64-bit indices to 32 bits.
    values = _values(tensors, name, entry, fields)
    try:
        delta = kinds()[kind].unpack(values, entry["static"])
    # `unpack` gets what the file says, so whatever it stumbles over is the file's fault.
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, MemoryError) as error:
        raise FileError(f"{path}: the delta of {name!r} is damaged: {error}") from None
    if list(delta.shape) != entry["shape"]:
        raise FileError(f"{path}: {name!r} has shape {delta.shape}, its header says {entry['shape']}")
    # Copies on the device: a map of the file would keep it open, and end with it.
    return jax.tree.map(jnp.array, delta)


def _fields(names: Iterable[str]) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    for name in names:
        path, _, field = name.rpartition(FIELD)
        fields.setdefault(path, []).append(field)
    return fields
