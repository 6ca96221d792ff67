"""`Profile`: a trace of some steps of a run, as jax.profiler writes it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jft.train.report import Report
from jft.train.run_config import Profiling
from jft.train.training import Training


class Profile:
    """The trace of the steps that ``options`` name of a run that goes on from step ``begin``, on the first process.

    Step n, the update after n others, is the trace's step event ``train`` number n: from before its batch is taken until it
    is given to the devices. Steps before the first have ended when the trace starts, and the last has when it stops; between
    them nothing waits, so that they overlap as they do without a trace. What the run does between them (evaluation,
    checkpoints) is in the trace too.

    Written to ``folder/plugins/profile/TIME``: ``*.xplane.pb`` for xprof and TensorBoard, ``perfetto_trace.json.gz``.
    """

    def __init__(self, options: Profiling, training: Training, report: Report, begin: int, folder: Path):
        first = begin + options.start
        self._steps = range(first, first + options.steps if jax.process_index() == 0 else first)
        self._training, self._report, self._folder = training, report, folder
        self._traced: list[int] = []
        self._active = False

    @contextlib.contextmanager
    def step(self, n: int) -> Iterator[None]:
        """The context of step ``n``, in which its batch is taken and given to the devices."""
        if n not in self._steps:
            yield
            return
        if not self._active:
            # Else the steps before would still run inside the trace.
            jax.block_until_ready(self._training.held)
            with self._pause():
                jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._active = True
        with jax.profiler.StepTraceAnnotation("train", step_num=n):
            yield
        self._traced.append(n)
        if n == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """End the trace, if one is being made, with the steps that there are."""
        if not self._active:
            if self._steps and not self._traced:
                self._report.say(f"no profile: the run ended before step {self._steps[0]}, where it was to begin")
            return
        self._active = False
        try:
            # What a trace does not see to its end it does not show.
            jax.block_until_ready(self._training.held)
        finally:
            with self._pause():
                jax.profiler.stop_trace()
        if self._traced:
            steps = f"steps {self._traced[0]} to {self._traced[-1]}"
            self._report.say(f"profile of {steps} in {self._folder}: xprof --logdir {self._folder}, or ui.perfetto.dev")

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """The context of what is no training, and so counts for no rate."""
        since = time.perf_counter()
        yield
        self._report.pause(time.perf_counter() - since)
