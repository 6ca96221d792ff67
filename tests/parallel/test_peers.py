"""The connections between processes and their agreement, with both ends in this process."""

import contextlib
import os
import queue
import socket
import threading

import pytest

from jft.parallel import agreement, peers

MUTATIONS = [
    ("jft/parallel/agreement.py", "    if len(set(peers.exchange(point, digest))) == 1:", "    if True:"),
    ("jft/parallel/agreement.py", "groups.setdefault(text, []).append(k)", "groups.setdefault(text, []).append(k + 1)"),
    ("jft/parallel/peers.py", "if now - then > self._heartbeat]", "if now - then > 100 * self._heartbeat]"),
    ("jft/parallel/peers.py", "        if k not in self._ended:", "        if k in self._ended:"),
    ("jft/parallel/peers.py", "        if len(set(points)) > 1:", "        if False:"),
    ("jft/parallel/peers.py", "            if now - sent > self._heartbeat / 4:", "            if False:"),
    ("jft/parallel/peers.py", "        elif waiting and self._ended:", "        elif False:"),
    ("jft/parallel/peers.py", "error = error.__cause__ or error.__context__", "error = error.__cause__"),
    ("jft/parallel/peers.py", "last = max(self._steps.values()) + 1", "last = max(self._steps.values())"),
    ("jft/parallel/peers.py", "last = max(self._steps.values()) + 1", "last = min(self._steps.values()) + 1"),
]
BEAT = 0.8


class Ended(BaseException):
    """In place of the end of the process."""


class Processes:
    """Processes 0 and 1 of two, as threads; ``ends`` gets ``(process, status, its last line)`` of each that ends."""

    def __init__(self, monkeypatch):
        self.ends, lines = queue.Queue(), {}
        self.sockets = socket.socketpair()

        def write(_, text):
            lines[threading.current_thread()] = text.decode()

        def leave(status):
            thread = threading.current_thread()
            self.ends.put((status, lines.pop(thread, "")))
            raise Ended

        monkeypatch.setattr(peers.os, "write", write)
        monkeypatch.setattr(peers.os, "_exit", leave)
        monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def peers(self, *indices):
        return [peers.Peers(i, 2, {1 - i: self.sockets[i]}, BEAT) for i in indices or (0, 1)]

    def end(self):
        return self.ends.get(timeout=10)


@pytest.fixture
def both(monkeypatch):
    processes = Processes(monkeypatch)
    yield processes
    for one in processes.sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
    # Before `os._exit` is what it was.
    for thread in threading.enumerate():
        if thread.name == "jft-peers":
            thread.join()
    for one in processes.sockets:
        one.close()


def together(*functions):
    """What the functions, each in a thread, give or raise."""
    out = [None] * len(functions)

    def call(i, function):
        try:
            out[i] = function()
        except Exception as error:
            out[i] = error

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return out


def test_values_are_exchanged_in_order_and_silence_is_no_end(both):
    zero, one = both.peers()
    for n in range(3):
        assert together(lambda n=n: zero.exchange("a", n), lambda n=n: one.exchange("a", [n])) == [[n, [n]]] * 2
    threading.Event().wait(2 * BEAT)
    assert both.ends.empty(), "they tell each other that they live"


def test_different_points_are_an_error_on_both(both):
    zero, one = both.peers()
    errors = together(lambda: zero.exchange("lock", 1), lambda: one.exchange("batch", 1))
    assert [str(e) for e in errors] == [str(errors[0])] * 2
    assert "process 0 at 'lock', process 1 at 'batch'" in str(errors[0])


def test_a_closed_connection_is_a_lost_process_unless_it_had_done_its_work(both):
    (zero,) = both.peers(0)
    zero.saved = lambda: "the last checkpoint is that of step 4"
    both.sockets[1].close()
    status, line = both.end()
    assert status == peers.LOST == 75
    assert line.startswith("jft: process 1 of 2 was lost: it was killed")
    assert "; the last checkpoint is that of step 4; start all" in line


def test_who_has_done_its_work_may_go(both):
    _, one = both.peers()
    one.leave()
    threading.Event().wait(0.2)
    both.sockets[1].shutdown(socket.SHUT_RDWR)
    threading.Event().wait(0.2)
    # Process 1 is told of no end of process 0 either, which has not left: it sees its own connection closed.
    assert both.ends.qsize() == 1
    assert "process 0 of 2 was lost" in both.end()[1]


def test_who_ends_while_others_wait_ends_all(both):
    zero, one = both.peers()
    one.leave()
    threading.Thread(target=lambda: zero.exchange("a", 1), daemon=True).start()
    # Process 0 notices in whichever of its threads comes second.
    ends = [both.end()[1] for _ in range(2)]
    assert all("process 1 of 2 failed: it ended while the others still wait for it" in line for line in ends)


def test_no_sign_of_life(both):
    both.peers(1)
    assert both.end() == (
        75,
        "jft: process 0 of 2 was lost: no sign of life for 0.8 s; start all processes again to go on\n",
    )


@pytest.mark.parametrize("process", [0, 1])
def test_an_error_ends_the_other_with_its_reason(both, process):
    pair = both.peers()
    with pytest.raises(Ended):
        pair[process].exit(OSError("no\x1b file"), 2)
    ends = sorted([both.end(), both.end()])
    assert ends == [(status, f"jft: process {process} of 2 failed: no\\x1b file\n") for status in (1, 2)]


def agree(monkeypatch, *facts):
    """What :func:`agreement.agree` gives or raises in each of as many processes as there are facts."""
    values, barrier, me = [None] * len(facts), threading.Barrier(len(facts)), threading.local()

    def exchange(point, value):
        values[me.index] = value
        barrier.wait(10)
        out = list(values)
        barrier.wait(10)
        return out

    def process(k):
        me.index = k
        return agreement.agree("here", facts[k])

    monkeypatch.setattr(agreement.jax, "process_count", lambda: len(facts))
    monkeypatch.setattr(peers, "exchange", exchange)
    return together(*(lambda k=k: process(k) for k in range(len(facts))))


def test_a_difference_is_named_with_values_and_processes(monkeypatch):
    same = {"steps": 3, "function": test_no_sign_of_life, "path": agreement.os.curdir}
    facts = [
        {**same, "optimizer": {"lr": 0.1}},
        {**same, "optimizer": {"lr": 0.2, "b1": 1}},
        {**same, "optimizer": {"lr": 0.1}},
    ]
    errors = agree(monkeypatch, *facts)
    assert all(type(error) is agreement.Disagreement for error in errors)
    assert [str(error) for error in errors] == 3 * [
        "the processes of this run differ: optimizer.lr is 0.1 on processes 0, 2, 0.2 on process 1; "
        "optimizer.b1 is nothing on processes 0, 2, 1 on process 1; start all of them with the same"
    ]
    assert agree(monkeypatch, same, dict(reversed(same.items()))) == [None, None]


def test_the_environment_is_what_decides_the_program(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/here")
    facts = agreement.environment()
    assert facts["XLA_FLAGS"] == ["--xla_a=1"]
    assert facts["jax version"] == agreement.jax.__version__
    assert os.environ["XLA_FLAGS"].endswith("/here")


def test_a_broken_collective_waits_for_its_cause(both, monkeypatch):
    waits = []
    monkeypatch.setattr(peers.time, "sleep", waits.append)
    _, one = both.peers()
    error = OSError("the checkpoint cannot be written")
    error.__context__ = peers.jax.errors.JaxRuntimeError("Connection reset by peer")
    with pytest.raises(Ended):
        one.exit(error)
    assert waits == [peers.CAUSE]


@pytest.mark.parametrize(("who", "at", "last"), [(0, 6, 7), (1, 5, 6)])
def test_all_stop_one_step_after_the_first_of_them(both, who, at, last):
    """Process 0 is a step ahead, as one is that waits for the metrics of the step before."""
    pair = both.peers()
    assert not pair[0].reached(5, False)
    assert not pair[1].reached(4, False)
    assert not pair[who].reached(at, True)
    assert [pair[who].reached(step, True) for step in range(at + 1, last + 1)] == [True]
    assert not pair[1 - who].reached(last - 1, False)
    assert pair[1 - who].reached(last, False)
