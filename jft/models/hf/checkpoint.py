"""The safetensors files of a directory, mapped into memory: names, shapes and dtypes at once, bytes when touched.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, the header as JSON
``{name: {dtype, shape, data_offsets}}``, then the tensors' bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # what the reference implementation accepts
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Looked for only to tell their owner how to convert them.
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")


class LoadError(ValueError):
    """A checkpoint that cannot be read as the model that its config names."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its file, dtype as written there, shape, and where its bytes begin in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Checkpoint:
    """All tensors of a directory, by name. Opening checks every header against its file; no tensor is read."""

    def __init__(self, directory: Path):
        self.directory, self.description = directory, directory / "config.json"
        self.entries: dict[str, Entry] = {}
        for file, names in _files(directory).items():
            header = read_header(file)
            for name in names if names is not None else header:
                if name not in header:
                    raise LoadError(f"{directory / INDEX} says that {name!r} is in {file.name}, which does not hold it")
                self.entries[name] = header[name]
        self._maps: dict[Path, mmap.mmap] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the mapped file; ``LoadError`` for a dtype that is no parameter's."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise LoadError(
                f"tensor {name!r} in {entry.file} has dtype {entry.dtype}, which is not supported ({known})"
            )
        if entry.nbytes == 0:
            return np.zeros(entry.shape, DTYPES[entry.dtype])
        flat = np.frombuffer(self._map(entry.file), DTYPES[entry.dtype], math.prod(entry.shape), entry.start)
        return flat.reshape(entry.shape)

    def release(self, name: str) -> None:
        """Let the system take back the pages of this tensor: they are clean, and no longer count as this process's."""
        entry = self.entries[name]
        if entry.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            # madvise takes whole pages.
            first = entry.start - entry.start % mmap.PAGESIZE
            self._map(entry.file).madvise(mmap.MADV_DONTNEED, first, entry.start + entry.nbytes - first)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # A map stays valid after its file is closed.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """``{file: names it is read for}``; None: all of them."""
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    if not (directory / INDEX).is_file():
        _no_weights(directory)
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{directory / INDEX} has no weight_map; the index is not one of a sharded checkpoint")
    files: dict[Path, list[str] | None] = {}
    for name, shard in weight_map.items():
        names = files.setdefault(directory / str(shard), [])
        assert names is not None
        names.append(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise LoadError(f"{directory} lacks {', '.join(missing)}, named in {INDEX}; the download is incomplete")
    return files


def _no_weights(directory: Path) -> None:
    pickles = [name for name in TORCH_FILES if (directory / name).is_file()]
    if pickles:
        raise LoadError(
            f"{directory} holds only {pickles[0]}, a pickle, which jft does not read. Convert it once, with torch and "
            "transformers: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR) writes model.safetensors (with the "
            "class that config.json names under architectures in place of AutoModel)"
        )
    raise LoadError(f"{directory} has neither {SINGLE} nor {INDEX}; it is not a checkpoint that jft reads")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; ``LoadError`` where it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoadError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; ``LoadError`` for a header that is corrupt or does not fit the file."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        # Such a length is the sign of another format: a pickle, or the pointer of a large-file store.
        if len(prefix) < 8 or length > MAX_HEADER:
            raise LoadError(f"{file} is not a safetensors file: it is {size} bytes long and its header says {length}")
        if 8 + length > size:
            raise LoadError(
                f"{file} is truncated: its header ends at byte {8 + length}, the file at {size}; fetch it again"
            )
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        # Free text of the writer, not a tensor.
        header.pop("__metadata__", None)
        entries = {name: _entry(file, value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{file} has a corrupt header: {error!r}; fetch it again") from None
    end = max((e.start + e.nbytes for e in entries.values()), default=8 + length)
    if end > size:
        raise LoadError(f"{file} is truncated: its header says {end} bytes, the file has {size}; fetch it again")
    return entries


def _entry(file: Path, value: dict[str, Any], base: int) -> Entry:
    shape = tuple(int(n) for n in value["shape"])
    begin, end = (int(n) for n in value["data_offsets"])
    dtype = str(value["dtype"])
    if begin < 0 or end < begin or any(n < 0 for n in shape):
        raise ValueError(f"offsets {begin}..{end} of a tensor of shape {shape}")
    # A dtype that numpy lacks has no item size to check; it is refused when such a tensor is read.
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{end - begin} bytes for a {dtype} tensor of shape {shape}")
    return Entry(file, dtype, shape, base + begin, end - begin)
