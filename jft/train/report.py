"""`Report`: the log of a run for its user: how much of each weight trains, the first example, and each member's metrics."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import files, terminal, tree
from jft.data.display import marked
from jft.methods import Plan, select
from jft.parallel.memory import human
from jft.train import feed, step
from jft.train.callbacks import Callback, Event
from jft.train.metrics import Meter, Metrics, Progress
from jft.train.optimizers import Given
from jft.train.training import Pending, Training

# The other metrics of training are means over the targets of all steps since the last row.
OF_ONE_STEP = ("grad_norm", "param_norm", "update_norm", "weight")


class Report:
    """Rows of metrics for each member, and lines for all; opened once the run may start.

    begin: the step it goes on from. memory: of a step, as text. batch: shapes of the largest global one. stopped: whether a
    callback has ended the run.
    """

    def __init__(
        self,
        training: Training,
        begin: int,
        memory: Any,
        batch: Any,
        tokenizer: Any,
        callbacks: Sequence[Callback] = (),
    ):
        self.stopped, self._callbacks = False, callbacks
        self._training, config, members = training, training.config, training.members
        self._log, self._steps, primary = config.log, config.steps, jax.process_index() == 0
        # Not before: a start that was refused leaves the config of the run that is there.
        self._metrics = []
        for member in members:
            write_config(member.workdir, member.manifest)
            # A member of a fleet may have no folder where others have.
            tensorboard = config.log.tensorboard and (member.workdir is not None or not members.stacked)
            self._metrics.append(Metrics(member.workdir, begin, tensorboard, config.log.wandb, primary))
        self._progress = Progress(config.steps, begin, config.log.progress and primary)
        # Batches that differ are stacked, so their shapes count all members already.
        times = 1 if training.streams.differ else len(members)
        work = step.work(training.update, batch, training.params, times)
        self._meter = Meter(work)
        # Examples, tokens and positions of the steps that are on the devices, oldest first.
        self._queued: collections.deque[tuple[int, ...]] = collections.deque()
        # Of each member since its last row: the sums of what is a mean over targets, and their weight.
        self._sums: list[dict[str, float]] = [collections.defaultdict(float) for _ in members]
        if config.log.progress and primary:
            costs = expense(memory, work, batch)
            for line in introduction(
                config, members, training.update, training.streams, training.params, costs, tokenizer
            ):
                self.say(line)
            if begin:
                self.say(f"resumed after step {begin}")
            for member in members:
                if member.workdir is not None and (text := room(member.workdir, training)):
                    self.say(text)

    def say(self, text: str) -> None:
        """Print a line."""
        self._progress.say(text)

    def rows(self, index: int) -> list[dict]:
        """All rows of one member, those of the parts before included."""
        return self._metrics[index].rows

    def queue(self, batch: Any) -> None:
        """A step was given to the devices; ``batch``: a host batch of one member."""
        # Host batches are of one process; rates are of the run.
        counts = feed.rows(batch), feed.tokens(batch), feed.positions(batch)
        self._queued.append(tuple(count * jax.process_count() for count in counts))

    def train(self, pending: Pending) -> None:
        """A step is done; where it is one to log, the row of each member that goes on: means over the steps since the last."""
        # Not as it is queued: the host runs ahead of the devices, and rates would be those of dispatching.
        self._meter.add(*self._queued.popleft())
        self._progress.advance(pending.step)
        for sums, values in zip(self._sums, each := pending.each(), strict=True):
            # One loss that is not finite is that of a member's end, which is told elsewhere.
            if math.isfinite(values["loss"]):
                for name, value in values.items():
                    sums[name] += value if name in OF_ONE_STEP else value * values["weight"]
        # The last step is always logged, so that every run has a row.
        if pending.step % self._log.every and pending.step != self._steps:
            return
        # Once for all members: reading starts the next interval.
        speed = self._meter.read()
        rows = []
        for i, (member, values, rate) in enumerate(zip(self._training.members, each, pending.rates, strict=True)):
            sums, self._sums[i] = self._sums[i], collections.defaultdict(float)
            # A member that has stopped shows its last state for ever; at least one goes on, or the run would have ended.
            if self._training.errors[i] is None:
                lr = {} if isinstance(member.optimizer, Given) else {"lr": rate}
                means = {k: sums[k] / sums["weight"] for k in values if k not in OF_ONE_STEP}
                rows.append(values | means | lr | speed)
                self._write(i, pending.step, "train", rows[-1])
                self._call(i, pending.step, "train", rows[-1])
        # All rows have the same keys: one program makes them, and optimizers of a fleet are of one kind.
        mean = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        if self._training.members.stacked:
            mean.pop("lr", None)  # each has its own
        self._progress.show(pending.step, "train", mean)

    def evaluation(self, done: int, results: list[dict[str, float]], seconds: float) -> None:
        """Results of each member, nothing for one without evaluation data; what they took does not count as training."""
        self.pause(seconds)
        for i, (member, result) in enumerate(zip(self._training.members, results, strict=True)):
            if result:
                self._write(i, done, "eval", result)
                self._call(i, done, "eval", result)
            if result and member.name:
                self.say(f"{member.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
            elif result:
                self._progress.show(done, "eval", result)

    def _write(self, index: int, done: int, split: str, values: dict[str, float]) -> None:
        metrics, before = self._metrics[index], self._metrics[index].error
        metrics.write(done, split, values)
        # Once: the disk may stay full for long, and the run goes on.
        if metrics.error and not before:
            self.say(f"warning: {metrics.error}; the run goes on, and its rows wait for room")

    def _call(self, index: int, done: int, split: str, metrics: Mapping[str, float]) -> None:
        """Give a row of metrics of one member to the callbacks."""
        name, merged = self._training.members[index].name, functools.partial(self._training.merged, index)
        for callback in self._callbacks:
            # Not `or`: all callbacks see all rows.
            self.stopped |= callback(Event(done, self._steps, split, dict(metrics), name, merged)) is True

    def pause(self, seconds: float) -> None:
        """Leave out of all rates ``seconds`` that have just gone into something else than training."""
        self._meter.pause(seconds)

    def close(self) -> None:
        for metrics in self._metrics:
            metrics.close()
        self._progress.close()

    @property
    def errors(self) -> list[str]:
        """What became of rows that are not in their file."""
        return [f"{x.error}; its last rows are lost" for x in self._metrics if x.error]


def expense(memory: Any, work: Any, batch: Any) -> str:
    """What a step takes, as text. batch: shapes of the largest."""
    side = {
        name: batch[name].shape[-1]
        for name in ("tokens", "decoder_tokens")
        if isinstance(batch, Mapping) and name in batch
    }
    longest = f" with rows of {' + '.join(map(str, side.values()))} tokens, the longest" if side else ""
    return f"step takes {memory}{longest}\nFLOPs by {work.source}"


def introduction(
    config: Any, members: Any, update: Any, streams: Any, params: Any, costs: str, tokenizer: Any
) -> Iterator[str]:
    """What a run is, before its first step: the table of its weights, its method and costs, and its first example."""
    plan, layout = update.recipe.plan, update.layout
    yield text(rows(params, update.single.trained, None if layout.mesh is None else layout.params))
    names = ", ".join(member.name for member in members)
    each = f"{len(members)} members ({names}), each by " if members.stacked else ""
    yield f"{each}method {describe(plan)}"
    yield from costs.splitlines()
    # Of members that select by budgets of their own too: they differ in seeds and scores at most.
    if densities := select.density(plan, tree.flatten(params)):
        yield whole_units(*densities)
    # Peeked at: it is the batch that the next step takes.
    if first := example(streams.feed(0).peek(), config.objective, tokenizer):
        yield first
    # A user of LoRA easily overlooks whether the head trains.
    if (new := [p for p in getattr(config.model, "drawn", ()) if p in plan.leaves]) and plan.method.name != "full":
        yield f"the checkpoint has no head of this task: {', '.join(new)} are new and train too (freeze: '^classifier/')"
    elif "classifier/w" in plan.paths and "classifier/w" not in plan.leaves:
        yield "the classifier stays as it is, which suits a fixed head; also='^classifier/' trains it"
    sides = {p: min(x.shape[-2:]) for p, x in tree.flatten(params).items() if p in plan.leaves and len(x.shape) > 1}
    if high := [p for p, side in sides.items() if getattr(plan.leaves[p], "rank", 0) > side]:
        more = f" and of {len(high) - 1} more" if len(high) > 1 else ""
        yield f"warning: rank {plan.leaves[high[0]].rank} is above the {sides[high[0]]} that {high[0]}{more} can have"
    for member in members:
        warmup = getattr(member.optimizer, "warmup", 0)
        if warmup > config.steps:
            rate, steps = member.optimizer.rate(config.steps - 1, config.steps), config.steps
            yield (
                f"{member.label}optimizer.warmup is {warmup} steps, more than the run has: at step {steps} the learning "
                f"rate is {rate:.3g}, not {member.optimizer.lr:g}"
            )


def room(workdir: Path, training: Training) -> str:
    """A warning where the disk has less room than a run may write of one member; empty where it has enough."""
    state = training.update.single
    result, whole = tree.nbytes(state.trained), tree.nbytes(state)
    # While a checkpoint is written those that are kept are there as well.
    kept = training.checkpoints.options.keep + 1 if training.checkpoints else 0
    free = shutil.disk_usage(workdir).free
    if free >= result + kept * whole:
        return ""
    return (
        f"warning: {workdir} has {human(free)} of room, and the task vector may take {human(result)} and {kept} checkpoints "
        f"{human(kept * whole)}; make room before the run ends"
    )


MISSED = 1.25  # how far a density of whole units may be from the one of the budget before the run warns


def whole_units(density: float, selected: float) -> str:
    """What a budget of ``density`` comes to in whole units, as text."""
    if max(density / selected, selected / density) <= MISSED:
        return f"density {selected:.3g} in whole units, of a budget of {density:.3g}"
    return (
        f"warning: density {selected:.3g} trains, not the {density:.3g} of the budget: units are large, and at least one of "
        "each matrix (or layer, as the budget is of) trains; give smaller units, as method.block, or a wider scope"
    )


def write_config(workdir: Path | None, manifest: Mapping[str, Any]) -> None:
    """Make the folder of a run that has one, and write its manifest's ``config`` to ``config.json`` there."""
    if workdir is not None and jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if "config" in manifest:
            files.write_text(workdir / "config.json", json.dumps(manifest["config"], indent=2, default=str) + "\n")


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight: its sharding and how many of its values train."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    trains: int

    @property
    def density(self) -> float:
        """Values that train, of values there are."""
        # A weight may have an axis of size 0.
        return self.trains / max(int(np.prod(self.shape)), 1)


def rows(params: Any, trained: Mapping[str, Any], shardings: Any = None) -> list[Row]:
    """A row for each weight, in tree order; ``trained`` as in :meth:`Plan.init` (arrays or shapes)."""
    specs = tree.flatten(shardings) if shardings is not None else {}
    out = []
    for path, x in tree.flatten(params).items():
        spec = getattr(specs.get(path), "spec", None)
        # An axis may be split over several axes of the mesh.
        sharding = ", ".join("+".join(a) if isinstance(a, tuple) else str(a or "-") for a in spec) if spec else "-"
        # With padding slots, which are allocated; factors of LoRA count as what they are.
        trains = tree.count(trained[path]) if path in trained else 0
        out.append(Row(path, tuple(x.shape), np.dtype(x.dtype).name, sharding, trains))
    return out


def summary(table: list[Row]) -> str:
    """``123 weights, 1,234,567 values, 12,345 train (1.0%)``."""
    values = sum(int(np.prod(r.shape)) for r in table)
    trains = sum(r.trains for r in table)
    return f"{len(table)} weights, {values:,} values; {trains:,} train ({100 * trains / max(values, 1):.3g}%)"


def text(table: list[Row]) -> str:
    """The rows as plain aligned text, with the totals below."""
    cells = []
    for r in table:
        trains = (f"{r.trains:,}", f"{r.density:.3g}") if r.trains else ("-", "-")
        cells.append((r.path, "x".join(map(str, r.shape)) or "scalar", r.dtype, r.sharding, *trains))
    headers = ("weight", "shape", "dtype", "sharding", "trains", "density")
    lines = terminal.text(terminal.table(headers, cells, left=("weight", "dtype", "sharding")))
    return f"{lines}\n{summary(table)}"


def example(batch: Any, objective: Any, tokenizer: Any, limit: int = 400) -> str:
    """The first row of a host batch decoded, up to ``limit`` tokens: with what the loss is over in ⟦brackets⟧ where that is
    tokens, else with its label. Empty where the batch holds no text or there is no tokenizer.
    """
    if not isinstance(batch, Mapping):
        batch = {"tokens": batch}
    decoder = "decoder_" if "decoder_tokens" in batch else ""
    if tokenizer is None or f"{decoder}tokens" not in batch:
        return ""
    tokens = batch[f"{decoder}tokens"][0]
    segments = batch[f"{decoder}segments"][0] if f"{decoder}segments" in batch else np.ones_like(tokens)
    # Up to the last token that is not padding, wherever padding lies.
    end = min(int(np.flatnonzero(segments > 0).max(initial=-1)) + 1, limit)
    weights = objective.weights(batch, np)[0] if hasattr(objective, "weights") else np.float32(1)
    if weights.ndim:
        # Weights stand where the prediction is made, one before the token that is predicted.
        counts = np.roll(weights, 1) > 0
        return f"first example, targets in brackets: {marked(tokenizer, tokens[:end], counts[:end])}"
    label = f", label {batch['labels'][0]}" if "labels" in batch else ""
    return f"first example{label}: {tokenizer.decode(tokens[:end])}"


def describe(plan: Plan) -> str:
    """The method in one line: name and options."""
    options = ", ".join(f"{k}={v!r}" for k, v in plan.method.options.items())
    return f"{plan.method.name}({options})"
