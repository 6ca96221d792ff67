"""Several processes on one machine: they find each other, and a failure ends them all."""

import pathlib
import subprocess
import sys
import time

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local.py"


def start(code, processes=2, devices=1):
    command = [sys.executable, str(SCRIPT), "--processes", str(processes), "--devices", str(devices), "--"]
    return subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_each_process_is_told_who_it_is():
    code = "import os; print(os.environ['JFT_PROCESS_ID'], os.environ['JFT_NUM_PROCESSES'], os.environ['XLA_FLAGS'])"
    done = start(code, processes=3, devices=4)
    assert done.returncode == 0
    lines = sorted(done.stdout.splitlines())
    assert [line.split()[:3] for line in lines] == [[f"[{i}]", str(i), "3"] for i in range(3)]
    assert all("device_count=4" in line for line in lines)


def test_one_failure_stops_the_others_and_is_returned():
    code = "import os, sys, time; sys.exit(7) if os.environ['JFT_PROCESS_ID'] == '1' else time.sleep(60)"
    began = time.monotonic()
    assert start(code).returncode == 7
    assert time.monotonic() - began < 30


def test_wrong_use_is_refused():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--processes", "0", "--", "true"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "at least 1" in done.stderr
