"""`Report`: what the user sees of a run, and the rows of metrics of each member."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jft.train import feed, memory_check, resume, summary
from jft.train.metrics import Metrics
from jft.train.optimizers import Given
from jft.train.progress import Meter, Progress
from jft.train.result import Pending
from jft.train.training import Training


class Report:
    """Rows of metrics for each member, and lines for all; opened once the run may start.

    begin: the step it goes on from. memory: of a step, as text. batch: shapes of the global one.
    """

    def __init__(self, training: Training, begin: int, memory: Any, batch: Any, tokenizer: Any):
        self._training, config, members = training, training.config, training.members
        self._log, self._steps, primary = config.log, config.steps, jax.process_index() == 0
        example = summary.example(training.streams.feed(0).peek(), config.objective, tokenizer)
        # Not before: a start that was refused leaves the config of the run that is there.
        self._metrics = []
        for member in members:
            resume.write_config(member.workdir, member.manifest)
            # A member of a fleet may have no folder where others have.
            tensorboard = config.log.tensorboard and (member.workdir is not None or not members.stacked)
            self._metrics.append(Metrics(member.workdir, begin, tensorboard, config.log.wandb, primary))
        self._progress = Progress(config.steps, begin, config.log.progress and primary)
        times = 1 if training.streams.differ else len(members)
        work = memory_check.work(training.update, batch, training.params, times)
        self._meter = Meter(work)
        self._introduce(f"step takes {memory}; FLOPs by {work.source}", example, begin)

    def _introduce(self, costs: str, example: str, begin: int) -> None:
        run, layout = self._training, self._training.update.layout
        plan, trained = run.update.recipe.plan, run.update.single.trained
        shardings = None if layout.mesh is None else layout.params
        self.say(summary.text(summary.rows(run.params, trained, shardings)))
        names = ", ".join(member.name for member in run.members)
        members = f"{len(run.members)} members ({names}), each by " if run.members.stacked else ""
        self.say(f"{members}method {summary.describe(plan)}; {costs}")
        if example:
            self.say(example)
        if "classifier/w" in plan.paths and "classifier/w" not in plan.leaves:
            self.say("the classifier stays as it is, which suits a fixed head; also='^classifier/' trains it")
        if begin:
            self.say(f"resumed after step {begin}")

    def say(self, text: str) -> None:
        """Print a line."""
        self._progress.say(text)

    def rows(self, index: int) -> list[dict]:
        """All rows of one member, those of the parts before included."""
        return self._metrics[index].rows

    def count(self, done: int, batch: Any) -> None:
        """Update ``done`` was given to the devices; ``batch``: a host batch of one member."""
        self._meter.add(feed.rows(batch) * jax.process_count(), feed.tokens(batch) * jax.process_count())
        self._progress.advance(done)

    def train(self, pending: Pending) -> None:
        """Metrics of a step, where it is one to log, of members that go on."""
        if pending.step % self._log.every and pending.step != self._steps:
            return
        speed = self._meter.read()
        rows = []
        each = zip(self._training.members, self._metrics, pending.each(), pending.rates, strict=True)
        for i, (member, metrics, values, rate) in enumerate(each):
            if self._training.errors[i] is None:
                lr = {} if isinstance(member.optimizer, Given) else {"lr": rate}
                rows.append(values | lr | speed)
                metrics.write(pending.step, "train", rows[-1])
        mean = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        if self._training.members.stacked:
            mean.pop("lr", None)  # each has its own
        self._progress.show(pending.step, "train", mean)

    def evaluation(self, done: int, results: list[dict[str, float]], seconds: float) -> None:
        """Results of each member, nothing for one without evaluation data; what they took does not count as training."""
        self._meter.pause(seconds)
        for member, metrics, result in zip(self._training.members, self._metrics, results, strict=True):
            if result:
                metrics.write(done, "eval", result)
            if result and member.name:
                self.say(f"{member.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
            elif result:
                self._progress.show(done, "eval", result)

    def close(self) -> None:
        for metrics in self._metrics:
            metrics.close()
        self._progress.close()
