"""Merging of checkpoints on disk, tensor by tensor, in bounded memory.

A tensor is read when its turn comes, its changes are formed in float32, merged, added to the base, rounded once and written to
its place in the output. Several threads do that side by side, and share a budget of memory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jft import tree
from jft.compiled import program_cache
from jft.merge import host
from jft.merge.in_memory import stack_axes
from jft.merge.output import Output
from jft.merge.rule import Pass, Rule, Tensor, ranked_before
from jft.merge.sources import Directory, Source, StatisticsFile

CHUNKS = (1 << 12, 1 << 16, 1 << 20)
"""Sizes of the pieces that elementwise rules are compiled for."""
BUDGET = 640 << 20
"""Bytes of tensors in memory at once; one that needs more is merged alone."""
KEPT = 96 << 20
"""Bytes that each thread keeps from one tensor to the next: fresh memory is as slow to touch as a file."""
Options = tuple[tuple[str, Any], ...]


class Part(NamedTuple):
    """A tensor of a source."""

    source: Source
    name: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the output: ``base + scale * rule(changes of the models)``; without a rule ``scale * base``.

    base: None where the models are merged themselves, as changes of zero. layer, layers: its position in its stack and the
    length of that; 0 and 0 outside.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rule: Rule | None
    base: Part | None
    models: tuple[Part, ...] = ()
    scale: float = 1.0
    layer: int = 0
    layers: int = 0
    statistics: tuple[StatisticsFile, ...] = ()

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is read."""
        return ((self.base,) if self.base else ()) + self.models

    @functools.cached_property
    def values(self) -> dict[str, list[float]]:
        """The parameters of the rule, one number per model."""
        return {} if self.rule is None else self.rule.values(len(self.models))

    @property
    def nbytes(self) -> int:
        """Memory that merging takes: base, changes and result in float32, again where XLA has all, scores, statistics."""
        times = 1
        if self.rule is not None and self.rule.coefficients is None and not self.rule.elementwise:
            times = 2 if ranked_before(self.rule.passes) is None and not self.statistics else 3
        return 4 * self.size * (len(self.models) + 2) * times


def run(
    jobs: Sequence[Job],
    output: Output,
    seed: int = 0,
    workers: int | None = None,
    done: Callable[[int], None] | None = None,
) -> None:
    """Merge what is missing in ``output``. done: called with the bytes read for every tensor that is written.

    Raises ``ValueError`` for rules that give one result per model, and where ranks of whole models differ between tensors.
    """
    _check(jobs)
    stream = _Stream(seed, workers or min(8, os.cpu_count() or 1))
    missing = output.missing

    def finish(job: Job) -> None:
        with stream.taken(job):
            output.write(job.name, stream.merged(job))
        if done is not None:
            done(sum(part.source.nbytes(part.name) for part in job.parts))

    with stream:
        stream.prepare(jobs)
        # Shard by shard, so that one is finished as early as may be.
        for _ in stream.each([job for job in jobs if job.name in missing], finish):
            pass


def _check(jobs: Sequence[Job]) -> None:
    rules = {id(job.rule): job.rule for job in jobs if job.rule is not None}
    if any(rule.each for rule in rules.values()):
        raise ValueError("this rule gives one result per model; merge task vectors in memory, with jft.merge")


class _Stream:
    """The threads, what they share, and what has to be known of all tensors before the first is merged."""

    def __init__(self, seed: int, workers: int):
        self.seed = seed
        self.pool = ThreadPoolExecutor(workers)
        # Of its own: a thread of a pool that waits for its own pool may wait for ever.
        self.pieces = ThreadPoolExecutor(workers)
        self.workers = workers
        self.free = threading.Condition()
        self.used = 0
        # What the passes found so far, of whole models.
        self.known: tuple[Any, ...] = ()
        self.local = threading.local()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        for pool in (self.pool, self.pieces):
            pool.shutdown(cancel_futures=True)

    def each(self, jobs: Sequence[Job], function: Callable[[Job], Any]) -> Iterator[Any]:
        """``function(job)`` of every job, in order, a few ahead of what is taken."""
        return self._ahead(self.pool, jobs, function)

    @functools.cached_property
    def key(self) -> jax.Array:
        """The key of random masks; sums need none, and then no device is looked for."""
        return jax.random.key(self.seed)

    def within(self, job: Job, items: Iterable[Any], function: Callable[[Any], Any]) -> Iterator[Any]:
        """``function(item)`` of every item in order, side by side where the tensor is large: it may have the memory alone."""
        return self._ahead(self.pieces, items, function) if job.size > CHUNKS[-1] else map(function, items)

    def _ahead(self, pool: ThreadPoolExecutor, items: Iterable[Any], function: Callable[[Any], Any]) -> Iterator[Any]:
        futures: collections.deque[Future] = collections.deque()
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > 2 * self.workers:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()

    @contextlib.contextmanager
    def taken(self, job: Job) -> Iterator[None]:
        """Memory for a job, as soon as there is enough."""
        with self.free:
            self.free.wait_for(lambda: self.used == 0 or self.used + job.nbytes <= BUDGET)
            self.used += job.nbytes
        try:
            yield
        finally:
            for part in job.parts:
                part.source.release(part.name)
            with self.free:
                self.used -= job.nbytes
                self.free.notify_all()

    def prepare(self, jobs: Sequence[Job]) -> None:
        """What is to be known of the whole model, where the rule needs it."""
        merged = [job for job in jobs if job.rule is not None and job.size]
        rule = next((job.rule for job in merged if job.rule is not None), None)
        for number, look in enumerate(rule.passes if rule is not None else ()):
            found = self._reduced(merged, number) if look.ranks is None else self._limits(merged, number)
            self.known = (*self.known, jax.tree.map(np.float32, found))

    def _reduced(self, jobs: Sequence[Job], number: int) -> Any:
        """The sum, or the maximum, over all tensors of what the pass finds in each."""

        def found(job: Job) -> Any:
            look = _pass(job, number)
            assert look.of is not None, "a pass without ranks has a function"
            reduce = np.sum if look.reduce == "sum" else np.max
            with self.taken(job):
                parts = [part for _, part in self._run(job, look.of, *self.changes(job))]
            return jax.tree.map(lambda *x: reduce(np.stack(x).astype(np.float64), axis=0), *parts)

        between = np.add if _pass(jobs[0], number).reduce == "sum" else np.maximum
        return functools.reduce(lambda a, b: jax.tree.map(between, a, b), self.each(jobs, found))

    def _limits(self, jobs: Sequence[Job], number: int) -> np.ndarray:
        """The values of the ranks of the pass among the entries of whole models."""
        size = sum(job.size for job in jobs)
        ranks = [_ranks(job, _pass(job, number).ranks, size) for job in jobs]
        for job, other in zip(jobs, ranks, strict=True):
            if not np.array_equal(other, ranks[0]):
                raise ValueError(
                    f"the rule trims the whole model at once, but its parameters differ at {job.name!r}; give numbers that are "
                    "the same everywhere, or scope='tensor'"
                )

        def visit(count: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Iterator[np.ndarray]:
            def counted(job: Job) -> np.ndarray:
                with self.taken(job):
                    return count(list(self._scores(job, number)))

            return self.each(jobs, counted)

        magnitudes = _pass(jobs[0], number).of is None
        return host.limits(visit, ranks[0], host.magnitude_order if magnitudes else host.order)

    def _scores(self, job: Job, number: int) -> np.ndarray:
        """What the entries of the whole model are ranked by: the changes, or the pass's score of them."""
        base, deltas = self.changes(job)
        function = _pass(job, number).of
        if function is None:
            return deltas
        parts = self._run(job, function, base, deltas, ranked=True)
        flat = [np.reshape(x, (len(deltas), -1))[:, : part.stop - part.start] for part, x in parts]
        return np.ascontiguousarray(np.concatenate(flat, axis=1))

    def changes(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """The base and the change of every model, flat float32, in memory that the thread's next tensor gets."""
        base, *deltas = rows = self._memory(1 + len(job.models), job.size)
        if job.base is None:
            base[...] = 0
        else:
            assert isinstance(job.base.source, Directory), "a base is a model directory"
            host.widen(job.base.source.array(job.base.name), base)

        def read(pair: tuple[Part, np.ndarray]) -> None:
            part, out = pair
            part.source.delta(part.name, base, out)

        for _ in self.within(job, zip(job.models, deltas, strict=True), read):
            pass
        return base, rows[1:]

    def _memory(self, rows: int, size: int) -> np.ndarray:
        count = rows * size
        if 4 * count > KEPT:
            return np.empty((rows, size), np.float32)
        if not hasattr(self.local, "kept"):
            self.local.kept = host.aligned(KEPT // 4)
        return self.local.kept[:count].reshape(rows, size)

    def merged(self, job: Job) -> np.ndarray:
        """The tensor of the output, flat."""
        rule = job.rule
        if rule is None and job.dtype.kind in "iub":
            assert job.base is not None, "integers are copied"
            assert isinstance(job.base.source, Directory), "a base is a model directory"
            return job.base.source.stored(job.base.name)
        out = np.empty(job.size, job.dtype)
        if not job.size:
            return out
        base, deltas = self.changes(job)
        if rule is None:
            host.add(base if job.scale == 1 else base * np.float32(job.scale), None, out)
        elif rule.coefficients is not None:
            coefficients = [job.scale * float(c) for c in rule.coefficients(job.values)]
            for part in host.blocks(job.size):
                # The base itself is a term where it has a coefficient.
                terms = [*deltas[:, part], *([base[part]] if len(coefficients) > len(deltas) else [])]
                host.add(base[part], host.combined(terms, coefficients), out[part])
        else:
            for part, delta in self._run(job, rule.merge, base, deltas, job.scale):
                host.add(base[part], np.asarray(delta).reshape(-1)[: base[part].size], out[part])
        return out

    def _run(
        self,
        job: Job,
        function: Callable[..., Any],
        base: np.ndarray,
        deltas: np.ndarray,
        scale: float = 1.0,
        ranked: bool = False,
    ) -> Iterator[tuple[slice, Any]]:
        """``scale * function(tensor)`` of the tensor, or of its pieces where the rule is elementwise.

        ranked: whether the function is what the next pass ranks.
        """
        rule = job.rule
        assert rule is not None
        if any(one.pieces.get(job.name) for one in job.statistics):
            return self._in_pieces(job, function, deltas, scale)
        score = None if ranked else ranked_before(rule.passes[: len(self.known)])
        ranks = None if rule.ranks is None else _ranks(job, rule.ranks, rule.entries(job.shape))
        thresholds = [x for look, x in zip(rule.passes, self.known, strict=False) if look.of is None]
        limits, ends = thresholds[-1] if thresholds else None, None
        # Ranks along an axis are counted in the program.
        if ranks is not None and (rule.axis is None or len(job.shape) < 2):
            cuts = list(self.within(job, zip(deltas, ranks, strict=True), lambda pair: host.cuts(*pair)))
            limits = np.asarray([[cut.limit for cut in row] for row in cuts], np.float32)
            ends = np.asarray([[cut.end for cut in row] for row in cuts])
        options = tuple(sorted(rule.options.items()))
        program = _program(function, options)
        ranked_by = None if score is None else rule.passes[score].of
        ranking = None if ranked_by is None else _program(ranked_by, options)
        common: dict[str, Any] = {
            "parameters": {n: np.asarray(v, np.float32) for n, v in job.values.items()},
            "ranks": None if ranks is None else ranks.astype(np.uint32),
            "thresholds": limits,
            "passes": self.known,
            "key": jax.random.fold_in(tree.key_for(self.key, job.name), 0),
            "layer": np.int32(job.layer),
            "layers": np.int32(job.layers),
        }

        def piece(part: slice) -> tuple[slice, Any]:
            changes, origin = deltas[:, part], base[None, part]
            shape: tuple[int, ...] = job.shape
            if rule.elementwise:
                shape = (next(n for n in CHUNKS if n >= changes.shape[1]),)
                changes = self._piece("deltas", changes, *shape)
                origin = self._piece("base", origin, *shape) if rule.base else origin
            tensor = Tensor(
                # Not copied where it is aligned, and not needed any more once the result is there.
                deltas=jax.device_put(changes.reshape(-1, *shape), may_alias=True),
                base=jax.device_put(origin.reshape(shape), may_alias=True) if rule.base else None,
                ends=None
                if ends is None
                else jax.device_put(np.clip(ends - part.start, 0, math.prod(shape)).astype(np.uint32)),
                **common,
            )
            if ranking is not None and score is not None:
                # By the program that ranked them, of what it knew.
                scores = ranking(tensor._replace(passes=self.known[:score]), np.float32(1))
                tensor = tensor._replace(scores=scores)
            return part, jax.device_get(program(tensor, np.float32(scale)))

        return self.within(job, host.blocks(job.size, CHUNKS[-1]) if rule.elementwise else (slice(0, job.size),), piece)

    def _in_pieces(
        self, job: Job, function: Callable[..., Any], deltas: np.ndarray, scale: float
    ) -> Iterator[tuple[slice, Any]]:
        """The same with statistics, which are of matrices as jft has them; what is of none is merged without."""
        rule, pieces = job.rule, job.statistics[0].pieces[job.name]
        assert rule is not None and not rule.base, "rules with statistics do not read the base"
        program = _program(function, tuple(sorted(rule.options.items())))
        common: dict[str, Any] = {
            "base": None,
            "parameters": {n: np.asarray(v, np.float32) for n, v in job.values.items()},
            "ranks": None,
            "thresholds": None,
            "passes": self.known,
            "key": jax.random.fold_in(tree.key_for(self.key, job.name), 0),
            "layer": np.int32(job.layer),
            "layers": np.int32(job.layers),
        }

        def run(deltas: np.ndarray, statistics: Any) -> Any:
            tensor = Tensor(deltas=jax.device_put(deltas), statistics=statistics, **common)
            return jax.device_get(program(tensor, np.float32(scale)))

        merging, whole = function is rule.merge, slice(0, job.size)
        covered = sum(math.prod(piece.shape) for piece in pieces) == job.size
        out = np.empty(job.size, np.float32)
        if merging and not covered:
            out[:] = run(deltas.reshape(-1, *job.shape), None).reshape(-1)
        for piece in pieces:
            changes = np.stack([piece.read(delta) for delta in deltas])
            found = jax.tree.map(lambda *x: np.stack(x), *(one.of(piece) for one in job.statistics))
            # Experts that the checkpoint has in one tensor are merged one by one.
            apart = stack_axes(piece.leaf.path, len(piece.leaf.shape)) - len(piece.position)
            results = np.empty(piece.shape, np.float32)
            for index in np.ndindex(*piece.shape[:apart]):
                one = (slice(None), *index)
                result = run(changes[one], jax.tree.map(lambda x, one=one: x[one], found))
                if merging:
                    results[index] = result
                else:
                    yield whole, result
            if merging:
                piece.write(results, out)
        if merging:
            yield whole, out

    def _piece(self, name: str, x: np.ndarray, size: int) -> np.ndarray:
        """``x`` ``[N, n]`` padded with zeros to ``size``, in memory of this thread."""
        buffer = getattr(self.local, name, None)
        if buffer is None or len(buffer) < len(x) * size:
            buffer = host.aligned(len(x) * size)
            setattr(self.local, name, buffer)
        piece = buffer[: len(x) * size].reshape(len(x), size)
        piece[:, : x.shape[1]] = x
        piece[:, x.shape[1] :] = 0
        return piece


@program_cache(maxsize=256)
def _program(function: Callable[..., Any], options: Options) -> Callable[[Tensor, Any], Any]:
    return jax.jit(lambda tensor, scale: jax.tree.map(lambda x: scale * x, function(tensor, **dict(options))))


def _ranks(job: Job, ranks: Callable[..., np.ndarray] | None, size: int) -> np.ndarray:
    assert ranks is not None
    return np.asarray(ranks(size, {name: np.asarray(v, np.float64) for name, v in job.values.items()}), np.int64)


def _pass(job: Job, number: int) -> Pass:
    assert job.rule is not None
    return job.rule.passes[number]
