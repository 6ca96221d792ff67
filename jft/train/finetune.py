"""`finetune`: the training loop, from a base to a task vector. It reads from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jft import parallel, tree
from jft.compiled import forget_if_crowded
from jft.methods import Method
from jft.train import digests, lock, model_check, reselection, step
from jft.train.callbacks import Callback
from jft.train.feed import Streams, global_shapes
from jft.train.members import Fleet, Members, listed, member
from jft.train.metrics import Logging
from jft.train.objectives import Objective
from jft.train.preemption import Preempted, Watch
from jft.train.profile import Profile
from jft.train.report import Report, expense, introduction
from jft.train.run_config import Profiling, RunConfig, options
from jft.train.samples import Samples
from jft.train.training import Pending, Run, Training

if TYPE_CHECKING:
    import optax
    from jax.sharding import Mesh
    from jax.typing import DTypeLike

    from jft.train.checkpoints import Checkpointing
    from jft.train.optimizers import Optimizer


def finetune(
    model: Any,
    params: Any,
    data: Iterable | None,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    method: str | Mapping[str, Any] | Method = "full",
    optimizer: str | Mapping[str, Any] | Optimizer | optax.GradientTransformation | None = None,
    objective: str | Mapping[str, Any] | Objective | None = None,
    mesh: Mesh | None = None,
    eval_data: Iterable | None = None,
    eval_every: int = 0,
    eval_batches: int = 0,
    samples: Mapping[str, Any] | Samples | None = None,
    accumulate: int = 1,
    dtype: DTypeLike | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    checkpoint: int | Mapping[str, Any] | Checkpointing | None = None,
    log: int | Mapping[str, Any] | Logging | None = None,
    profile: int | Mapping[str, Any] | Profiling | None = None,
    tokenizer: Any = None,
    manifest: Mapping[str, Any] | None = None,
    donate: bool = False,
    fleet: Sequence[Mapping[str, Any]] | None = None,
    callbacks: Sequence[Callback] = (),
    dry_run: bool = False,
) -> Run:
    """Fine-tune ``params`` for ``steps`` updates on ``data``, or for so many ``epochs``: passes over a jft loader or a list.

    model: a jft model, or any pure ``apply(params, batch) -> outputs``. data: an endless loader of host batches, or a list
    of batches, gone through again and again; with several processes, each gives its own rows.
    method: a name, ``{"name": ..., **options}`` or a Method. optimizer: a name, options or any optax transformation
    (:mod:`jft.train.optimizers`; default AdamW). objective: a name or an Objective; default by what the batches hold.
    mesh: default that of the parameters, else one device (all, with several processes). eval_data is gone through every
    ``eval_every`` steps (0: at the end), its first ``eval_batches`` (0: all). samples: of a decoder, what is generated at each
    evaluation (:class:`jft.train.samples.Samples`, or a dict of its options). accumulate: microbatches per batch; the
    gradient is the same for any.
    dtype: of trained values in the forward pass (masters stay float32); default the model's execution dtype, or that of
    ``params`` where they have one.
    workdir: where metrics, checkpoints and the task vector go; a run found there is taken up where it stood.
    checkpoint, log: see :class:`Checkpointing` and :class:`Logging` (an object, a dict, or a number for ``every``).
    profile: steps to write a jax.profiler trace of into ``workdir/profile``, see :class:`Profiling` (or a number of steps).
    manifest: written into checkpoints and task vector; what stands under ``data`` must not change on resuming, what stands
    under ``config`` goes to ``config.json`` once the run may start.
    donate: the run may take over the memory of ``params``, which cannot be used afterwards; methods that train parts of
    weights in place then need no second copy of them. Those that select anew during the run need the base, and copy it.
    fleet: members, trained side by side over the one base, each a dict of what it has of its own: ``data``, ``eval_data``,
    ``seed``, ``lr`` or ``optimizer`` (lr, schedule, warmup, end), ``method`` (options that change what it selects),
    ``params`` (weights in place of the base's), ``manifest``, ``name``. All else holds for all. Then a *list* of runs
    comes back, each that of the member by itself to rounding, and ``workdir`` has a folder for each. A member whose loss is
    not finite stays at its last good state, and its :attr:`Run.error` says so; the others go on (:mod:`jft.train.members`).

    callbacks: functions of each row of metrics, of which any may end the run early (:mod:`jft.train.callbacks`).
    dry_run: everything up to the first step: print what the run would be, write nothing, and return None.

    Raises :class:`NonFiniteError` with the last good state saved, :class:`Preempted` when asked to stop,
    :class:`jft.parallel.MemoryBudgetError` where it would not fit, ``Changed`` where the workdir holds another run,
    :class:`FinishedError` where it holds the result of this one and no checkpoint.
    """
    # What to do.
    model_check.check(model, params)
    steps = _steps(steps, epochs, [data] if fleet is None else [one.get("data", data) for one in fleet])
    config = RunConfig(
        model,
        steps,
        objective,
        mesh,
        dtype,
        accumulate,
        eval_every,
        eval_batches,
        options(Logging, log),
        options(Profiling, profile),
        dataclasses.replace(options(Samples, samples), tokenizer=tokenizer) if samples else None,
    )
    if config.profile.steps and workdir is None:
        raise ValueError("profile is given, but no workdir to write to")
    # One run goes the way of a fleet's member without a name, so that there is one loop.
    shared = {"data": data, "eval_data": eval_data, "seed": seed, "optimizer": optimizer, "method": method}
    shared |= {"manifest": manifest, "workdir": workdir}
    if fleet is None:
        members = Members([member("", {"workdir": workdir}, shared, params)])
    else:
        members = Fleet(listed(fleet, shared, params))
    # A process of very many runs would end for want of memory maps.
    forget_if_crowded()
    # Before data is opened, whose loaders start threads.
    members.check(config)
    workdir = None if workdir is None else Path(workdir)
    _agree(config, members, params, workdir, checkpoint, dry_run)
    further = (checkpoint, tokenizer, donate, callbacks, dry_run)
    if workdir is None or dry_run:
        return _train(config, members, params, workdir, None, *further)
    # One run at a time, of which the first process holds the lock for all.
    with lock.of_all(workdir), Watch() as watch:
        return _train(config, members, params, workdir, watch, *further)


def _train(
    config: RunConfig,
    members: Members,
    params: Any,
    workdir: Path | None,
    watch: Watch | None,
    checkpoint: Any,
    tokenizer: Any,
    donate: bool,
    callbacks: Sequence[Callback],
    dry_run: bool,
) -> Any:
    """:func:`finetune` with its arguments checked, alone in its workdir."""
    # Of a run before this one.
    parallel.saves(None)
    # Before anything looks for the newest checkpoint.
    folder = None if workdir is None or dry_run else workdir / "checkpoints"
    notes = digests.set_aside(folder) if folder is not None and jax.process_index() == 0 else []
    # Nobody looks for the newest checkpoint before the damaged ones are out of the way.
    parallel.exchange("checkpoints verified", None)
    streams = Streams(members, config.model)
    # What is wrong with the first batches is found now; peeked at, so training still begins with them.
    streams.peek()
    # The objective follows from the fields of a batch.
    config = config.filled(params, streams.feed(0).largest())
    streams.check_labels(model_check.classes(config.model, params, streams.feed(0).peek(), config.objective))
    if jax.process_count() > 1:
        shapes = tree.flatten(streams.feed(0).largest(known=False))
        parallel.agree("batch", {f"batch.{path}": f"{x.shape} {x.dtype} a process" for path, x in shapes.items()})

    # What trains: by name, or as the run that is taken up says, or found now from the base and the first batches.
    trains = reselection.find(config, members, streams, params, workdir)

    # How it lies on the devices, and whether it fits, before anything is allocated.
    update = members.compile_step(trains.recipe, params, trains.chosen, config.mesh, streams.differ)
    # The largest, since a run must fit to its end.
    batch = global_shapes(streams.largest(), axis=int(streams.differ))
    # A schedule starts every new selection from the base, which donation would overwrite.
    donate = donate and members[0].method.schedule is None
    remedies = members.remedies(update, params, trains.chosen, batch, config.model)
    budget = parallel.device_budget(update.layout.device)
    memory = parallel.check(update.memory(batch, params, donate), budget, remedies)
    if dry_run:
        with contextlib.closing(streams):
            times = 1 if streams.differ else len(members)
            costs = expense(memory, step.work(update, batch, params, times), batch)
            for line in introduction(config, members, update, streams, params, costs, tokenizer):
                print(line)
            return None  # type: ignore[return-value]  # as said
    # After the check of memory, which took shapes alone. No copy where they lie so already.
    params = jax.device_put(params, update.layout.params)

    # The state: from the newest checkpoint, or from the start.
    training = Training(config, members, streams, trains, update, params)
    begin = training.begin(workdir, checkpoint, trains.decided, donate)
    parallel.saves(training.checkpoints.saved if training.checkpoints else None)

    # What the user sees, the loop, and what came of it.
    report = Report(training, begin, memory, batch, tokenizer, callbacks)
    for note in [*notes, *training.notes]:
        report.say(note)
    with contextlib.ExitStack() as stack:
        # Closed in the reverse order: checkpoints first, which wait for the last write.
        for closing in (report, streams, *([training.checkpoints] if training.checkpoints else [])):
            stack.callback(closing.close)
        trace = None
        if config.profile.steps and workdir is not None:
            trace = Profile(config.profile, training, report, begin, workdir / "profile")
            # Also on an error or interrupt: the trace of the steps so far is whole.
            stack.callback(trace.close)
        # Without a workdir nothing can be saved, and a signal is best left to end the run.
        if watch is not None:
            watch.begin()
        scores = _loop(training, report, watch, trace, begin)
    # After the stack has closed, so that metrics are on disk before the task vector that ends the run.
    runs = [training.result(i, scores[i], report.rows(i)) for i in range(len(members))]
    for error in report.errors:
        print(error, file=sys.stderr)
    if watch is not None and watch.noted:
        # It came while the result was written; a caller with more to do must not go on.
        raise Preempted(config.steps, finished=True)
    return runs if members.stacked else runs[0]  # type: ignore[return-value]


def _agree(
    config: RunConfig, members: Members, params: Any, workdir: Path | None, checkpoint: Any, dry_run: bool
) -> None:
    """Refuse processes that would compile other programs, or go through them in another way."""
    if jax.process_count() == 1:
        return
    each = {
        m.name or "run": {
            **{"seed": m.seed, "method": m.method, "optimizer": m.optimizer},
            "content of data": getattr(m.data, "fingerprint", None),
        }
        for m in members
    }
    leaves = {path: f"{x.shape} {x.dtype} {_sample(x)}" for path, x in tree.flatten(params).items()}
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "model"}
    settings |= {"model": getattr(config.model, "config", config.model), "samples": config.samples is not None}
    settings |= {"mesh": config.mesh and dict(config.mesh.shape), "workdir": workdir, "checkpoint": checkpoint}
    parallel.agree("settings", {**settings, "dry_run": dry_run, **each, "params": leaves, **parallel.environment()})


def _sample(x: Any) -> str:
    """A checksum of values of an array, where this process has all of them."""
    if not tree.visible(x):
        return ""
    values = tree.host(x).reshape(-1)
    return f"{zlib.crc32(values[:: max(1, values.size >> 16)].tobytes()):08x}"


def _steps(steps: int | None, epochs: float | None, data: Sequence[Any]) -> int:
    """Updates of a run, from exactly one of ``steps`` and ``epochs`` of the data of its members."""
    if steps is not None and epochs is None:
        return steps
    if steps is not None or epochs is None:
        raise ValueError(f"give exactly one of steps and epochs; steps is {steps} and epochs {epochs}")
    if epochs <= 0:
        raise ValueError(f"epochs is {epochs}; it must be above 0")
    for x in data:
        if not hasattr(x, "epoch") and not isinstance(x, Sequence):
            kind = type(x).__name__
            raise ValueError(f"data is a {kind}, of which nothing tells how long a pass is; give steps, not epochs")
    each = [float(x.epoch) if hasattr(x, "epoch") else len(x) for x in data]
    # Rounded up, so that all is seen; rounded first, as 0.1 * 30 is more than 3.
    counts = {math.ceil(round(epochs * one, 6)) for one in each}
    if len(counts) > 1:
        raise ValueError(f"{epochs:g} epochs are {sorted(counts)} steps for the members of the fleet; give steps")
    return counts.pop()


def _loop(
    training: Training, report: Report, watch: Watch | None, trace: Profile | None, begin: int
) -> list[dict[str, float]]:
    """All steps from ``begin``, for all members; the evaluation of the state that each ends with.

    Metrics are fetched one step late, so that the next step is queued before the host waits for this one.
    """
    config, streams, checkpoints = training.config, training.streams, training.checkpoints
    has_evaluation = any(m.eval_data is not None for m in training.members)
    scores: list[dict[str, float]] = [{} for _ in training.members]
    pending: Pending | None = None

    def fetch(pending: Pending) -> None:
        # First: where no member is left it raises, and the bad row is not logged.
        for error in training.check(pending):
            report.say(str(error))
        report.train(pending)

    def evaluate(done: int) -> list[dict[str, float]]:
        since = time.perf_counter()
        scores = training.evaluate()
        texts = training.texts(done)
        report.evaluation(done, scores, time.perf_counter() - since)
        for line in texts:
            report.say(line)
        return scores

    for n in range(begin, config.steps):
        # Before the batch is taken: a score looks at the batches that come next.
        training.reselect(n)
        done = n + 1
        evaluates = has_evaluation and config.evaluates(done)
        saves = checkpoints is not None and checkpoints.due(done, config.steps)
        waits = evaluates or saves or done == config.steps
        # The host will wait for this step: were the last one fetched after it, one would take no time and the other twice.
        if waits and pending is not None:
            fetch(pending)
            pending = None
        # Of before the batch, for a checkpoint of the state without it.
        positions = streams.positions()
        with trace.step(n) if trace else contextlib.nullcontext():
            try:
                first, batch = streams.next(n, config.objective)
            except ValueError as error:
                if pending is not None:
                    fetch(pending)
                # One process cannot save alone, and the others do not know of its data.
                if checkpoints is None or jax.process_count() > 1:
                    raise
                training.save(n, positions)
                raise ValueError(
                    f"{error}; the state after step {n} is saved in {checkpoints.directory}: mend the data, or the settings of "
                    "data, and go on from there with checkpoint.accept=True"
                ) from error
            # On the host: a schedule is then no part of the compiled program.
            rates = [m.optimizer.rate(n, config.steps) for m in training.members]
            metrics = training.step(batch, rates)
        report.queue(first)
        if checkpoints is not None:
            checkpoints.check()
        if pending is not None:
            fetch(pending)
        pending = Pending(done, metrics, rates, positions)

        # `reached` is called at every step, since with several processes it is a point where they agree.
        stops = watch is not None and watch.reached(done) and done < config.steps
        if waits or stops:
            fetch(pending)
            pending = None
        if evaluates:
            scores = evaluate(done)
        if saves or stops:
            # Scores of an earlier state would make this checkpoint the best for them.
            training.save(done, streams.positions(), scores if evaluates else None)
        if stops:
            preemption = Preempted(done)
            report.say(str(preemption))
            raise preemption
        if report.stopped and done < config.steps:
            if pending is not None:
                fetch(pending)
            if has_evaluation and not evaluates:
                scores = evaluate(done)
            if checkpoints is not None and not saves:
                training.save(done, streams.positions(), scores if has_evaluation else None)
            report.say(f"a callback ended the run after step {done}")
            break
    # A finished run that is started again has had no step at which evaluation was due.
    if begin == config.steps and has_evaluation:
        scores = evaluate(begin)
    if watch is not None and watch.noted:
        # The signal came during the last step or its evaluation.
        training.save(config.steps, streams.positions(), scores if has_evaluation else None)
        preemption = Preempted(config.steps)
        report.say(str(preemption))
        raise preemption
    if checkpoints is not None and checkpoints.options.best:
        scores = training.restore_best()
        report.say(f"the best by {checkpoints.options.best} is that of step {int(training.held.state.step)}")
    return scores
