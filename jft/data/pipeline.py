"""Grain pipelines: from tasks to batches, in an order that depends on seed and position alone.

**The order.** Training reads, for each task, a new permutation of all records every epoch, and of a mixture a fixed
interleaving by weight; position i of that endless sequence is the same for any number of processes, threads and
workers. Batch k holds positions kB to (k+1)B-1, and process p of n reads the p-th n-th of each batch: concatenating
the processes' batches gives the batch of one process. Texts that are not packed are sorted into buckets within windows of
that order (:mod:`jft.data.buckets`). Where sequences are packed, or records without buckets are dropped, each process packs
its own positions, so rows (not which records are read) depend on the number of processes.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from jft.data import packing
from jft.data.buckets import Bucketed, Measured, Shape, derived_seed
from jft.data.errors import DataError
from jft.data.tasks import Example, Task


@dataclass(frozen=True)
class Rows:
    """The layout of rows: ``pack`` as in :mod:`jft.data.packing`, row ``length``, padding id ``fill``."""

    pack: str | bool = False
    length: int = 0
    fill: int = 0


@dataclass(frozen=True)
class Buckets:
    """The buckets of a loader, from short to long, with the lengths of each task's examples; none: one length for all."""

    shapes: tuple[Shape, ...] = ()
    measured: Sequence[Measured] = ()


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


class Prepare:
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
    buckets: Buckets = Buckets(),
) -> Any:
    """An endless Grain dataset of this process's batches, from position ``start`` of the global order on."""
    streams, prepare = [], [Prepare(task, rows) for task in tasks]
    for number, task in enumerate(tasks):
        stream = grain.MapDataset.range(len(task.source))
        # Repeated after the shuffle: Grain then shuffles every epoch anew.
        stream = stream.shuffle(seed=derived_seed(seed, "order", number)).repeat()
        if buckets.shapes:
            streams.append(stream.map(_Key(number)))
        else:
            # A seed of its own: with one for all, the tasks of a mixture would draw the same augmentations.
            streams.append(stream.random_map(prepare[number], seed=derived_seed(seed, "augment", number)))
    stream = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
    if buckets.shapes:
        stream = Bucketed(stream, prepare, buckets.measured, buckets.shapes, batch_size, seed)
    examples = _read(_ProcessRows(stream, batch_size, process, start), reading)
    if rows.pack:
        examples = packing.pack(examples, str(rows.pack), rows.length, rows.fill)
    return examples.batch(batch_size // process.count, drop_remainder=True)


class _Key:
    """(task, index): the key of an example, from its index in task ``number``."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, index: int) -> tuple[int, int]:
        return self.number, int(index)


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


class _EvaluationKey:
    """(task, index) of row ``index`` of all tasks' records, one after the other; (None, 0) past the end."""

    def __init__(self, tasks: Sequence[Task]):
        self.stops = np.cumsum([len(task.source) for task in tasks]).tolist()

    def __call__(self, index: int) -> tuple[int | None, int]:
        if index >= self.stops[-1]:
            return None, 0
        task = bisect.bisect_right(self.stops, index)
        return task, index - (self.stops[task - 1] if task else 0)


class _EvaluationRow:
    """The example of a key; past the end, and where one is dropped, filler."""

    def __init__(self, prepare: Sequence[Prepare], blank: Example):
        self.prepare, self.blank = prepare, blank

    def __call__(self, key: tuple[int | None, int]) -> Example:
        task, index = key
        example = None if task is None else self.prepare[task](index)
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
        [grain.MapDataset.range(len(task.source)).map(Prepare(task, rows)) for task in tasks]
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
    buckets: Buckets = Buckets(),
) -> Any:
    """A finite Grain dataset of this process's batches: every example once, filler rows (``valid`` False) to the end."""
    count = len(packed) if packed is not None else sum(len(task.source) for task in tasks)
    total = -(-count // batch_size) * batch_size
    positions, prepare = grain.MapDataset.range(total), [Prepare(task, rows) for task in tasks]
    if packed is not None:
        examples = positions.map(_MemoryRows(packed, blank))
    elif buckets.shapes:
        keys = positions.map(_EvaluationKey(tasks))
        # A seed here too, though always the same: some take the first batches only, which must not be the shortest.
        examples = Bucketed(keys, prepare, buckets.measured, buckets.shapes, batch_size, 0, blank)
    else:
        examples = positions.map(_EvaluationKey(tasks)).map(_EvaluationRow(prepare, blank))
    process_rows = _ProcessRows(examples, batch_size, process, start)
    return _read(process_rows, reading).batch(batch_size // process.count, drop_remainder=True)
