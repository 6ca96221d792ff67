"""The safetensors files of a model's directory: which there are, and their tensors by name, read when touched."""

from __future__ import annotations

import mmap
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jft import safetensors_files, strict_json
from jft.safetensors_files import DTYPES, NAMES, Entry, Tensors

__all__ = ["DTYPES", "INDEX", "NAMES", "SINGLE", "Checkpoint", "Entry", "LoadError", "read_header", "read_json"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Looked for only to tell their owner how to convert them.
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")


class LoadError(ValueError):
    """A checkpoint that cannot be read as the model that its config names."""


class Checkpoint:
    """All tensors of a directory, by name. Opening checks every header against its file; no tensor is read."""

    def __init__(self, directory: Path):
        self.directory, self.description = directory, directory / "config.json"
        self.entries: dict[str, Entry] = {}
        self._opened: dict[Path, Tensors] = {}
        for file, names in _files(directory).items():
            held = self._opened[file] = Tensors(file, LoadError)
            for name in names if names is not None else held:
                if name not in held:
                    raise LoadError(f"{directory / INDEX} says that {name!r} is in {file.name}, which does not hold it")
                self.entries[name] = held.entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the mapped file; ``LoadError`` for a dtype that is no parameter's."""
        return self._opened[self.entries[name].file].array(name)

    def release(self, name: str) -> None:
        """Let the system take back the pages of this tensor: they are clean, and no longer count as this process's."""
        entry = self.entries[name]
        if entry.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            # madvise takes whole pages.
            first = entry.start - entry.start % mmap.PAGESIZE
            mapped = self._opened[entry.file].mapped()
            mapped.madvise(mmap.MADV_DONTNEED, first, entry.start + entry.nbytes - first)


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
        names = files.setdefault(directory / _shard(directory, name, shard), [])
        assert names is not None
        names.append(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise LoadError(f"{directory} lacks {', '.join(missing)}, named in {INDEX}; the download is incomplete")
    return files


def _shard(directory: Path, name: str, shard: Any) -> str:
    """The file of a tensor by the index: one under the directory, as an index that was downloaded may name any."""
    parts = PurePosixPath(shard).parts if isinstance(shard, str) and shard.isprintable() else ()
    if not parts or len(shard) > 255 or "\\" in shard or ".." in parts or PurePosixPath(shard).is_absolute():
        raise LoadError(
            f"{directory / INDEX}: {name!r:.80} is said to be in {shard!r:.80}, which is no file of that folder"
        )
    return str(shard)


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
    return strict_json.read(file, error=LoadError, hint="fetch it again, or write it anew")


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; ``LoadError`` for a header that is corrupt or does not fit the file."""
    return safetensors_files.read_header(file, LoadError)[0]
