"""`read`: the metadata and tensors of a GGUF file, by the `gguf` library, checked to be whole."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"


class GgufError(ValueError):
    """A file that is no GGUF file, is cut, or holds what jft does not read."""


@dataclasses.dataclass(frozen=True)
class File:
    """path; the metadata, by key; the library's tensors, by name."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata at ``key``: a number, text, or a list of them."""
        return self.fields[key].contents() if key in self.fields else default

    def value(self, key: str) -> Any:
        """As :meth:`get`; :class:`GgufError` where there is none."""
        if key not in self.fields:
            raise GgufError(f"{self.path} has no {key!r} in its metadata; it is not a language model's file")
        return self.get(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, as NumPy has it: the last axis varies fastest."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def tensor(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor in float32, or the part ``index`` of its first axis, dequantised."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        shape = self.shape(name)
        data, shape = (tensor.data, shape) if index is None else (tensor.data[index], shape[1:])
        try:
            return np.asarray(dequantize(data, tensor.tensor_type), np.float32).reshape(shape)
        except NotImplementedError:
            raise GgufError(
                f"tensor {name!r} in {self.path} is quantised as {tensor.tensor_type.name}, which the gguf library does not "
                "dequantise; take a file of another type, such as Q8_0, Q4_1, Q4_K or BF16"
            ) from None


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether this is a file named ``.gguf``, or one that begins as such files do."""
    file = Path(path).expanduser()
    if not file.is_file():
        return False
    if file.suffix == ".gguf":
        return True
    with file.open("rb") as handle:
        return handle.read(4) == MAGIC


def read(path: str | os.PathLike) -> File:
    """The file at ``path``; nothing of its tensors is read yet.

    Raises :class:`GgufError` for what is no GGUF file, is cut, or is one of several parts, and ``ModuleNotFoundError``
    without the library.
    """
    file = Path(path).expanduser()
    status = file.stat()
    return _read(file, status.st_mtime_ns, status.st_size)


# Kept: a model and its tokenizer are read from the same file, and the lists of a vocabulary are slow to parse.
@functools.lru_cache(maxsize=2)
def _read(file: Path, time: int, size: int) -> File:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModuleNotFoundError(
            f"{file}: reading GGUF files needs the gguf library: pip install 'jft[gguf]'"
        ) from None
    with file.open("rb") as handle:
        magic = handle.read(4)
    if magic != MAGIC:
        raise GgufError(f"{file} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    try:
        reader = GGUFReader(file)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The library checks nothing: a cut file fails wherever the first missing byte is wanted.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError, TypeError) as error:
        reason = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
        raise GgufError(f"{file} is cut or corrupt ({size} bytes: {reason}); fetch it again") from None
    found = File(file, reader.fields, tensors)
    if found.get("split.count", 1) > 1:
        raise GgufError(
            f"{file} is one of {found.get('split.count')} parts; join them first, with llama.cpp's gguf-split --merge"
        )
    return found
