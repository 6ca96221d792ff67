"""`Peers`: the other processes of a run. Values are exchanged with them, errors passed on, and lost ones noticed.

Every process keeps the connection to process 0 on which they met (:mod:`jft.parallel.distributed`), and a thread that reads
from it, so that all are told while they compile, or wait for each other in a collective that will never end. A process that
is told of the end of another prints one line and exits: nothing else ends a collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from jft import terminal

# EX_TEMPFAIL: not finished, start the same again.
LOST = 75
# Seconds in which the cause of an error of XLA arrives, where that is the end of another process.
CAUSE = 10.0


class Peers:
    """The connections of process ``index`` of ``count`` to the others: process 0 has one to each, they have one to it.

    heartbeat: seconds without a sign of life after which a process counts as lost. saved: says what a run has saved, for
    the last line of a process; None while there is nothing to say.
    """

    def __init__(self, index: int, count: int, connections: Mapping[int, socket.socket], heartbeat: float):
        self.saved: Callable[[], str] | None = None
        self.index, self.count, self._heartbeat = index, count, heartbeat
        self._connections = dict(connections)
        # Of process 0: values that wait for those of the others, and who has ended well.
        self._values: dict[int, list[Any]] = {k: [] for k in range(count)}
        self._ended: set[int] = set()
        self._answers: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._sending, self._lock, self._over = threading.Lock(), threading.Lock(), False
        # The step that this process is at, and where one has asked to stop the step after which all do, once it is known.
        self._turn, self._step, self._asked = threading.Condition(), 0, False
        self._last: int | None = None
        self._steps: dict[int, int] = {}
        for connection in self._connections.values():
            # A process that no longer reads must not stop this one for ever.
            connection.settimeout(heartbeat)
        threading.Thread(target=self._watch, name="jft-peers", daemon=True).start()

    def exchange(self, point: str, value: Any) -> list[Any]:
        """The JSON values of all processes, in order; all must call it. point: where in the run, the same on all."""
        message = {"kind": "value", "value": [point, value]}
        if self.index:
            self._send(message)
        else:
            self._collect(0, message["value"])
        answers = self._answers.get()
        points = [name for name, _ in answers]
        if len(set(points)) > 1:
            each = ", ".join(f"process {k} at {name!r}" for k, name in enumerate(points))
            raise ValueError(
                f"the processes have come to different points of the run ({each}); start all with the same"
            )
        return [answer for _, answer in answers]

    def reached(self, step: int, wanted: bool) -> bool:
        """Whether all processes stop after ``step``, since one of them wanted to: the same answer on each of them.

        Each is to call it at every step. They stop one step after the last that any of them has reached.
        """
        with self._turn:
            self._step = step
            asks, self._asked = wanted and not self._asked, self._asked or wanted
        if asks:
            self._ask(self.index)
        with self._turn:
            # From when it has told its step until it knows the last one, no process takes another.
            self._turn.wait_for(lambda: not self._asked or self._last is not None)
            return step == self._last

    def rest(self) -> None:
        """The steps of a run are over; another may follow."""
        with self._turn:
            self._step = 0

    def _ask(self, sender: int) -> None:
        """Stop: process 0 asks all of them which step they are at."""
        with self._turn:
            # Two may ask at once; it is answered once.
            first, self._asked = not self._steps, True
            step = self._steps.setdefault(self.index, self._step)
        if self.index:
            self._send({"kind": "stop"} if sender == self.index else {"kind": "step", "step": step})
        elif first:
            self._send({"kind": "stop"})

    def _decide(self, sender: int, step: int) -> None:
        """Of process 0: the step that ``sender`` is at; once all are known, the last one of the run."""
        self._steps[sender] = step
        if len(self._steps) == self.count:
            last = max(self._steps.values()) + 1
            self._send({"kind": "last", "step": last})
            self._stop_after(last)

    def _stop_after(self, step: int) -> None:
        with self._turn:
            self._last = step
            self._turn.notify_all()

    def leave(self) -> None:
        """Tell the others that this process has done all of its work."""
        self._send({"kind": "done"})

    def _send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for connection in self._connections.values():
                # Whether one is gone is for the thread that reads to find.
                with contextlib.suppress(OSError):
                    connection.sendall(line)

    def _watch(self) -> None:
        heard, sent = dict.fromkeys(self._connections, time.monotonic()), 0.0
        rest = dict.fromkeys(self._connections, b"")
        with selectors.DefaultSelector() as selector:
            for k, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, k)
            while heard:
                for key, _ in selector.select(self._heartbeat / 8):
                    k, piece = key.data, b""
                    with contextlib.suppress(OSError):
                        piece = self._connections[k].recv(1 << 16)
                    *lines, rest[k] = (rest[k] + piece).split(b"\n")
                    for line in lines:
                        self._take(k, json.loads(line))
                    heard[k] = time.monotonic()
                    if not piece:
                        selector.unregister(self._connections[k])
                        del heard[k]
                        self._lose(k, "it was killed, or its machine went down")
                now = time.monotonic()
                # After reading, so that a process which was itself stopped for long finds what came meanwhile.
                for k in [k for k, then in heard.items() if now - then > self._heartbeat]:
                    del heard[k]
                    self._lose(k, f"no sign of life for {self._heartbeat:g} s")
                if now - sent > self._heartbeat / 4:
                    sent = now
                    self._send({"kind": "alive"})

    def _take(self, sender: int, message: Mapping[str, Any]) -> None:
        if message["kind"] == "value":
            self._collect(sender, message["value"])
        elif message["kind"] == "values":
            self._answers.put(message["value"])
        elif message["kind"] == "done":
            self._ended.add(sender)
            self._collect(sender)
        elif message["kind"] == "stop":
            self._ask(sender)
        elif message["kind"] == "step":
            self._decide(sender, message["step"])
        elif message["kind"] == "last":
            self._stop_after(message["step"])
        elif message["kind"] == "end":
            self._end(message)

    def _collect(self, sender: int, *value: Any) -> None:
        """Of process 0: a value of ``sender``; once there is one of each process, all get them."""
        with self._lock:
            self._values[sender] += value
            waiting = [k for k, values in self._values.items() if values]
            whole = [self._values[k].pop(0) for k in waiting] if len(waiting) == self.count else None
        if whole is not None:
            self._send({"kind": "values", "value": whole})
            self._answers.put(whole)
        elif waiting and self._ended:
            self._end(_ended(min(self._ended), "failed", "it ended while the others still wait for it", 1))

    def _lose(self, k: int, reason: str) -> None:
        if k not in self._ended:
            self._end(_ended(k, "was lost", reason, LOST))

    def _end(self, message: Mapping[str, Any]) -> None:
        """End this process for what ``message`` says of another."""
        with self._lock:
            if self._over:  # by an error of its own, which it tells
                return
            self._over = True
        if not self.index:
            self._send(message)
        self._say(message)
        os._exit(message["status"])

    def _say(self, message: Mapping[str, Any]) -> None:
        """Print the last line of this process."""
        again = "; start all processes again to go on" if message["how"] == "was lost" else ""
        whose = f"process {message['process']} of {self.count} {message['how']}"
        text = f"{whose}: {message['reason']}{self._saved()}{again}"
        # Not by `print`: a thread that waits for ever may hold the lock of the stream.
        with contextlib.suppress(OSError):
            os.write(2, f"jft: {terminal.plain(text)}\n".encode())

    def _saved(self) -> str:
        try:
            return f"; {self.saved()}" if self.saved else ""
        # Whatever the state of the run, this line is the last chance to say why it ends.
        except Exception:
            return ""

    def exit(self, error: BaseException, status: int = 1, show: Callable[[], object] | None = None) -> NoReturn:
        """End this process for ``error``, which the others are told, and do not wait for them. show: in place of the line."""
        # The end of another process breaks the collectives of this one: the cause is on its way.
        if any(isinstance(e, jax.errors.JaxRuntimeError) for e in _chain(error)):
            time.sleep(CAUSE)
        with self._lock:
            ended, self._over = self._over, True
        if ended:  # for the reason of another, which the thread that reads is telling
            threading.Event().wait()
        kind = "" if isinstance(error, ValueError | OSError | SystemExit) else f"{type(error).__name__}: "
        reason = f"{kind}{' '.join(str(error).split())}" if str(error) else type(error).__name__
        # A stop is no failure of the others either.
        stopped = isinstance(error, SystemExit)
        message = _ended(self.index, "was stopped" if stopped else "failed", reason, LOST if stopped else 1)
        self._send(message)
        if show is None:
            self._say(message)
        else:
            show()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # JAX's own way out would wait for the others.
        os._exit(status)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised for, as that of a checkpoint which could not be gathered."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _ended(process: int, how: str, reason: str, status: int) -> dict[str, Any]:
    """The message that ends all others: what became of a process and why, and their status."""
    return {"kind": "end", "process": process, "how": how, "reason": reason, "status": status}


_peers: Peers | None = None


def current() -> Peers | None:
    """The other processes of a run that :func:`jft.parallel.start` has connected; None for one process by itself."""
    return _peers


def connect(index: int, count: int, connections: Mapping[int, socket.socket], heartbeat: float) -> Peers:
    """Watch the ``connections`` from now on; an uncaught exception of this process reaches the others as well."""
    global _peers
    _peers = peers = Peers(index, count, connections, heartbeat)
    before = sys.excepthook

    def uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        peers.exit(error, show=lambda: before(kind, error, trace))

    sys.excepthook = uncaught
    return peers


def exchange(point: str, value: Any) -> list[Any]:
    """The JSON values of all processes, in order: all must call it, at the same ``point`` of the run. Compiles nothing."""
    if _peers is not None:
        return _peers.exchange(point, value)
    return [value] if jax.process_count() == 1 else _gathered(value)


def _gathered(value: Any) -> list[Any]:
    """:func:`exchange` between processes that connected in another way than by :func:`jft.parallel.start`."""
    import numpy as np
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(encoded.size))
    # An all-gather takes equal shapes, and JSON is of any length.
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: encoded.size] = encoded
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:n])) for row, n in zip(everyone, sizes, strict=True)]


def saves(saved: Callable[[], str] | None) -> None:
    """From now on ``saved()`` says, in the last line of a process that ends for another, what the run has saved."""
    if _peers is not None:
        _peers.saved = saved
