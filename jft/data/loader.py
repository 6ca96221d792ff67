"""`Loader`: batches for this process, with a position that can be saved and restored."""

from __future__ import annotations

import functools
import json
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jft.data import buckets, pipeline
from jft.data.buckets import Measured, Shape
from jft.data.errors import DataError
from jft.data.packing import bins
from jft.data.pipeline import Buckets, Prepare, Process, Reading, Rows
from jft.data.source import fingerprint
from jft.data.survey import Survey, survey
from jft.data.tasks import Example, Task
from jft.data.tokenizer import Tokenizer

# How many records may be left out before a task counts as one that keeps nothing.
_ATTEMPTS = 100


class Loader:
    """``iter(loader)`` gives dicts of NumPy arrays, ``[B / processes, ...]``: endless in training, once over in evaluation.

    batch_size: B, of all processes together. classes: class names, or None. tokenizer: or None. examples: records in
    the sources. Evaluation batches hold ``valid`` (bool [B]): False marks rows that only fill the last batch.
    ``len(loader)``: batches of an evaluation loader. lengths: True, False or a list, see ``buckets`` in :mod:`jft.data`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        weights: Sequence[float],
        rows: Rows,
        *,
        batch_size: int,
        seed: int = 0,
        train: bool = True,
        tokenizer: Tokenizer | None = None,
        process: Process | None = None,
        reading: Reading | None = None,
        lengths: Any = True,
    ):
        self.tasks, self.weights, self.rows = list(tasks), list(weights), rows
        self.batch_size, self.seed, self.train, self.tokenizer = batch_size, seed, train, tokenizer
        self.process, self.reading = process or Process(), reading or Reading()
        if batch_size < 1 or batch_size % self.process.count:
            raise DataError(
                f"batch_size={batch_size} must be a positive multiple of the {self.process.count} processes"
            )
        self.examples = sum(len(task.source) for task in tasks)
        self.classes = tasks[0].classes
        self._lengths = lengths
        if rows.pack and not isinstance(lengths, bool):
            raise DataError(f"buckets are for rows of one text each, and pack is {rows.pack!r}; leave one of them out")
        self.measured = [Measured(task, Prepare(task, rows)) for task in tasks]
        self._first = [self._first_example(task) for task in tasks]
        self._check_agreement()

    def _first_example(self, task: Task) -> Example:
        """The first example that is kept: wrong settings fail here, before anything is compiled."""
        rng = np.random.default_rng(0) if self.train else None
        prepare = Prepare(task, Rows(False, self.rows.length, self.rows.fill))
        if self.rows.pack == "concat":  # a sequence may be longer than a row
            for i in range(min(_ATTEMPTS, len(task.source))):
                if (example := task.example(i, rng)) is not None:
                    cut = {k: v[: self.rows.length] for k, v in example.items()}
                    return pipeline.packing.pad(cut, self.rows.length, self.rows.fill)
        else:
            for i in range(min(_ATTEMPTS, len(task.source))):
                if (example := prepare(i, rng)) is not None:
                    return example
        raise DataError(
            f"{task.source.name}: none of the first {_ATTEMPTS} examples is kept; raise max_length, or look at too_long"
        )

    def _check_agreement(self) -> None:
        shapes = [{k: np.shape(v) for k, v in first.items()} for first in self._first]
        for task, shape in zip(self.tasks[1:], shapes[1:], strict=True):
            if shape != shapes[0]:
                raise DataError(
                    f"mixture: {task.source.name} gives {shape}, but {self.tasks[0].source.name} gives {shapes[0]};"
                    " give both the same task, max_length and image size"
                )
            if task.classes != self.classes:
                raise DataError(f"mixture: {task.source.name} has other classes than {self.tasks[0].source.name}")

    @property
    def indexed(self) -> bool:
        """Whether a position in the global order tells everything: then a run may resume on any number of processes."""
        drops = any(task.drops for task in self.tasks) and not self.shapes
        return not self.train or not (self.rows.pack or drops)

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The buckets, from short to long, one length a side; none where all rows have one shape."""
        longest = self.tasks[0].longest
        if not longest or self.rows.pack or self._lengths is False:
            return ()
        if self._lengths is not True:
            return buckets.explicit(self._lengths, longest)
        count = -(-buckets.SAMPLE // len(self.tasks))
        sample = np.concatenate([measured.sample(count) for measured in self.measured])
        found = buckets.choose(sample, longest) if len(sample) else ()
        return found if len(found) > 1 else ()

    def survey(self, seconds: float = math.inf) -> Survey:
        """Prepare all records, for at most ``seconds``: what would stop training later is found now (see :func:`survey`)."""
        return survey(self, seconds)

    def largest(self, known: bool = True) -> dict[str, np.ndarray]:
        """A batch of this process of the largest shape, of zeros that take no memory.

        known: the largest of all examples, where the lengths of all are known; else of ``max_length``.
        """
        row = self._first[0] if self.train else pipeline.filler(self._first[0])
        # Of several processes one may know less than another, and all must compile one program.
        if self.shapes and known and self.process.count == 1 and all(m.complete for m in self.measured):
            found = np.max([m.found.max(0) for m in self.measured], axis=0)
            row = buckets.crop(row, next(s for s in self.shapes if all(found <= s)))
        rows = self.batch_size // self.process.count
        return {k: np.broadcast_to(np.zeros((), np.asarray(v).dtype), (rows, *np.shape(v))) for k, v in row.items()}

    @functools.cached_property
    def epoch(self) -> float:
        """Batches of one pass over the data: of packed rows their number, which takes the lengths of all examples."""
        if not self.rows.pack:
            return self.examples / self.batch_size
        found = np.concatenate([m.all()[:, 0] for m in self.measured])
        return bins(found[found > 0], str(self.rows.pack), self.rows.length) / self.batch_size

    def __len__(self) -> int:
        if self.train:
            raise TypeError("a training loader is endless")
        count = self.examples if self._packed_rows is None else len(self._packed_rows)
        return -(-count // self.batch_size)

    @functools.cached_property
    def _packed_rows(self) -> list[Example] | None:
        return pipeline.packed_rows(self.tasks, self.rows, self.reading) if self.rows.pack and not self.train else None

    def sample(self) -> dict[str, np.ndarray]:
        """One example of each source as a batch (rows in the order of the mixture): for shapes, and for :func:`show`."""
        return {k: np.stack([first[k] for first in self._first]) for k in self._first[0]}

    def dataset(self, start: int = 0) -> Any:
        """The Grain dataset of this process's batches, from position ``start`` of the global order on."""
        shared = self.process, self.reading, start, Buckets(self.shapes, self.measured)
        if self.train:
            return pipeline.training(self.tasks, self.weights, self.rows, self.batch_size, self.seed, *shared)
        blank = pipeline.filler(self._first[0])
        return pipeline.evaluation(self.tasks, self.rows, self._packed_rows, blank, self.batch_size, *shared)

    def __iter__(self) -> LoaderIterator:
        return LoaderIterator(self)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The content that it reads: ``rows``, a hash for each source (:func:`jft.data.source.fingerprint`), ``tokenizer``."""
        tokenizer = {} if self.tokenizer is None else {"tokenizer": self.tokenizer.fingerprint()}
        return {"rows": [fingerprint(task.source) for task in self.tasks], **tokenizer}

    def layout(self) -> dict[str, Any]:
        """The settings that must be equal for a saved position to mean the same examples."""
        layout_of: dict[str, Any] = {
            "seed": self.seed,
            "examples": [len(t.source) for t in self.tasks],
            "weights": self.weights,
        }
        if self.shapes:
            layout_of |= {"buckets": self.shapes, "batch_size": self.batch_size}
        if not self.indexed:
            layout_of |= {"pack": self.rows.pack, "max_length": self.rows.length, "batch_size": self.batch_size}
            layout_of |= {"processes": self.process.count, "workers": self.reading.workers}
        return layout_of


def _tuples(value: Any) -> Any:
    """Lists back to tuples: JSON has none, and Grain compares some parts of its state with tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _close(batches: list) -> None:
    while batches:
        batches.pop().close()


class LoaderIterator(Iterator[dict[str, np.ndarray]]):
    """Batches, and the position in them: ``get_state()`` (JSON bytes) before batch k, ``set_state`` to go on with batch k."""

    def __init__(self, loader: Loader):
        self.loader = loader
        self._open(0)

    def _open(self, position: int) -> None:
        # A list, which the finalizer can empty without keeping this object alive.
        self._position, self._batches = position, [iter(self.loader.dataset(position))]
        # Grain's threads must stop, and its iterators go, before the interpreter takes its modules apart.
        self._closing = weakref.finalize(self, _close, self._batches)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches[0])
        self._position += self.loader.batch_size
        return batch

    def get_state(self) -> bytes:
        """The position: for indexed pipelines the number of examples read, else Grain's state."""
        state: dict[str, Any] = {"layout": self.loader.layout(), "position": self._position}
        if not self.loader.indexed:
            state["grain"] = self._batches[0].get_state()
        return json.dumps(state, sort_keys=True, default=int).encode()

    def set_state(self, state: bytes | str) -> None:
        """Continues from a saved position. Raises :class:`DataError` where data, seed or (if packed) processes differ."""
        try:
            saved = json.loads(state)
            position, layout = int(saved["position"]), saved["layout"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"not a data position of this version: {str(state)[:80]!r}") from None
        # Through JSON, in which tuples and lists are the same.
        current = json.loads(json.dumps(self.loader.layout()))
        different = [k for k in {**current, **layout} if current.get(k) != layout.get(k)]
        if different:
            changes = "; ".join(f"{k}: saved {layout.get(k)!r}, now {current.get(k)!r}" for k in different)
            raise DataError(
                f"the saved data position belongs to other data settings ({changes}); restore them, or begin the data anew"
            )
        self.close()
        if self.loader.indexed:
            self._open(position)
        else:
            self._open(0)
            self._batches[0].set_state(_tuples(saved["grain"]))
            self._position = position

    def set_examples(self, state: bytes | str) -> bool:
        """Continues after as many examples as a position has read that belongs to other data; False where no count tells."""
        if self.loader.indexed:
            self.close()
            self._open(int(json.loads(state)["position"]))
        return self.loader.indexed

    def close(self) -> None:
        """Stops read-ahead threads and worker processes."""
        self._closing()
