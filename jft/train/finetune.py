"""`finetune`: the training loop, from a base to a task vector. It reads from top to bottom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jft import parallel
from jft.compiled import forget_if_crowded
from jft.methods import Method
from jft.train import reselection
from jft.train.feed import Streams, global_shapes
from jft.train.members import Fleet, Members, listed, member
from jft.train.metrics import Logging
from jft.train.objectives import Objective
from jft.train.preemption import Preempted, Watch
from jft.train.profile import Profile
from jft.train.report import Report
from jft.train.run_config import Profiling, RunConfig, options
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
    steps: int,
    method: str | Mapping[str, Any] | Method = "full",
    optimizer: str | Mapping[str, Any] | Optimizer | optax.GradientTransformation | None = None,
    objective: str | Mapping[str, Any] | Objective | None = None,
    mesh: Mesh | None = None,
    eval_data: Iterable | None = None,
    eval_every: int = 0,
    eval_batches: int = 0,
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
) -> Run:
    """Fine-tune ``params`` for ``steps`` updates on ``data``.

    model: a jft model, or any pure ``apply(params, batch) -> outputs``. data: an endless loader of host batches, or a list
    of batches, gone through again and again; with several processes, each gives its own rows.
    method: a name, ``{"name": ..., **options}`` or a Method. optimizer: a name, options or any optax transformation
    (:mod:`jft.train.optimizers`; default AdamW). objective: a name or an Objective; default by what the batches hold.
    mesh: default that of the parameters, else one device (all, with several processes). eval_data is gone through every
    ``eval_every`` steps (0: at the end), its first ``eval_batches`` (0: all). accumulate: microbatches per batch; the
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

    Raises :class:`NonFiniteError` with the last good state saved, :class:`Preempted` when asked to stop,
    :class:`jft.parallel.MemoryBudgetError` where it would not fit, ``Changed`` where the workdir holds another run.
    """
    # What to do.
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
    streams = Streams(members)
    # The objective follows from the fields of a batch; it is peeked at, so training still begins with it.
    config = config.filled(params, streams.feed(0).peek())
    workdir = None if workdir is None else Path(workdir)

    # What trains: by name, or as the run that is taken up says, or found now from the base and the first batches.
    trains = reselection.find(config, members, streams, params, workdir)

    # How it lies on the devices, and whether it fits, before anything is allocated.
    update = members.compile_step(trains.recipe, params, trains.chosen, config.mesh, streams.differ)
    batch = global_shapes(streams.peek(), axis=int(streams.differ))
    # A schedule starts every new selection from the base, which donation would overwrite.
    donate = donate and members[0].method.schedule is None
    remedies = members.remedies(update, params, trains.chosen, batch, model)
    budget = parallel.device_budget(update.layout.device)
    memory = parallel.check(update.memory(batch, params, donate), budget, remedies)
    # After the check of memory, which took shapes alone. No copy where they lie so already.
    params = jax.device_put(params, update.layout.params)

    # The state: from the newest checkpoint, or from the start.
    training = Training(config, members, streams, trains, update, params)
    begin = training.begin(workdir, checkpoint, trains.decided, donate)

    # What the user sees, the loop, and what came of it.
    report = Report(training, begin, memory, batch, tokenizer)
    with contextlib.ExitStack() as stack:
        # Closed in the reverse order: checkpoints first, which wait for the last write.
        for closing in (report, streams, *([training.checkpoints] if training.checkpoints else [])):
            stack.callback(closing.close)
        trace = None
        if config.profile.steps and workdir is not None:
            trace = Profile(config.profile, training, report, begin, workdir / "profile")
            # Also on an error or interrupt: the trace of the steps so far is whole.
            stack.callback(trace.close)
        # Without checkpoints nothing can be saved, and a signal is best left to end the run.
        watch = stack.enter_context(Watch()) if training.checkpoints else None
        scores = _loop(training, report, watch, trace, begin)
    # After the stack has closed, so that metrics are on disk before the task vector that ends the run.
    runs = [training.result(i, scores[i], report.rows(i)) for i in range(len(members))]
    if watch is not None:
        # The signal came after the last step, where there was nothing left to stop.
        watch.pass_on()
    return runs if members.stacked else runs[0]  # type: ignore[return-value]


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
        report.evaluation(done, scores, time.perf_counter() - since)
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
                raise ValueError(f"{error}; the state after step {n} is saved in {checkpoints.directory}") from error
            # On the host: a schedule is then no part of the compiled program.
            rates = [m.optimizer.rate(n, config.steps) for m in training.members]
            metrics = training.step(batch, rates)
        report.queue(first)
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
    # A finished run that is started again has had no step at which evaluation was due.
    if begin == config.steps and has_evaluation:
        scores = evaluate(begin)
    if checkpoints is not None and checkpoints.options.best:
        scores = training.restore_best()
        report.say(f"the best by {checkpoints.options.best} is that of step {int(training.held.state.step)}")
    return scores
