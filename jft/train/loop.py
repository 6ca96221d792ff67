"""`finetune`: the training loop, from a base to a task vector. It reads from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import delta, tree
from jft.methods import Method
from jft.train import evaluation as evaluations
from jft.train import feed, identity, overview, preflight, selection, settling, setup, step
from jft.train import fleet as fleets
from jft.train.asked import Asked, find_method
from jft.train.metrics import Metrics
from jft.train.objectives import Objective
from jft.train.optimizers import Given
from jft.train.optimizers import optimizer as find_optimizer
from jft.train.preemption import Preempted, Watch
from jft.train.progress import Meter, Progress
from jft.train.run import NonFiniteError, Pending, Run, keep
from jft.train.state import Holdings, State


def finetune(
    model: Any,
    params: Any,
    data: Iterable | None,
    *,
    steps: int,
    method: str | Mapping | Method = "full",
    optimizer: Any = None,
    objective: str | Mapping | Objective | None = None,
    mesh: Any = None,
    eval_data: Iterable | None = None,
    eval_every: int = 0,
    eval_batches: int = 0,
    accumulate: int = 1,
    dtype: Any = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    checkpoint: Any = None,
    log: Any = None,
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
    manifest: said of the run in its checkpoints and task vector; what stands under ``data`` must not change on resuming,
    what stands under ``config`` goes to ``config.json`` once the run may start.
    donate: the run may take over the memory of ``params``, which cannot be used afterwards; methods that train parts of
    weights in place then need no second copy of them. Those that select anew during the run need the base, and copy it.
    fleet: members, trained side by side over the one base, each a dict of what it has of its own: ``data``, ``eval_data``,
    ``seed``, ``lr`` or ``optimizer`` (lr, schedule, warmup, end), ``method`` (options that change what it selects),
    ``params`` (weights in place of the base's), ``manifest``, ``name``. All else is said for all. Then a *list* of runs
    comes back, each that of the member by itself to rounding, and ``workdir`` has a folder for each (:mod:`jft.train.fleet`).

    Raises :class:`NonFiniteError` with the last good state saved, :class:`Preempted` when asked to stop,
    :class:`jft.parallel.MemoryBudgetError` where it would not fit, ``Changed`` where the workdir holds another run.
    """
    asked = Asked(**locals())  # nothing else is local yet
    return _train(asked) if fleet is None else fleets.train(asked)  # type: ignore[return-value]  # a list, of a fleet


def _train(asked: Asked) -> Run:
    # What to do.
    model, params, steps, seed, workdir = asked.model, asked.params, asked.steps, asked.seed, asked.workdir
    method = find_method(asked.method)
    chosen = find_optimizer(asked.optimizer)
    said = identity.said_of_run(asked.manifest)
    asked.check_evaluation(asked.eval_data)
    if asked.data is None:
        raise ValueError("data is None; only a fleet whose members have their own needs none")
    stream = feed.Feed(asked.data)
    asked = asked.filled(stream.peek())
    which, mesh, dtype = asked.objective, asked.mesh, asked.dtype
    apply = step.apply_of(model, mesh)
    donate = asked.donate and method.schedule is None

    # What trains: by name, or as the run that is taken up says, or found now from the base and the first batches.
    before = selection.saved(workdir)
    # The newest state is that of the update before: what is due at its step is still to come.
    plan = selection.method_at(method, max(before.step - 1, 0), steps).plan(params, model)
    decayed = chosen.decayed(tree.flatten(params))
    recipe = step.Recipe(apply, plan, which, chosen.unscheduled(), asked.accumulate, dtype, decayed)
    look = functools.partial(
        selection.probe_of,
        recipe,
        model,
        stream=stream,
        mesh=mesh,
        seed=seed,
        optimizer=asked.optimizer,
        eval_data=asked.eval_data,
        eval_batches=asked.eval_batches,
    )
    decided = before.decided
    if method.undecided:
        decided = decided or dict(method.undecided(look(params)))
        plan = method.decided(decided).plan(params, model)
    parts = before.chosen
    if plan.selects and not parts:
        parts = selection.begin(plan, look(params), selection.grids(plan, params, mesh))
    recipe = dataclasses.replace(recipe, plan=plan.anchored() if chosen.to_base else plan)

    # How it lies on the devices, and whether it fits, before anything is allocated.
    update = setup.compile_step(recipe, params, parts, mesh, seed)
    layout = update.layout
    first = preflight.global_shapes(stream.peek())
    memory = preflight.check(update, first, model, params, donate)
    params = jax.device_put(params, layout.params)

    # The state: from the newest checkpoint, or from the start.
    base = delta.describe_base(params)
    started = identity.of_run(method, chosen, which, update.holdings.state, first, dtype, seed)
    itself = {"base": base["fingerprint"], "data": said.get("data"), **started}
    checkpoints = asked.checkpoints(itself, decided)
    begin = asked.begin(checkpoints)
    settled: settling.Settled = {}
    if begin and checkpoints:
        state, position = checkpoints.restore(update.holdings.state)
        settled = checkpoints.settled()
        held = setup.take_up(update, params, state, settled, seed, donate)
        stream.seek(position)
        del state
    else:
        identity.keep(workdir, itself)
        held = selection.measured(update, setup.hold(update, params, parts, seed, donate), look, params)

    # What the user sees.
    primary = jax.process_index() == 0
    first_example = overview.example(stream.peek(), which, asked.tokenizer)
    # Not before: a start that was refused leaves the config of the run that is there.
    identity.keep_config(workdir, said)
    metrics = Metrics(workdir, begin, asked.log.tensorboard, asked.log.wandb, primary)
    progress = Progress(steps, begin, asked.log.progress and primary)
    work = preflight.work(update, first, params)
    meter = Meter(work)
    progress.say(overview.text(overview.rows(params, held.state.trained, layout.params if mesh is not None else None)))
    progress.say(f"method {overview.describe(plan)}; step takes {memory}; FLOPs by {work.source}")
    if first_example:
        progress.say(first_example)
    if "classifier/w" in plan.paths and "classifier/w" not in plan.leaves:
        progress.say("the classifier stays as it is, which suits a fixed head; also='^classifier/' trains it")
    if begin:
        progress.say(f"resumed after step {begin}")

    def log_train(pending: Pending) -> None:
        """Metrics of a step that was given to the devices before; stops the run where they are not finite."""
        if not bool(pending.metrics["sound"]):
            _stop(pending, held.state, checkpoints, settled)
        if pending.step % asked.log.every and pending.step != steps:
            return
        values = {k: float(v) for k, v in jax.device_get(pending.metrics).items() if k != "sound"}
        rates = {} if isinstance(chosen, Given) else {"lr": pending.rate}
        values |= rates | meter.read()
        metrics.write(pending.step, "train", values)
        progress.show(pending.step, "train", values)

    evaluation: dict[str, float] = {}

    def run_evaluation(done: int) -> dict[str, float]:
        since = time.perf_counter()
        score = evaluations.sums(apply, which, update.recipe.plan, dtype)
        result = evaluations.mean(
            score, (_kept(update, held), held.state.trained), asked.eval_data, which, mesh, asked.eval_batches
        )
        meter.pause(time.perf_counter() - since)
        metrics.write(done, "eval", result)
        progress.show(done, "eval", result)
        return result

    # The loop. Metrics are fetched one step late, so that the next step is queued before the host waits for this one.
    pending: Pending | None = None
    sound: Any = np.asarray(True)
    with contextlib.ExitStack() as stack:
        for closing in (metrics, progress, stream, *([checkpoints] if checkpoints else [])):
            stack.callback(closing.close)
        watch = stack.enter_context(Watch()) if checkpoints else None
        for n in range(begin, steps):
            if method.schedule and n > 0 and method.schedule.due(n, steps):
                update, held, settled = selection.renew(update, held, params, settled, look, n, steps, seed)
                if checkpoints:
                    now = identity.of_run(method, chosen, which, update.holdings.state, first, dtype, seed)
                    checkpoints.renewed(now, selection.decided(update.recipe.plan))
            position = stream.position()
            try:
                batch = stream.next(n, which)
            except ValueError as error:
                if pending is not None:
                    log_train(pending)
                # One process cannot save alone, and the others do not know of its data.
                if checkpoints is None or jax.process_count() > 1:
                    raise
                checkpoints.save(held.state, n, position, settled=settled)
                raise ValueError(f"{error}; the state after step {n} is saved in {checkpoints.directory}") from error
            rate = chosen.rate(n, steps)
            held, out = update(held, feed.put(batch, layout), np.asarray(rate, np.float32), sound)
            sound = out["sound"]
            meter.add(feed.rows(batch) * jax.process_count(), feed.tokens(batch) * jax.process_count())
            progress.advance(n + 1)
            if pending is not None:
                log_train(pending)
            pending, done = Pending(n + 1, out, rate, position), n + 1

            evaluates = asked.eval_data is not None and asked.evaluates(done)
            saves = checkpoints is not None and checkpoints.due(done, steps)
            stops = watch is not None and watch.reached(done) and done < steps
            if evaluates or saves or stops or done == steps:
                log_train(pending)
                pending = None
            if evaluates:
                evaluation = run_evaluation(done)
            if checkpoints is not None and (saves or stops):
                checkpoints.save(held.state, done, stream.position(), evaluation if evaluates else None, settled)
            if stops:
                stopped = Preempted(done)
                progress.say(str(stopped))
                raise stopped
        if begin == steps and asked.eval_data is not None:
            evaluation = run_evaluation(begin)
        if checkpoints is not None and checkpoints.options.best:
            best, evaluation = checkpoints.restore_best(update.holdings.state)
            held = setup.go_back(update, held, best)
            progress.say(f"the best by {checkpoints.options.best} is that of step {int(best.step)}")

    # What came of it.
    facts = {**said, **started, "steps": int(held.state.step), "evaluation": evaluation}
    plan, kept = update.recipe.plan, _kept(update, held)
    encoded = settling.change(settled, tree.flatten(params), plan.encode(params, kept, held.state.trained))
    vector = delta.TaskVector(encoded, {"base": base, **delta.describe(None, **facts)})
    keep(vector, workdir)
    if watch is not None:
        watch.pass_on()
    return Run(plan, held.state, metrics.rows, evaluation, vector, params, kept)


def _kept(update: step.Step, held: Holdings) -> Any:
    return update.recipe.plan.attach(held.frozen, held.live, held.state.chosen)


def _stop(pending: Pending, state: State, checkpoints: Any, settled: Any) -> None:
    """End a run whose loss or gradient was not finite, with the last good state saved."""
    done = pending.step - 1
    then = "no workdir, so no state was saved"
    if checkpoints is not None:
        checkpoints.save(state, done, pending.position, settled=settled)
        then = f"the state after step {done} is saved in {checkpoints.directory}"
    raise NonFiniteError.of(jax.device_get(pending.metrics), done, pending.position, then)
