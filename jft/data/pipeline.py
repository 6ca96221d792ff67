"""Grain pipelines: from tasks to batches, in an order that depends on seed and position alone.

**The order.** Training reads, for each task, a new permutation of all records every epoch, and of a mixture a fixed
interleaving by weight; position i of that endless sequence is the same for any number of processes, threads and
workers. Batch k holds positions kB to (k+1)B-1, and process p of n reads the p-th n-th of each batch: concatenating
the processes' batches gives the batch of one process. Where sequences are packed, or records are dropped, each
process packs its own positions, so rows (not which records are read) depend on the number of processes.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from jft.data import packing
from jft.data.errors import DataError
from jft.data.tasks import Example, Task


@dataclass(frozen=True)
class Rows:
    """The layout of rows: ``pack`` as in :mod:`jft.data.packing`, row ``length``, padding id ``fill``."""

    pack: str | bool = False
    length: int = 0
    fill: int = 0


@dataclass(frozen=True)
class Process:
    """The number of this process, and how many there are."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Reading:
    """threads and prefetch (examples read ahead) in this process; workers: processes that prepare examples."""

    threads: int = 4
    prefetch: int = 64
    workers: int = 0


def derived_seed(seed: int, *names: object) -> int:
    """A 32-bit seed of its own for each use: neighbouring run seeds share no permutation."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4], "little")


class _Prepare:
    """Example of a task from its index and a random generator; sequences that are not packed become rows."""

    def __init__(self, task: Task, rows: Rows):
        self.task, self.rows = task, rows

    def __call__(self, index: int, rng: np.random.Generator | None = None) -> Example | None:
        example = self.task.example(int(index), rng)
        if example is None or not self.task.packs or self.rows.pack:
            return example
        return packing.pad(example, self.rows.length, self.rows.fill)


class _ProcessRows(grain.MapDataset):
    """The positions of one process: its block of every batch, from position ``start`` on."""

    def __init__(self, parent: Any, batch_size: int, process: Process, start: int):
        super().__init__(parent)
        self._batch, self._process, self._start = batch_size, process, start
        self._local = batch_size // process.count

    def __len__(self) -> int:
        # Whole batches, as many on every process: a collective waits for all of them.
        return (len(self._parent) - self._start) // self._batch * self._local

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._local)
        return self._parent[self._start + batch * self._batch + self._process.index * self._local + row]


def training(
    tasks: Sequence[Task],
    weights: Sequence[float],
    rows: Rows,
    batch_size: int,
    seed: int,
    process: Process,
    reading: Reading,
    start: int = 0,
) -> Any:
    """An endless Grain dataset of this process's batches, from position ``start`` of the global order on."""
    streams = []
    for number, task in enumerate(tasks):
        stream = grain.MapDataset.range(len(task.source))
        # Repeated after the shuffle: Grain then shuffles every epoch anew.
        stream = stream.shuffle(seed=derived_seed(seed, "order", number)).repeat()
        # A seed of its own: with one for all, the tasks of a mixture would draw the same augmentations.
        streams.append(stream.random_map(_Prepare(task, rows), seed=derived_seed(seed, "augment", number)))
    stream = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
    examples = _read(_ProcessRows(stream, batch_size, process, start), reading)
    if rows.pack:
        examples = packing.pack(examples, str(rows.pack), rows.length, rows.fill)
    return examples.batch(batch_size // process.count, drop_remainder=True)


def _read(examples: Any, reading: Reading) -> Any:
    buffered = examples.to_iter_dataset(
        grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=reading.prefetch if reading.threads else 0)
    )
    if not reading.workers:
        return buffered
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts workers, also in a notebook or a test
        flags.FLAGS.mark_as_parsed()
    return buffered.mp_prefetch(grain.MultiprocessingOptions(num_workers=reading.workers))


def filler(example: Example) -> Example:
    """A row that counts for nothing: an ordinary example (so every model can run it) with no targets, not valid."""
    row = {**example, "valid": np.bool_(False)}
    if "loss_mask" in row:
        row["loss_mask"] = np.zeros_like(row["loss_mask"])
    return row


class _EvaluationRow:
    """Row ``index`` of all tasks' records, one after the other; past the end, and where one is dropped, filler."""

    def __init__(self, tasks: Sequence[Task], rows: Rows, blank: Example):
        self.prepare = [_Prepare(task, rows) for task in tasks]
        self.stops = np.cumsum([len(task.source) for task in tasks]).tolist()
        self.blank = blank

    def __call__(self, index: int) -> Example:
        if index >= self.stops[-1]:
            return self.blank
        task = bisect.bisect_right(self.stops, index)
        example = self.prepare[task](index - (self.stops[task - 1] if task else 0))
        return self.blank if example is None else {**example, "valid": np.bool_(True)}


class _MemoryRows:
    """Rows held in memory, then filler."""

    def __init__(self, rows: Sequence[Example], blank: Example):
        self.rows, self.blank = rows, blank

    def __call__(self, index: int) -> Example:
        return self.rows[index] if index < len(self.rows) else self.blank


def packed_rows(tasks: Sequence[Task], rows: Rows, reading: Reading) -> list[Example]:
    """All rows of a finite set, packed the same way in every process (each packs all of it): so all agree on their number."""
    if not rows.pack:
        raise DataError("packed_rows needs a packing")
    all_rows = grain.MapDataset.concatenate(
        [grain.MapDataset.range(len(task.source)).map(_Prepare(task, rows)) for task in tasks]
    )
    # No workers: they would share the rows out, and each would pack others.
    read = _read(all_rows, Reading(reading.threads, reading.prefetch, 0))
    return [{**row, "valid": np.bool_(True)} for row in packing.pack(read, str(rows.pack), rows.length, rows.fill)]


def evaluation(
    tasks: Sequence[Task],
    rows: Rows,
    packed: Sequence[Example] | None,
    blank: Example,
    batch_size: int,
    process: Process,
    reading: Reading,
    start: int = 0,
) -> Any:
    """A finite Grain dataset of this process's batches: every example once, filler rows (``valid`` False) to the end."""
    count = len(packed) if packed is not None else sum(len(task.source) for task in tasks)
    total = -(-count // batch_size) * batch_size
    get = _MemoryRows(packed, blank) if packed is not None else _EvaluationRow(tasks, rows, blank)
    process_rows = _ProcessRows(grain.MapDataset.range(total).map(get), batch_size, process, start)
    return _read(process_rows, reading).batch(batch_size // process.count, drop_remainder=True)
