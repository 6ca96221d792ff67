"""`Training`: the training of all members from a base or a checkpoint to their results, each a `Run`."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import delta, tree
from jft.data.errors import shorten
from jft.methods import Plan
from jft.names import nearest
from jft.train import evaluation, model_check, reselection
from jft.train.feed import Streams, global_shapes, shown
from jft.train.members import Members
from jft.train.reselection import Trainable
from jft.train.run_config import RunConfig, describe, options
from jft.train.samples import write as write_samples
from jft.train.state import Holdings, Settled, State, go_back, hold, measured, take_up
from jft.train.step import Step, apply_of
from jft.tree import host, visible


class NonFiniteError(ValueError):
    """The loss or gradient was not finite. step: of the update that was not made; position: of its batch in the data."""

    def __init__(self, message: str, step: int, position: Any):
        super().__init__(message)
        self.step, self.position = step, position

    @classmethod
    def of(
        cls, values: Mapping[str, Any], step: int, position: Any, then: str, cause: str, whose: str = ""
    ) -> NonFiniteError:
        """That of a step with metrics ``values``; then: what became of the state; cause: what to look at."""
        # 0 / 0 looks like divergence, and is a matter of the data.
        what = "has total weight 0 on all processes" if values["weight"] == 0 else "is not finite"
        return cls(
            f"{whose}the loss of step {step} {what}: loss {values['loss']:g}, grad_norm {values['grad_norm']:g}, data "
            f"position {shown(position)}; {then}. {cause}",
            step,
            position,
        )


class FinishedError(ValueError):
    """The run has ended in this workdir before, and left no checkpoint to go on from. whole: after all of its steps."""

    def __init__(self, message: str, whole: bool):
        super().__init__(message)
        self.whole = whole


@dataclasses.dataclass(frozen=True)
class Linearized:
    """The outputs of a model under linearized training, as a function of what it keeps and what trains."""

    plan: Plan
    function: Any
    dtype: Any

    def __call__(self, params: tuple[Any, Any], batch: Any) -> jax.Array:
        return self.plan.outputs(self.function, *params, batch, self.dtype)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step on the devices, before its metrics are fetched: updates made with it, the learning rate of each member,
    and each stream's position before its batch.
    """

    step: int
    metrics: Mapping[str, Any]
    rates: Sequence[float]
    positions: list[Any]

    def each(self) -> list[dict[str, float]]:
        """The metrics of each member."""
        # One transfer for all metrics, which waits for the step; a run by itself gets the axis that a fleet has.
        values = {k: np.atleast_1d(v) for k, v in jax.device_get(self.metrics).items() if k != "sound"}
        return [{k: float(v[i]) for k, v in values.items()} for i in range(len(self.rates))]


@dataclasses.dataclass
class Run:
    """A finished run. metrics: all rows, ``{"step", "split", ...}``; evaluation: that of the state it ended with.

    error: of a member of a fleet whose loss was not finite, and that ended before the others.
    """

    plan: Plan
    state: State
    metrics: list[dict]
    evaluation: dict[str, float]
    task_vector: delta.TaskVector
    # Held for `params` alone, which are merged when they are asked for: a fleet has a model for each member otherwise.
    _base: Any
    _kept: Any
    error: NonFiniteError | None = None

    # Without the arrays, which a notebook would print.
    def __repr__(self) -> str:
        scores = self.evaluation or (self.metrics[-1] if self.metrics else {})
        shown = ", ".join(f"{k} {v:.4g}" for k, v in scores.items() if isinstance(v, int | float))
        ended = f", ended by {self.error}" if self.error else ""
        return f"Run(step {int(self.state.step)}: {shown}; {self.task_vector!r}{ended})"

    @functools.cached_property
    def params(self) -> Any:
        """The fine-tuned parameters, plain, in the dtypes of the base."""
        return self.merged(self._base)

    def merged(self, like: Any) -> Any:
        """The fine-tuned parameters in the dtypes of ``like``, arrays or shapes."""
        return self.plan.merged(like, self._kept, self.state.trained)


class Training:
    """The members' holdings on the devices after their last step, with their checkpoints and results.

    held, sound: from :meth:`begin` on; sound: whether the losses and gradients of all steps so far were finite. errors: of
    members that have stopped. notes: of the start, for the user.
    """

    held: Holdings
    sound: Any

    def __init__(
        self, config: RunConfig, members: Members, streams: Streams, trains: Trainable, update: Step, params: Any
    ):
        self.config, self.members, self.streams, self.update, self.params = config, members, streams, update, params
        self._plans, self._chosen, self._calibration = trains.plans, trains.chosen, trains.calibration
        # Of what the settings allow: a resumed run must find the same.
        self._batch = global_shapes(streams.feed(0).largest(known=False))
        self._settled: Settled = {}
        self._facts = [self._describe(i) for i in range(len(members))]
        shared = delta.describe_base(params)  # read once
        self._bases = [delta.describe_base(m.start(params)) if m.params else shared for m in members]
        self.checkpoints: Any = None
        self.errors: list[NonFiniteError | None] = [None] * len(members)
        self.notes: list[str] = []

    def _describe(self, i: int) -> dict[str, Any]:
        member, config = self.members[i], self.config
        rest = config.objective, self.update.single, self._batch, config.dtype, member.seed
        return describe(member.method, member.optimizer, *rest)

    def begin(self, workdir: Path | None, checkpoint: Any, decided: Any, donate: bool) -> int:
        """Open the checkpoints, and hold what they have; the step that training goes on from, 0 without any."""
        members = self.members
        each = [
            {"base": base["fingerprint"], "data": m.manifest.get("data"), **facts, **_content(m.data)}
            for m, base, facts in zip(members, self._bases, self._facts, strict=True)
        ]
        self.checkpoints = _open(workdir, checkpoint, members.identity(each), decided, members, self.config)
        if self.checkpoints and self.checkpoints.options.best:
            self._check_best(self.checkpoints.options.best)
        begin = self.checkpoints.latest or 0 if self.checkpoints else 0
        if begin > self.config.steps:
            raise ValueError(
                f"the run in {workdir} stands at step {begin}, beyond steps={self.config.steps}; ask for at least that many"
            )
        seeds, overlays = [m.seed for m in members], [m.params for m in members]
        self._refuse_finished(each, begin)
        if begin:
            state, positions = self.checkpoints.restore(self.update.holdings.state)
            self._settled = self.checkpoints.settled()
            self.held = take_up(self.update, self.params, state, self._settled, seeds, donate, overlays)
            # Checkpoints of a run by itself hold the position alone, not a list of one.
            positions = positions if members.stacked else [positions]
            self.notes = self.streams.seek(positions, self.checkpoints.options.accept)
        else:
            fresh = hold(self.update, self.params, self._chosen, seeds, donate, overlays)
            calibrations = [lambda i=i, m=m: self._calibration(i, m.start(self.params)) for i, m in enumerate(members)]
            self.held = measured(self.update, fresh, calibrations, self.config.steps)
        # A member whose loss was not finite has not moved since, so its step lags behind the others'.
        self.sound = np.asarray(jax.device_get(self.held.state.step) == begin)
        for i in np.flatnonzero(~np.atleast_1d(self.sound)).tolist():
            last = int(self.held.state.step[i])
            self.errors[i] = NonFiniteError(
                f"member {members[i].name!r} stopped at step {last}, in a part before this", last, None
            )
        return begin

    def _check_best(self, name: str) -> None:
        """Refuse a metric that evaluation does not give, before the first step: shapes tell its names."""
        config, recipe = self.config, self.update.recipe
        score = evaluation.sums(recipe.apply, config.objective, recipe.plan, config.dtype)
        state, kept = self.update.member(self.update.holdings, 0)
        batch = self.streams.feed(0).peek()
        sums = jax.eval_shape(score, (kept, state.trained), batch)
        values = {k: np.full(x.shape, 0.5) for k, x in sums.items() if k != "weight"}
        names = list(config.objective.report(values))
        if config.samples is not None and config.samples.exact_match:
            names.append("exact_match")
        if name not in names:
            raise ValueError(f"checkpoint.best is {name!r}{nearest(name, names)}; evaluation gives {', '.join(names)}")

    def _refuse_finished(self, each: list[dict[str, Any]], begin: int) -> None:
        """Refuse to write over results in the members' folders, of other runs or of this one."""
        for member, facts in zip(self.members, each, strict=True):
            ended = None
            if member.workdir is not None:
                from jft.train.checkpoints import finished

                every = self.checkpoints.options.every if self.checkpoints else 0
                ended = finished(member.workdir, facts, begin, self.config.steps, every)
            if ended is not None:
                raise FinishedError(
                    f"{member.label}the run in {member.workdir} has ended after step {ended}, and has no checkpoint to go on "
                    "from there; load its task_vector.safetensors, give another workdir, or remove that file to train anew",
                    ended == self.config.steps,
                )

    def reselect(self, n: int) -> None:
        """Before update ``n``, select anew what trains, where the method's schedule says so. No fleet has one."""
        steps, schedule = self.config.steps, self.members[0].method.schedule
        if not schedule or n == 0 or not schedule.due(n, steps):
            return
        calibration, seed = functools.partial(self._calibration, 0), self.members[0].seed
        self.update, self.held, self._settled = reselection.renew(
            self.update, self.held, self.params, self._settled, calibration, n, steps, seed
        )
        # Plans encode the result, and so must be those of the last selection.
        self._plans = [self.update.recipe.plan]
        if self.checkpoints:
            self.checkpoints.renewed(self._describe(0), reselection.decided(self.update.recipe.plan))

    def step(self, batch: Any, rates: list[float]) -> dict[str, Any]:
        """Give one update to the devices; its metrics."""
        rate = np.asarray(rates, np.float32).reshape(self.update.stack)
        batch = self.streams.put(batch, self.update.layout)
        # `sound` stays on the device from step to step, so nothing waits for it.
        self.held, metrics = self.update(self.held, batch, rate, self.sound)
        self.sound = metrics["sound"]
        return metrics

    def check(self, pending: Pending) -> list[NonFiniteError]:
        """Stop members whose loss or gradient was not finite, and the run where none is left: their state has not moved."""
        sound = np.atleast_1d(np.asarray(pending.metrics["sound"]))
        fresh = [i for i in np.flatnonzero(~sound).tolist() if self.errors[i] is None]
        values, done = pending.each() if fresh else [], pending.step - 1
        directory = self.checkpoints.directory if self.checkpoints else None
        text = (
            f"the state after step {done} is saved in {directory}" if directory else "no workdir, so no state was saved"
        )
        then = f"it stays at the state after step {done}" if self.members.stacked else text
        for i in fresh:
            position, label = pending.positions[self.streams.stream_of[i]], self.members[i].label
            cause = model_check.cause(self.params, done == 0, directory is not None)
            self.errors[i] = NonFiniteError.of(values[i], done, position, then, cause, label)
        if all(self.errors):
            # The step after may be queued already; with `sound` false it changes nothing, so this is still the last good state.
            self.save(done, pending.positions)
            raise self._end(directory, done, pending.positions)
        return [error for i in fresh if (error := self.errors[i])]

    def _end(self, directory: Any, step: int, positions: list[Any]) -> NonFiniteError:
        """The error of a run whose members have all stopped after ``step``; directory: of its checkpoints, if it has any."""
        if not self.members.stacked:
            return self.errors[0]  # type: ignore[return-value]  # all members have one
        saved = f"their states are saved in {directory}" if directory else "no workdir, so no state was saved"
        text = "\n".join(map(str, self.errors))
        return NonFiniteError(f"no member of the fleet is left; {saved}:\n{text}", step, positions)

    def save(self, done: int, positions: list[Any], scores: list[dict[str, float]] | None = None) -> None:
        """Write a checkpoint, where the run has a workdir. scores: of an evaluation of this very state."""
        if self.checkpoints:
            rest = (positions, None) if self.members.stacked else (positions[0], scores[0] if scores else None)
            self.checkpoints.save(self.held.state, done, *rest, self._settled)

    def evaluate(self) -> list[dict[str, float]]:
        """Each member on its own evaluation data, by one compiled function; nothing for one without."""
        config, recipe = self.config, self.update.recipe
        # By the plan: a merged copy of the model would take its memory again.
        score = evaluation.sums(recipe.apply, config.objective, recipe.plan, config.dtype)
        scores: list[dict[str, float]] = [{} for _ in self.members]
        for i, member in enumerate(self.members):
            if member.eval_data is not None:
                state, kept = self.update.member(self.held, i)
                rest = member.eval_data, config.objective, config.mesh, config.eval_batches
                scores[i] = evaluation.mean(score, (kept, state.trained), *rest, model=config.model)
                if config.samples is not None and config.samples.exact_match:
                    scores[i] |= config.samples.scores(*self._generator(i), member.eval_data)
        return scores

    def texts(self, done: int) -> list[str]:
        """What each member makes of the prompts of the config, a line each; also in its folder."""
        samples, lines = self.config.samples, []
        if samples is None or not samples.prompts:
            return []
        for i, member in enumerate(self.members):
            texts = samples.texts(*self._generator(i))
            write_samples(member.workdir, done, samples.prompts, texts)
            pairs = zip(samples.prompts, texts, strict=True)
            lines += [f"{member.label}{shorten(prompt)} -> {text.strip()}" for prompt, text in pairs]
        return lines

    def _generator(self, i: int) -> tuple[Any, Any]:
        """Member ``i`` as a model and parameters to generate with: by the plan, as :meth:`evaluate`."""
        config, recipe = self.config, self.update.recipe
        state, kept = self.update.member(self.held, i)
        if recipe.plan.method.forward == "standard":
            return config.model, recipe.plan.bind(kept, state.trained, config.dtype)
        # No weights give a linearized model, so that nothing can be cached.
        return Linearized(recipe.plan, apply_of(config.model, config.mesh), config.dtype), (kept, state.trained)

    def merged(self, index: int) -> Any:
        """The parameters of one member as they are now, plain, in the dtypes of the base."""
        state, kept = self.update.member(self.held, index)
        return self._plans[index].merged(self.members[index].start(self.params), kept, state.trained)

    def restore_best(self) -> list[dict[str, float]]:
        """Go back to the best checkpoint, where one is kept; its evaluation."""
        best, scores = self.checkpoints.restore_best(self.update.holdings.state)
        self.held = go_back(self.update, self.held, best)
        return [scores]

    def result(self, i: int, scores: dict[str, float], rows: list[dict]) -> Run:
        """The result of member ``i``, written into its folder if it has one."""
        member, plan, error = self.members[i], self._plans[i], self.errors[i]
        state, kept = self.update.member(self.held, i)
        base = member.start(self.params)
        stopped = {} if error is None else {"stopped": str(error)}
        # The run's own facts last: a manifest cannot pretend to others.
        facts = {
            **member.manifest,
            **self._facts[i],
            **_content(member.data),
            "steps": int(state.step),
            "evaluation": scores,
            **stopped,
        }
        encoded = reselection.change(self._settled, tree.flatten(base), plan.encode(base, kept, state.trained))
        vector = delta.TaskVector(encoded, {"base": self._bases[i], **delta.describe(None, **facts)})
        self._save_result(vector, member.workdir)
        return Run(plan, state, rows, scores, vector, base, kept, error)

    def _save_result(self, vector: delta.TaskVector, workdir: Path | None) -> None:
        """Write a result, on a full disk into the folder of temporary files. Raises ``OSError`` where it could not be here."""
        try:
            save(vector, workdir)
        except OSError as error:
            # One process of several cannot write alone: gathering takes all.
            rescue = _rescue(vector) if jax.process_count() == 1 else None
            latest = self.checkpoints.latest if self.checkpoints else None
            last = f"the last checkpoint is that of step {latest}" if latest else "there is no checkpoint"
            then = (
                f"it is in {rescue}: make room, and move it there"
                if rescue
                else f"{last}. Make room, and run the same again"
            )
            raise OSError(
                f"the task vector cannot be written to {workdir}: {error.strerror or error}; {then}"
            ) from None


def _rescue(vector: delta.TaskVector) -> Path | None:
    """The file of a result among the temporary ones, whose disk need not be the full one; None where it has no room either."""
    folder = Path(tempfile.mkdtemp(prefix="jft-result-"))
    try:
        save(vector, folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return folder / "task_vector.safetensors"


def _content(data: Any) -> dict[str, Any]:
    """What is known of the content of jft's own loaders; other iterables may be read once only."""
    return {"content": data.fingerprint} if hasattr(data, "fingerprint") else {}


def _open(workdir: Path | None, checkpoint: Any, facts: Any, decided: Any, members: Members, config: RunConfig) -> Any:
    """The checkpoints of a run that has a workdir; the module that knows Orbax is loaded for them alone."""
    if workdir is None:
        if checkpoint:
            raise ValueError("checkpoint is given, but no workdir to write to")
        return None
    from jft.train.checkpoints import Checkpointing, Checkpoints

    checkpointing = options(Checkpointing, checkpoint)
    every, between = checkpointing.every, config.eval_every
    if checkpointing.best:
        if members.stacked:
            raise ValueError(
                "checkpoint.best: members are best at steps of their own, and a fleet has one checkpoint; leave it out"
            )
        if members[0].eval_data is None or not between or not every or every % between:
            raise ValueError(
                f"checkpoint.best={checkpointing.best!r} needs eval data, and checkpoint.every ({every}) to be a positive "
                f"multiple of eval_every ({between}), so that every checkpoint has been evaluated"
            )
    # After the checks: a refused start makes no folder.
    workdir.mkdir(parents=True, exist_ok=True)
    return Checkpoints(workdir / "checkpoints", checkpointing, facts, decided, members[0].manifest.get("config"))


def save(vector: delta.TaskVector, workdir: Path | None) -> None:
    """Write the result of a run into its folder, if it has one."""
    if workdir is None:
        return
    # On every process, since gathering is a collective; only the first one writes.
    whole = jax.tree.map(lambda x: x if visible(x) else host(x), vector)
    if jax.process_index() == 0:
        whole.save(workdir / "task_vector.safetensors")
