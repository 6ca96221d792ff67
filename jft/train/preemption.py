"""Preemption: SIGTERM or SIGINT ends the run after the current step, with a checkpoint, at the same step on all hosts."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL: not finished, start me again


# A SystemExit: `except Exception` in a caller's loop must not keep a stopped process going.
class Preempted(SystemExit):
    """The run was asked to stop and has saved itself: run the same command again to go on.

    step: updates made. Uncaught, the process exits with code 75.
    """

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        return f"stopped after step {self.step}, saved; run the same again to go on"


class Watch:
    """While entered, notes SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once.

    Signals reach Python in the main thread only; elsewhere nothing is watched. With several processes SIGTERM is left to
    JAX's preemption service, which finds a step at which all of them stop.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        import jax

        self._many = jax.process_count() > 1
        # `signal.signal` raises anywhere else.
        if threading.current_thread() is threading.main_thread() and not self._many:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The second Ctrl-C is of a user who does not want to wait for the step.
        if self._stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop.set()
        self._number = number

    def pass_on(self) -> None:
        """Deliver once more a signal that came too late to stop anything, now that the run is whole and saved."""
        if self._stop.is_set():
            signal.raise_signal(self._number)

    def reached(self, step: int) -> bool:
        """Whether to stop after ``step``; the same answer on every process."""
        if not self._many:
            return self._stop.is_set()
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
