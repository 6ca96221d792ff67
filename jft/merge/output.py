"""The directory that a merge writes: whole or not at all, and after an interruption continued from its finished shards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jft.models.hf import writer
from jft.models.hf.writer import Tensor

PLAN = "plan.json"
"""What the unfinished directory is of: a merge that differs starts anew."""


class Output:
    """Shards of tensors written in any order by several threads; a shard has its name once it is complete and on disk."""

    def __init__(self, directory: Path, tensors: Sequence[Tensor], shard_bytes: float):
        self.directory = directory
        self.shards = writer.split(tensors, shard_bytes)
        self._shard = {tensor.name: shard for shard, held in self.shards.items() for tensor in held}
        self._lock = threading.Lock()
        self._files: dict[str, BinaryIO] = {}
        self._offsets: dict[str, int] = {}
        self._missing = {
            shard: {tensor.name for tensor in held}
            for shard, held in self.shards.items()
            if not (directory / shard).exists()
        }

    @property
    def missing(self) -> set[str]:
        """The tensors of shards that are not finished."""
        return set().union(*self._missing.values())

    def close(self) -> None:
        """Close what is not finished."""
        for handle in self._files.values():
            handle.close()

    def write(self, name: str, value: np.ndarray) -> None:
        """A whole tensor, in its dtype and C order."""
        handle, offset = self._open(self._shard[name]), self._offsets[name]
        data = value.reshape(-1).view(np.uint8).data
        while data:
            # The system writes at most 2 GiB in one go.
            written = os.pwrite(handle.fileno(), data, offset)
            data, offset = data[written:], offset + written
        self._written(name)

    def _open(self, shard: str) -> BinaryIO:
        with self._lock:
            if shard not in self._files:
                header, ordered = writer.layout(self.shards[shard])
                offset = len(header)
                for tensor in ordered:
                    self._offsets[tensor.name] = offset
                    offset += tensor.nbytes
                handle = (self.directory / f"{shard}.unfinished").open("wb")
                handle.write(header)
                handle.flush()
                handle.truncate(offset)
                self._files[shard] = handle
            return self._files[shard]

    def _written(self, name: str) -> None:
        shard = self._shard[name]
        with self._lock:
            self._missing[shard].remove(name)
            if self._missing[shard]:
                return
            del self._missing[shard]
            handle = self._files.pop(shard)
        # On disk before it has its name, which says that it is finished.
        os.fsync(handle.fileno())
        handle.close()
        os.replace(self.directory / f"{shard}.unfinished", self.directory / shard)


@contextlib.contextmanager
def unfinished(target: Path, plan: dict[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """The directory ``.NAME.merging`` next to ``target``, which it becomes when the block ends well.

    What an interrupted merge of an equal ``plan`` left there is kept; what another left is removed. Raises ``ValueError``
    for an occupied target, and while another process writes there.
    """
    writer.check_target(target, overwrite)
    directory = target.parent / f".{target.name}.merging"
    directory.mkdir(parents=True, exist_ok=True)
    lock = target.parent / f".{target.name}.lock"
    with lock.open("w") as handle:
        try:
            # Released by the system when the process ends, however it ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another merge is writing {target}; wait for it, or give another directory") from None
        file = directory / PLAN
        if not file.is_file() or file.read_text(encoding="utf-8") != _text(plan):
            shutil.rmtree(directory)
            directory.mkdir()
            writer.write_json(file, plan)
        try:
            yield directory
            file.unlink()
            writer.swap(directory, target)
        finally:
            # Only finished shards are worth another start.
            if not any(directory.glob("*.safetensors")):
                shutil.rmtree(directory, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _text(plan: dict[str, Any]) -> str:
    return json.dumps(plan, indent=2, sort_keys=True) + "\n"
