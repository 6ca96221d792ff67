"""Preemption: SIGTERM, SIGINT or SIGHUP ends the run after the current step, with a checkpoint, the same step on all hosts."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL: not finished, start me again


# A SystemExit: `except Exception` in a caller's loop must not keep a stopped process going.
class Preempted(SystemExit):
    """The run was asked to stop and has saved itself: run the same command again to go on.

    step: updates made, None before training began. Uncaught, the process exits with code 75.
    """

    def __init__(self, step: int | None, finished: bool = False):
        super().__init__(EXIT_CODE)
        self.step, self.finished = step, finished

    def __str__(self) -> str:
        if self.step is None:
            return "stopped before the first step, nothing to save; run the same again"
        if self.finished:
            return f"stopped after the last step, {self.step}; the result is written"
        return f"stopped after step {self.step}, saved; run the same again to go on"


class Watch:
    """While entered, SIGTERM, SIGINT and SIGHUP (a lost terminal) end the run by :class:`Preempted`.

    Before :meth:`begin` there is nothing to save, and they do so at once; after it they are noted, and the loop stops where
    it can save. A second SIGINT interrupts at once. SIGHUP stays ignored where it is (``nohup``).

    Signals reach Python in the main thread only; elsewhere nothing is watched. Of several processes one that is told to stop
    stops all, after one step. (Not by JAX's preemption service: Orbax tells it of steps of its own, in the background.)
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._previous: dict[int, Any] = {}
        self._begun = False

    def __enter__(self) -> Watch:
        # Here, since `jft.train` itself is imported without JAX.
        import jax

        from jft.parallel import peers

        self._peers = peers.current()
        # Processes that were connected in another way have JAX's service alone, which takes SIGTERM.
        self._by_jax = self._peers is None and jax.process_count() > 1
        # `signal.signal` raises anywhere else.
        if threading.current_thread() is threading.main_thread() and not self._by_jax:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def begin(self) -> None:
        """From now on there is a state to save."""
        self._begun = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The second Ctrl-C is of a user who does not want to wait for the step.
        if self._stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop.set()
        if not self._begun:
            raise Preempted(None)

    @property
    def noted(self) -> bool:
        """Whether a signal has come since the loop's last look; of several processes one alone cannot stop then."""
        return self._stop.is_set() and self._peers is None

    def reached(self, step: int) -> bool:
        """Whether to stop after ``step``; the same answer on every process."""
        if self._by_jax:
            from jax.experimental import multihost_utils

            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._stop.is_set() if self._peers is None else self._peers.reached(step, self._stop.is_set())

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peers is not None:
            self._peers.rest()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
