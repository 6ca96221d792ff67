"""The same run as one process and as two: same losses, same task vector."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jft
from jft.cli import options
from jft.train import experiment

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local.py"
CONFIG = """
from jft.train import config


def get_config():
    c = config.default()
    c.steps = 6
    c.batch_size = 16
    c.model.arch = "vision"
    c.model.options = dict(image=8, patch=2, channels=1, width=64, layers=2, heads=4, hidden=256)
    c.model.classes = 10
    c.data = dict(source="digits", split="train")
    c.eval_data = dict(source="digits", split="validation")
    c.method = dict(name="full")
    c.mesh.data = 2
    c.mesh.fsdp = 2
    c.mesh.tensor = 2
    c.log.every = 1
    c.checkpoint.every = 3
    return c
"""


def start(tmp_path):
    """Two processes of four devices, by the launcher."""
    train = ["-m", "jft", "train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'two'}"]
    command = [sys.executable, str(SCRIPT), "--processes", "2", "--devices", "4", "--"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([*command, sys.executable, *train], capture_output=True, text=True, timeout=540, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1]" not in done.stdout, "one process prints"


def result(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return rows, jft.TaskVector.load(workdir / "task_vector.safetensors")


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    # In this process, which has eight devices.
    experiment.run(options.load(str(tmp_path / "config.py")), tmp_path / "one")
    start(tmp_path)
    (one, one_vector), (two, two_vector) = result(tmp_path / "one"), result(tmp_path / "two")
    losses = lambda rows: [r["loss"] for r in rows]
    assert len(one) == len(two) == 7
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    assert two[-1]["accuracy"] == pytest.approx(one[-1]["accuracy"], abs=1e-6)
    for path, change in one_vector.deltas.items():
        np.testing.assert_allclose(two_vector.deltas[path].dense(), change.dense(), atol=1e-4, err_msg=path)
