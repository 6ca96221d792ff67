"""Runs that are killed, in processes of their own, go on and end in the same parameters, bit for bit."""

import multiprocessing
import os
import pkgutil
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jft
from jft import presets
from jft.train.metrics import read
from jft.train.preemption import EXIT_CODE
from tests.train import interrupted

STEPS = 452
ROOT = Path(__file__).parents[2]


def start(workdir, steps, **more):
    environment = os.environ | more | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.train.interrupted", str(workdir), str(steps)]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


class Forked:
    """A run in a fork of a process that has imported jft, which is most of the start of so short a run; used like Popen."""

    def __init__(self, workdir, steps, **environment):
        # No program is compiled and no thread runs in the process that forks.
        context = multiprocessing.get_context("forkserver")
        modules = [module.name for module in pkgutil.iter_modules(presets.__path__, "jft.presets.")]
        context.set_forkserver_preload([interrupted.__name__, "jft.train.finetune", "jft.train.checkpoints", *modules])
        self.output, output = context.Pipe(duplex=False)
        self.process = context.Process(target=interrupted.forked, args=(output, str(workdir), str(steps), environment))
        self.process.start()
        output.close()
        self.stdout = open(self.output.fileno(), closefd=False)  # noqa: SIM115

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def communicate(self, timeout=None):
        out = self.stdout.read()
        self.process.join(timeout)
        return out, out

    @property
    def returncode(self):
        return self.process.exitcode


def step_after(process, count):
    """Read until ``count`` steps have been logged by this process; the step it stands at, None where it ended before."""
    seen = 0
    for line in process.stdout:
        if found := re.match(r"train (\d+)/", line):
            seen += 1
            if seen == count:
                return int(found[1])
    return None


def finish(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return out


def values(workdir):
    return {p: np.asarray(d.value) for p, d in jft.TaskVector.load(workdir / "task_vector.safetensors").items()}


def test_sigterm_saves_and_a_second_start_finishes(tmp_path):
    whole = start(tmp_path / "whole", 40)
    assert "heavy modules: []" in finish(whole)
    process = start(tmp_path / "cut", 40)
    assert step_after(process, 10)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE, errors[-2000:]
    stopped = int(re.search(r"stopped after step (\d+), saved", out)[1])
    assert f"resumed after step {stopped}" in finish(start(tmp_path / "cut", 40))
    expected, got = values(tmp_path / "whole"), values(tmp_path / "cut")
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value)
    losses = [[(r["step"], r["loss"]) for r in read(tmp_path / d / "metrics.jsonl")] for d in ("whole", "cut")]
    assert losses[0] == losses[1], "each step is logged once, with the same loss"


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path):
    """SIGTERM to one of two: both save and stop together, and go on from there as one process would have done."""

    def pair():
        with socket.socket() as calibration:
            calibration.bind(("localhost", 0))
            shared = {"JFT_COORDINATOR": f"localhost:{calibration.getsockname()[1]}", "JFT_NUM_PROCESSES": "2"}
        return [Forked(tmp_path / "two", 60, JFT_PROCESS_ID=str(i), **shared) for i in (0, 1)]

    # In this process, whose start and programs are there.
    interrupted.main(str(tmp_path / "one"), "60")
    first, second = pair()
    assert step_after(first, 10)
    second.send_signal(signal.SIGTERM)
    shown, _ = (p.communicate(timeout=120)[0] for p in (first, second))
    assert [first.returncode, second.returncode] == [EXIT_CODE, EXIT_CODE]
    stopped = int(re.search(r"stopped after step (\d+), saved", shown)[1])
    assert stopped < 60
    outputs = [finish(p) for p in pair()]
    assert f"resumed after step {stopped}" in outputs[0]
    losses = [[r["loss"] for r in read(tmp_path / d / "metrics.jsonl")] for d in ("one", "two")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
def test_twenty_interruptions(tmp_path):
    """SIGTERM and kill -9 in turn at random steps, often in the middle of a save; then the run ends as if nothing was."""
    finish(start(tmp_path / "whole", STEPS))
    choose = random.Random(0)
    interrupted = 0
    while interrupted < 20:
        process = Forked(tmp_path / "cut", STEPS)
        # A multiple of the checkpoint interval is where a save has just begun.
        count = choose.choice([8, 14, 15, 21, choose.randint(8, 30)])
        if step_after(process, count) is None:
            raise AssertionError(f"the run ended after {interrupted} interruptions: {process.communicate()[1][-2000:]}")
        time.sleep(choose.random() * 0.05)
        process.send_signal(signal.SIGKILL if interrupted % 2 else signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (-signal.SIGKILL, EXIT_CODE), errors[-2000:]
        interrupted += 1
    finish(start(tmp_path / "cut", STEPS))
    expected, got = values(tmp_path / "whole"), values(tmp_path / "cut")
    assert expected.keys() == got.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value)
    rows = read(tmp_path / "cut" / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    left = [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert sorted(left, key=int) == [str(STEPS - 4), str(STEPS)], "two checkpoints stay, and nothing half-written"
