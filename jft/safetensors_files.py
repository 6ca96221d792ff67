"""Safetensors files, mapped into memory: names, shapes and dtypes at once, values when touched; and written whole.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, the header as JSON
``{name: {dtype, shape, data_offsets}}``, then the tensors' bytes. As strict as the reference implementation: the tensors'
bytes follow each other without gap or overlap and fill the file.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jft import files, strict_json

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


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its file, dtype as written there, shape, and where its bytes begin in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Tensors:
    """The tensors of one file by name: ``entries`` and ``metadata`` of its checked header, and :meth:`array`.

    ``error`` for a file that is truncated, damaged or none of the format.
    """

    def __init__(self, file: str | os.PathLike, error: type[ValueError] = ValueError):
        self.file, self.error = Path(file), error
        self.entries, self.metadata = read_header(self.file, error)
        self._map: mmap.mmap | None = None

    def __iter__(self) -> Any:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def array(self, name: str) -> np.ndarray:
        """A tensor as a read-only array over the mapped file; ``error`` for a dtype that NumPy lacks."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise self.error(
                f"tensor {name!r} in {self.file} has dtype {entry.dtype}, which is not supported ({known})"
            )
        if entry.nbytes == 0:
            return np.zeros(entry.shape, DTYPES[entry.dtype])
        flat = np.frombuffer(self.mapped(), DTYPES[entry.dtype], math.prod(entry.shape), entry.start)
        return flat.reshape(entry.shape)

    def mapped(self) -> mmap.mmap:
        """The file in memory, mapped at the first call."""
        if self._map is None:
            with self.file.open("rb") as handle:
                # A map stays valid after its file is closed.
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map


def load(file: str | os.PathLike, error: type[ValueError] = ValueError) -> dict[str, np.ndarray]:
    """Every tensor of a file by name, over the mapped file; ``error`` as of :class:`Tensors`."""
    tensors = Tensors(file, error)
    return {name: tensors.array(name) for name in tensors}


def save(tensors: Mapping[str, np.ndarray], file: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Write one file, whole or not at all. Raises ``OSError`` naming it where it cannot be written (a full disk)."""
    import safetensors
    import safetensors.numpy

    with files.whole(file) as temporary:
        # What open() gives a new file by the umask; safetensors makes its own readable by the owner alone.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            safetensors.numpy.save_file(dict(tensors), temporary, None if metadata is None else dict(metadata))
            temporary.chmod(mode)
        except safetensors.SafetensorError as bad:
            raise OSError(f"{os.fspath(file)} cannot be written: {bad}; nothing was changed there") from None


def read_header(file: Path, error: type[ValueError] = ValueError) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one file and its metadata; ``error`` for a header that is corrupt or does not fit the file."""
    size = files.check_regular(file, error).st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        # Such a length is the sign of another format: a pickle, or the pointer of a large-file store.
        if len(prefix) < 8 or length > MAX_HEADER:
            raise error(f"{file} is not a safetensors file: it is {size} bytes long and its header says {length}")
        if 8 + length > size:
            raise error(
                f"{file} is truncated: its header ends at byte {8 + length}, the file at {size}; fetch it again"
            )
        raw = handle.read(length)
    header = strict_json.loads(raw, f"{file} has a corrupt header", hint="fetch it again", error=error)
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise error(f"{file} has a corrupt header: it is no JSON object; fetch it again")
    # Free text of the writer, not a tensor.
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise error(f"{file} has a corrupt header: its metadata are no texts; fetch it again")
    entries = {}
    for name, value in header.items():
        try:
            entries[name] = _entry(file, value, 8 + length)
        except ValueError as bad:
            raise error(f"{file} has a corrupt header: tensor {name!r:.80} has {bad}; fetch it again") from None
    # As they lie in the file; of those at one place, which are empty, in any order.
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise error(
                f"{file} has a corrupt header: tensor {name!r:.80} begins at byte {entry.start}, where the one before it "
                f"ends at {end}; fetch it again"
            )
        end += entry.nbytes
    if end > size:
        raise error(f"{file} is truncated: its header says {end} bytes, the file has {size}; fetch it again")
    if end < size:
        raise error(
            f"{file} has {size - end} bytes after its last tensor, which its header does not name; fetch it again"
        )
    return entries, metadata


_SCHEMA = {
    "dtype": strict_json.TEXT,
    "shape": strict_json.Kind("a list of sizes", lambda x: _sizes(x)),
    "data_offsets": strict_json.Kind("two byte positions", lambda x: _sizes(x) and len(x) == 2 and x[0] <= x[1]),
}


def _sizes(x: Any) -> bool:
    # Not isinstance, to which True is an integer.
    return isinstance(x, list) and all(type(n) is int and 0 <= n < 2**63 for n in x)


def _entry(file: Path, value: Any, base: int) -> Entry:
    strict_json.need(value, _SCHEMA, "its entry")
    (begin, end), dtype, shape = value["data_offsets"], value["dtype"], tuple(value["shape"])
    # A dtype that numpy lacks has no item size to check; it is refused when such a tensor is read.
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{end - begin} bytes for a {dtype} tensor of shape {shape}")
    return Entry(file, dtype, shape, base + begin, end - begin)
