"""`finetune` for a fleet: several deltas over one shared base, trained side by side by one program.

Every member is a run as :func:`jft.finetune` would have made it, with its own data, seed, learning rate and selection: its
result is the same to rounding. The base, the reading of data that members have in common, compilation, and the start and
end of the run are there once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jft import delta, parallel, tree
from jft.train import evaluation as evaluations
from jft.train import feed, identity, members, overview, preflight, selection, stacked, step
from jft.train.asked import Asked
from jft.train.members import Member
from jft.train.metrics import Metrics
from jft.train.optimizers import Given
from jft.train.preemption import Preempted, Watch
from jft.train.progress import Meter, Progress
from jft.train.run import NonFiniteError, Pending, Run, keep
from jft.train.state import Holdings
from jft.train.streams import Streams


def train(asked: Asked) -> list[Run]:
    """The runs of :func:`jft.finetune` with ``fleet``, in its order.

    A member whose loss is not finite stays at its last good state, and its :attr:`Run.error` says so; the others go on.
    """
    # What to do, and what each member has of its own.
    model, params, steps, workdir = asked.model, asked.params, asked.steps, asked.workdir
    if asked.log.wandb:
        raise ValueError("log.wandb follows one run, not a fleet; use log.tensorboard")
    found = members.members(asked)
    for member in found:
        if member.data is None:
            raise ValueError(f"member {member.name!r} of the fleet has no data, and finetune was given none for all")
        asked.check_evaluation(member.eval_data)
    streams = Streams(found)
    head = streams.feeds[0].peek()
    asked = asked.filled(head)
    which, mesh, dtype = asked.objective, asked.mesh, asked.dtype
    apply = step.apply_of(model)
    first = preflight.global_shapes(head)

    # What trains: of all members the same, but for what they select.
    before = selection.saved(workdir)
    plans = [m.method.plan(m.whole(params), model) for m in found]
    chosen = found[0].optimizer
    decayed = chosen.decayed(tree.flatten(params))
    recipe = step.Recipe(apply, plans[0], which, chosen.unscheduled(), asked.accumulate, dtype, decayed)

    def look(index: int, params: Any) -> Any:
        member = found[index]
        own = dataclasses.replace(recipe, plan=plans[index])
        stream = streams.feed(index)
        rest = member.seed, member.optimizer, member.eval_data, asked.eval_batches
        return selection.probe_of(own, model, params, stream, mesh, *rest)

    decided = before.decided
    if found[0].method.undecided:
        every = [decided or dict(m.method.undecided(look(i, m.whole(params)))) for i, m in enumerate(found)]  # type: ignore[misc]
        plans = [m.method.decided(d).plan(params, model) for m, d in zip(found, every, strict=True)]
        decided = every[0]
    plans = [members.sharing(plan.anchored() if chosen.to_base else plan) for plan in plans]
    members.check_alike(found, plans)
    recipe = dataclasses.replace(recipe, plan=plans[0])
    parts: Any = before.chosen
    if plans[0].selects and not parts:
        cells = selection.grids(plans[0], params, mesh)
        each = [selection.begin(plan, look(i, found[i].whole(params)), cells) for i, plan in enumerate(plans)]
        shapes = {p: x.shape for p, x in tree.flatten(params).items()}
        each = members.padded(each, shapes)
        parts = {p: np.stack([np.asarray(one[p]) for one in each]) for p in each[0]}
    single = {p: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for p, x in parts.items()}

    # How it lies on the devices, and whether it fits, before anything is allocated.
    owned = {path: True for m in found for path in m.params}
    update = stacked.compile_fleet(recipe, params, owned, single, mesh, len(found), streams.differ)
    one, batch = update.one, _global(streams.peek(), streams.differ)
    memory = preflight.check(update, batch, model, params, alternatives=_smaller(update, params, owned, single, batch))
    params = jax.device_put(params, one.params)

    # The state: from the newest checkpoint, or from the start.
    bases = _described(params, found)
    held_by_one = stacked.setup.shapes(recipe, params, single)
    started = [identity.of_run(m.method, m.optimizer, which, held_by_one.state, first, dtype, m.seed) for m in found]
    itself = [
        {"base": base["fingerprint"], "data": m.said.get("data"), **facts}
        for m, base, facts in zip(found, bases, started, strict=True)
    ]
    whole = {"fleet": {m.name: said for m, said in zip(found, itself, strict=True)}}
    checkpoints = asked.checkpoints(whole, decided)
    begin = asked.begin(checkpoints)
    overlays, seeds = [m.params for m in found], [m.seed for m in found]
    if begin and checkpoints:
        state, position = checkpoints.restore(update.holdings.state)
        held = stacked.take_up(update, params, overlays, state, seeds)
        streams.seek(position)
        del state
    else:
        for member, said in zip(found, itself, strict=True):
            identity.keep(member.workdir, said)
        held = stacked.hold(update, params, overlays, parts, seeds)
        held = _measured(update, held, [functools.partial(look, i) for i in range(len(found))], params, found)

    # What the user sees.
    primary = jax.process_index() == 0
    first_example = overview.example(head, which, asked.tokenizer)
    for member in found:
        if member.workdir is not None and primary:
            member.workdir.mkdir(parents=True, exist_ok=True)
        identity.keep_config(member.workdir, member.said)
    sinks = [Metrics(m.workdir, begin, asked.log.tensorboard and m.workdir is not None, "", primary) for m in found]
    progress = Progress(steps, begin, asked.log.progress and primary)
    work = _work(update, batch, params)
    meter = Meter(work)
    trained = update.member(held, 0)[0].trained
    progress.say(overview.text(overview.rows(params, trained, one.params if mesh is not None else None)))
    progress.say(
        f"{len(found)} members ({', '.join(m.name for m in found)}), each by method {overview.describe(plans[0])}; "
        f"step takes {memory}; FLOPs by {work.source}"
    )
    if first_example:
        progress.say(first_example)
    if begin:
        progress.say(f"resumed after step {begin}")

    errors: list[NonFiniteError | None] = [None] * len(found)
    sound: Any = np.asarray(jax.device_get(held.state.step) == begin)
    for i in np.flatnonzero(~sound).tolist():
        last = int(held.state.step[i])
        errors[i] = NonFiniteError(
            f"member {found[i].name!r} stopped at step {last}, in a part before this", last, None
        )

    def log_train(pending: Pending) -> None:
        """Metrics of a step that was given to the devices before; members whose loss is not finite are said to stop."""
        good = np.asarray(pending.metrics["sound"])
        fresh = [i for i in np.flatnonzero(~good).tolist() if errors[i] is None]
        logs = pending.step % asked.log.every == 0 or pending.step == steps
        if not fresh and not logs:
            return
        values = {k: np.asarray(v, np.float64) for k, v in jax.device_get(pending.metrics).items() if k != "sound"}
        for i in fresh:
            done, position = pending.step - 1, pending.position[streams.of[i]]
            then, whose = f"it stays at the state after step {done}", f"member {found[i].name!r}: "
            errors[i] = NonFiniteError.of({k: v[i] for k, v in values.items()}, done, position, then, whose)
            progress.say(str(errors[i]))
        if all(errors):
            _end(errors, held, checkpoints, pending)
        if not logs:
            return
        rates = meter.read()
        for i, sink in enumerate(sinks):
            if errors[i] is None:
                lr = {} if isinstance(chosen, Given) else {"lr": float(pending.rate[i])}
                sink.write(pending.step, "train", {k: float(v[i]) for k, v in values.items()} | lr | rates)
        alive = [i for i, error in enumerate(errors) if error is None]
        progress.show(pending.step, "train", {k: float(v[alive].mean()) for k, v in values.items()} | rates)

    def run_evaluation(done: int) -> list[dict[str, float]]:
        since = time.perf_counter()
        results = _evaluated(update, held, found, (apply, which, dtype), mesh, asked.eval_batches)
        meter.pause(time.perf_counter() - since)
        for member, sink, result in zip(found, sinks, results, strict=True):
            if result:
                sink.write(done, "eval", result)
                progress.say(f"{member.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
        return results

    # The loop, as for one run: metrics are fetched one step late.
    evaluation: list[dict[str, float]] = [{} for _ in found]
    evaluates_at_all = any(m.eval_data is not None for m in found)
    pending: Pending | None = None
    with contextlib.ExitStack() as stack:
        for closing in (*sinks, progress, streams, *([checkpoints] if checkpoints else [])):
            stack.callback(closing.close)
        watch = stack.enter_context(Watch()) if checkpoints else None
        for n in range(begin, steps):
            position = streams.position()
            try:
                head, batch = streams.next(n, which)
            except ValueError as error:
                if pending is not None:
                    log_train(pending)
                if checkpoints is None or jax.process_count() > 1:
                    raise
                checkpoints.save(held.state, n, position)
                raise ValueError(f"{error}; the state after step {n} is saved in {checkpoints.directory}") from error
            rates = np.asarray([m.optimizer.rate(n, steps) for m in found], np.float32)
            held, out = update(held, _put(batch, update), rates, sound)
            sound = out["sound"]
            meter.add(feed.rows(head) * jax.process_count(), feed.tokens(head) * jax.process_count())
            progress.advance(n + 1)
            if pending is not None:
                log_train(pending)
            pending, done = Pending(n + 1, out, rates, position), n + 1

            evaluates = evaluates_at_all and asked.evaluates(done)
            saves = checkpoints is not None and checkpoints.due(done, steps)
            stops = watch is not None and watch.reached(done) and done < steps
            if evaluates or saves or stops or done == steps:
                log_train(pending)
                pending = None
            if evaluates:
                evaluation = run_evaluation(done)
            if checkpoints is not None and (saves or stops):
                checkpoints.save(held.state, done, streams.position())
            if stops:
                stopped = Preempted(done)
                progress.say(str(stopped))
                raise stopped
        if begin == steps and evaluates_at_all:
            evaluation = run_evaluation(begin)

    # What came of it.
    runs = []
    for i, member in enumerate(found):
        state, kept = update.member(held, i)
        base = member.whole(params)
        stop = {} if errors[i] is None else {"stopped": str(errors[i])}
        facts = {**member.said, **started[i], "steps": int(state.step), "evaluation": evaluation[i], **stop}
        encoded = plans[i].encode(base, kept, state.trained)
        vector = delta.TaskVector(encoded, {"base": bases[i], **delta.describe(None, **facts)})
        keep(vector, member.workdir)
        runs.append(Run(plans[i], state, sinks[i].rows, evaluation[i], vector, base, kept, errors[i]))
    if watch is not None:
        watch.pass_on()
    return runs


def _global(batch: Any, differ: bool) -> Any:
    """Shapes of the global batch of all members, from this process's rows of it."""

    def widen(x: np.ndarray) -> jax.ShapeDtypeStruct:
        axis = 1 if differ else 0
        if x.ndim <= axis:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        rows = x.shape[axis] * jax.process_count()
        return jax.ShapeDtypeStruct((*x.shape[:axis], rows, *x.shape[axis + 1 :]), x.dtype)

    return jax.tree.map(widen, batch)


def _put(batch: Any, update: stacked.Fleet) -> Any:
    """Host batches of all members to devices."""
    layout = update.layout
    if layout.mesh is None:
        return jax.device_put(batch, layout.batch)
    if not update.axes.batch:
        return parallel.put_batch(batch, layout.mesh)

    mesh = layout.mesh

    def put(x: np.ndarray) -> jax.Array:
        # What has no rows is one number for each member.
        place = layout.batch if x.ndim > 1 else NamedSharding(mesh, PartitionSpec(*layout.batch.spec[:1]))
        return jax.make_array_from_process_local_data(place, x)

    return jax.tree.map(put, batch)


def _smaller(update: stacked.Fleet, params: Any, owned: Any, single: Any, batch: Any) -> Any:
    """What makes a fleet fit that does not: fewer members."""

    def remedies() -> Any:
        members = update.axes.members // 2
        while members:
            half = stacked.compile_fleet(
                update.recipe, params, owned, single, update.layout.mesh, members, update.axes.batch
            )
            mine = jax.tree.map(lambda x: jax.ShapeDtypeStruct((members, *x.shape[1:]), x.dtype), batch)  # noqa: B023
            yield f"{members} members", preflight.needs(half, mine if update.axes.batch else batch, params).total
            members //= 2

    return remedies


def _work(update: stacked.Fleet, batch: Any, params: Any) -> Any:
    """FLOPs of one step of all members."""
    work = preflight.work(update, batch, params)
    if work.flops is None or update.axes.batch or not feed.positions(batch):
        return work
    return dataclasses.replace(work, flops=work.flops * update.axes.members)


def _described(params: Any, found: Sequence[Member]) -> list[dict[str, Any]]:
    """The base of each member, as manifests name it; the shared one is read once."""
    shared = delta.describe_base(params)
    return [delta.describe_base(m.whole(params)) if m.params else shared for m in found]


def _measured(update: stacked.Fleet, held: Holdings, looks: Any, params: Any, found: Sequence[Member]) -> Holdings:
    """What is held, with what each member's rule finds out about the base before the first step."""
    plan, rule = update.recipe.plan, update.recipe.plan.method.rule
    if rule is None:
        return held
    memory = held.state.memory
    each = [rule.measure(plan, looks[i](m.whole(params)), stacked.taken(memory, i)) for i, m in enumerate(found)]
    if each[0] is None:
        return held
    placed = jax.device_put(jax.tree.map(lambda *x: stacked.joint(x), *each), update.layout.state.memory)
    return dataclasses.replace(held, state=dataclasses.replace(held.state, memory=placed))


def _evaluated(
    update: stacked.Fleet, held: Holdings, found: Sequence[Member], how: Any, mesh: Any, limit: int
) -> list[dict[str, float]]:
    """Each member on its own evaluation data, by one compiled function; nothing for one without."""
    apply, which, dtype = how
    score = evaluations.sums(apply, which, update.recipe.plan, dtype)
    results: list[dict[str, float]] = []
    for i, member in enumerate(found):
        if member.eval_data is None:
            results.append({})
            continue
        state, kept = update.member(held, i)
        results.append(evaluations.mean(score, (kept, state.trained), member.eval_data, which, mesh, limit))
    return results


def _end(errors: Sequence[NonFiniteError | None], held: Holdings, checkpoints: Any, pending: Pending) -> None:
    """End a fleet of which no member is left."""
    saved = "; no workdir, so no state was saved"
    done = pending.step - 1
    if checkpoints is not None:
        checkpoints.save(held.state, done, pending.position)
        saved = f"; their states are saved in {checkpoints.directory}"
    text = "\n".join(str(error) for error in errors)
    raise NonFiniteError(f"no member of the fleet is left{saved}:\n{text}", done, pending.position)
