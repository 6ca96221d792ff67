"""Safetensors files written tensor by tensor, and a directory that appears whole or not at all.

``safetensors.numpy.save_file`` takes all tensors of a file at once, so the host would hold a shard (5 GB). All shapes and
dtypes are known beforehand, so here the header goes first and each tensor follows when it is fetched: one is held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft.models.hf.checkpoint import INDEX, NAMES, SINGLE

ROWS = 32
"""Rows of a transposed matrix copied at a time: a cache line of each column, in two-byte types."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written; ``fetch()`` gives its value when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(directory: Path | None, tensors: Sequence[Tensor], shard_bytes: float) -> None:
    """``model.safetensors``, or shards of at most ``shard_bytes`` (one tensor at least) with their index.

    ``directory=None`` fetches every tensor in the same order and writes nothing: what the other processes of a multi-host
    run do, as fetching is collective.
    """
    shards = split(tensors, shard_bytes)
    for name, shard in shards.items():
        if directory is None:
            for tensor in shard:
                tensor.fetch()
        else:
            _write_file(directory / name, shard)
    if directory is not None:
        write_index(directory, shards)


def write_index(directory: Path, shards: Mapping[str, Sequence[Tensor]]) -> None:
    """The index of several shards; none where there is one file."""
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def split(tensors: Sequence[Tensor], shard_bytes: float) -> dict[str, list[Tensor]]:
    """``{file name: tensors}``, each file of at most ``shard_bytes``, or of one tensor."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def layout(tensors: Sequence[Tensor]) -> tuple[bytes, list[Tensor]]:
    """The bytes of a file before its tensors, and the order in which these follow."""
    # transformers refuses a file that does not name its framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide dtypes first keeps every tensor aligned, which readers that map the file rely on.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    # Tensors begin after the header, so its length is part of their alignment.
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, ordered


def _write_file(file: Path, tensors: Sequence[Tensor]) -> None:
    header, ordered = layout(tensors)
    with file.open("wb") as handle:
        handle.write(header)
        for tensor in ordered:
            _write(handle, tensor.fetch().reshape(tensor.shape))
        _sync(handle)


def _write(handle: Any, value: np.ndarray) -> None:
    """The bytes in C order; a transposed matrix a few rows at a time, which is faster and needs no second copy."""
    pieces = [value] if value.flags.c_contiguous else (value[i : i + ROWS] for i in range(0, len(value), ROWS))
    for piece in pieces:
        # As bytes: the buffer protocol knows no bfloat16.
        handle.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """A JSON object, indented, as transformers writes it."""
    with file.open("w", encoding="utf-8") as handle:
        handle.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        _sync(handle)


# On disk before the directory is renamed: after a crash the name must not stand over half a file.
def _sync(handle: Any) -> None:
    handle.flush()
    os.fsync(handle.fileno())


COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of tokenizers and image processors."""
MERGE = "jft_merge.json"
_WRITTEN = {"config.json", SINGLE, INDEX, MERGE, *COMPANIONS}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def copy_companions(origin: Path, target: Path) -> None:
    """Copy the files of tokenizers and image processors of a checkpoint.

    ``ValueError`` for a link out of its folder, which would copy whatever file of this machine whoever made the folder chose;
    those of the hub's cache, which lead from ``snapshots/COMMIT`` to ``blobs`` beside it, are good.
    """
    folder = origin.resolve()
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    for name in COMPANIONS:
        file = origin / name
        if not file.is_file():
            continue
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise ValueError(f"{file} is a link to {file.resolve()}, outside its folder; put the file itself there")
        shutil.copyfile(file, target / name)


def check_target(target: Path, overwrite: bool) -> None:
    """Check of a target: ``ValueError`` with the way out where something else occupies it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; save writes a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} exists and is not empty; give another name, or overwrite=True to replace it")
    if not (target / "config.json").is_file():
        raise ValueError(f"{target} has no config.json, so it is no checkpoint; overwrite=True replaces only those")
    # The directory is replaced as a whole, and what else lies there would go with it.
    others = sorted(p.name for p in target.iterdir() if p.name not in _WRITTEN and not _SHARD.fullmatch(p.name))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"{target} also holds {', '.join(others[:3])}{more}, which jft does not write and overwriting would delete; move "
            "it away, or give another name"
        )


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory next to ``target`` that replaces it when the block ends well, and is removed when not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        # mkdtemp makes it private; readers need the permissions that mkdir gives.
        partial.chmod(0o777 & ~_umask())
        yield partial
        swap(partial, target)
    finally:
        # Not there any more where the block ended well: it has become the target.
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    # The umask can be read only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def swap(partial: Path, target: Path) -> None:
    """Rename over ``target``: the old directory is moved away first, and back should the rename fail."""
    if not target.exists():
        os.rename(partial, target)
        return
    # A rename cannot replace a directory that is not empty.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    os.rename(target, aside / "old")
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(aside / "old", target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
