"""Buckets: the few lengths that rows of text are padded to, in place of one length for all of them.

Every bucket is a shape of its own, and so one more program to compile. The examples of a *window*, as many consecutive
positions of the global order as :data:`WINDOW` batches have, are sorted by bucket and cut into batches again; each batch
has the bucket of its longest row, and the batches of a window are shuffled. All of it follows from seed, position and the
lengths of the window's examples, which every process finds for itself: so all take the same bucket for a step, on any
number of them, and a saved position is a number as it is without buckets.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from jft.data.errors import DataError
from jft.data.tasks import Example, Task

COUNT = 4
"""Buckets of a loader at most."""
SAMPLE = 2048
"""Records whose lengths choose the buckets, evenly spaced over the data."""
ROUND = 16
"""Lengths are multiples of it: what matrix units take, and few to choose from."""
GAIN = 0.05
"""The share of all positions that a bucket must save to be worth its compilation."""
CANDIDATES = 64
"""Lengths to choose from at most."""
WINDOW = 32
"""Batches that are sorted together: of 32, at most ``COUNT - 1`` have rows of two buckets."""
SIDES = ("", "decoder_")
UNKNOWN = -1
Shape = tuple[int, ...]


def derived_seed(seed: int, *names: object) -> int:
    """A 32-bit seed of its own for each use: neighbouring run seeds share no permutation."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4], "little")


def lengths(example: Example) -> Shape:
    """Tokens of an example without padding: one number, two (encoder, decoder) of an encoder-decoder."""
    sides = [side for side in SIDES if f"{side}tokens" in example]
    # Before it is a row, an example has no padding and no segments.
    padded = lambda side: example.get(f"{side}segments", np.ones(len(example[f"{side}tokens"])))
    return tuple(int(np.count_nonzero(padded(side))) for side in sides)


def crop(example: Example, shape: Shape) -> Example:
    """The rows of an example cut to ``shape``, one length a side as of :func:`lengths`."""
    sides = [side for side in SIDES if f"{side}tokens" in example]
    stops = dict(zip(sides, shape, strict=True))
    fields = {f"{s}{name}": n for s, n in stops.items() for name in ("tokens", "segments", "positions", "token_types")}
    # Of an encoder-decoder the loss is over the decoder's tokens.
    fields["loss_mask"] = stops[sides[-1]]
    return {name: value[: fields[name]] if name in fields else value for name, value in example.items()}


def fitting(rows: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The index of the first bucket that holds each row: ``[N, sides]`` and ``[K, sides]`` to ``[N]``."""
    return (rows[:, None, :] <= buckets[None]).all(-1).argmax(1)


def choose(sample: np.ndarray, longest: Shape, count: int = COUNT) -> tuple[Shape, ...]:
    """At most ``count`` buckets for rows of the lengths ``sample`` (int ``[N, sides]``), from short to long.

    The last is ``longest``, which costs nothing where no row needs it. Of all choices out of :data:`CANDIDATES` that with the
    fewest positions; one bucket more only where it saves :data:`GAIN` of them.
    """
    rows = np.minimum(-(-sample // ROUND) * ROUND, longest)
    # With two sides: what holds the rows up to one of them, by their size on both together. So all are in one chain.
    chain = np.unique(np.maximum.accumulate(rows[np.argsort(rows.sum(1), kind="stable")]), axis=0)
    chain = chain[np.unique(np.linspace(0, len(chain) - 1, CANDIDATES).astype(int))]
    chain = chain if tuple(chain[-1]) == longest else np.concatenate([chain, [longest]])
    sizes = chain.sum(1)
    upto = np.cumsum(np.bincount(fitting(rows, chain), minlength=len(chain)))
    # (positions, buckets) of the rows up to each in the chain, which is the last bucket: first with it alone.
    best = [(int(rows * size), [j]) for j, (rows, size) in enumerate(zip(upto, sizes, strict=True))]
    found = best[-1]
    for _ in range(count - 1):
        after = lambda i, j: (best[i][0] + int((upto[j] - upto[i]) * sizes[j]), [*best[i][1], j])  # noqa: B023
        best = [min((after(i, j) for i in range(j)), default=best[j]) for j in range(len(chain))]
        if best[-1][0] > (1 - GAIN) * found[0]:
            break
        found = best[-1]
    return tuple(tuple(map(int, chain[j])) for j in found[1])


def explicit(value: Any, longest: Shape) -> tuple[Shape, ...]:
    """The buckets that a config lists, with ``longest`` as the last. Raises :class:`DataError` for what is no length."""
    shapes = [(x,) if isinstance(x, int) else tuple(x) for x in value] if isinstance(value, list | tuple) else []
    for shape in shapes:
        whole = len(shape) == len(longest) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
        if not whole or not all(0 < n <= most for n, most in zip(shape, longest, strict=True)):
            what = "lengths" if len(longest) == 1 else "pairs [max_length, max_target_length]"
            raise DataError(f"buckets: {shape!r} is not one; they are {what} up to {list(longest)}")
    if not shapes:
        raise DataError(f"buckets must be True, False or a list of lengths, got {value!r}")
    return tuple(sorted({*shapes, longest}, key=sum))


class Measured:
    """Lengths of a task's examples by index, found where they are first needed and kept: four bytes for each number.

    Zeros stand for an example that is left out.
    """

    def __init__(self, task: Task, prepare: Callable[[int], Example | None]):
        self._prepare = prepare
        self.found = np.full((len(task.source), len(task.longest)), UNKNOWN, np.int32)

    def add(self, index: int, example: Example | None) -> None:
        """Take the lengths of an example that was prepared elsewhere."""
        self.found[index] = 0 if example is None else lengths(example)

    def __call__(self, index: int) -> np.ndarray:
        if self.found[index, 0] == UNKNOWN:
            self.add(index, self._prepare(index))
        return self.found[index]

    @property
    def complete(self) -> bool:
        """Whether all are known."""
        return bool((self.found[:, 0] != UNKNOWN).all())

    def all(self) -> np.ndarray:
        """Those of all examples, ``[N, sides]``."""
        for index in np.flatnonzero(self.found[:, 0] == UNKNOWN):
            self(int(index))
        return self.found

    def sample(self, count: int) -> np.ndarray:
        """Those of at most ``count`` examples, evenly spaced, without any that is left out."""
        number = len(self.found)
        rows = np.unique(np.linspace(0, number - 1, min(count, number)).astype(np.int64))
        found = np.stack([self(int(i)) for i in rows])
        return found[found[:, 0] > 0]


class Bucketed(grain.MapDataset):
    """Examples in the order of ``keys`` within windows, each cropped to the bucket of its batch.

    keys: a Grain dataset of (task, index) for each position; the task None is ``blank``, a row that counts for nothing.
    seed: of the order of the batches of a window. blank: given in evaluation, where it takes the place of an example that is
    left out; in training another of the window does.
    """

    def __init__(
        self,
        keys: Any,
        prepare: Sequence[Callable[[int], Example | None]],
        measured: Sequence[Measured],
        buckets: Sequence[Shape],
        batch_size: int,
        seed: int,
        blank: Example | None = None,
    ):
        super().__init__(keys)
        self._prepare, self._measured, self._buckets = list(prepare), list(measured), np.asarray(buckets)
        self._batch, self._seed, self._blank = batch_size, seed, blank
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        # Neither goes to a worker process: a lock cannot, and windows are made again.
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_windows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._windows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        window, place = divmod(index, WINDOW * self._batch)
        order, fits = self._window(window)
        task, record = self._parent[window * WINDOW * self._batch + int(order[place])]
        example = None if task is None else self._prepare[task](record)
        if self._blank is not None:
            example = self._blank if example is None else {**example, "valid": np.bool_(True)}
        if example is None:
            raise DataError("a record that was left out has been drawn")
        return crop(example, tuple(self._buckets[fits[place // self._batch]].tolist()))

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """``(places in the window in their new order, bucket of each batch)``."""
        # Threads that read ahead wait for the one that measures a window, and do not measure it as well.
        with self._lock:
            if window not in self._windows:
                # The one before may still be in use by another thread.
                self._windows = {k: v for k, v in self._windows.items() if abs(k - window) == 1}
                self._windows[window] = self._arranged(window)
            return self._windows[window]

    def _arranged(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        start = window * WINDOW * self._batch
        keys = [self._parent[i] for i in range(start, min(start + WINDOW * self._batch, len(self)))]
        nothing = np.zeros(self._buckets.shape[1], np.int32)
        found = np.stack([nothing if task is None else self._measured[task](record) for task, record in keys])
        bucket = fitting(found, self._buckets)
        order: np.ndarray = np.arange(len(keys))
        if self._blank is None:
            kept = np.flatnonzero(found[:, 0])
            if not len(kept):
                raise DataError(f"none of {len(keys)} records in a row is kept; raise max_length, or look at too_long")
            # Again from the first where some are left out.
            order = np.resize(kept, len(keys))
        # Stable: within a bucket the order stays, so that two epochs do not mix.
        order = order[np.argsort(bucket[order], kind="stable")].reshape(-1, self._batch)
        # RandomState's stream is frozen by NumPy's compatibility policy; Generator's is not.
        random = np.random.RandomState(derived_seed(self._seed, "buckets", window))
        order = order[random.permutation(len(order))]
        return order.reshape(-1), bucket[order].max(1)
