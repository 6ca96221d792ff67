import os
import socket
import subprocess
import sys

import pytest

from jft.parallel import start

CODE = "from jft.parallel import start; import jax; print(start(timeout={timeout}), jax.process_count(), jax.device_count())"


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def process(port, processes, process_id, timeout=20):
    env = {**os.environ, "JFT_COORDINATOR": f"localhost:{port}", "JFT_NUM_PROCESSES": str(processes)}
    env |= {"JFT_PROCESS_ID": str(process_id), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", CODE.format(timeout=timeout)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_nothing_given_is_one_process(monkeypatch):
    for variable in ("JFT_COORDINATOR", "JFT_NUM_PROCESSES", "JFT_PROCESS_ID"):
        monkeypatch.delenv(variable, raising=False)
    assert start() is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, r"missing: processes \(JFT_NUM_PROCESSES\), process_id \(JFT_PROCESS_ID\)"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "'a' is not host:port"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "process_id 2 is not one of 2"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        start(**arguments)


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("JFT_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JFT_NUM_PROCESSES='two' is not an integer"):
        start()


def test_two_processes_meet():
    port = free_port()
    outputs = [p.communicate(timeout=60)[0] for p in [process(port, 2, i) for i in (1, 0)]]
    assert [o.splitlines()[-1] for o in outputs] == ["True 2 4"] * 2, outputs


@pytest.mark.parametrize(("process_id", "message"), [(0, "processes 1 of 2 have not come"), (1, "did not meet at")])
def test_a_missing_process_is_a_clear_error(process_id, message):
    output = process(free_port(), 2, process_id, timeout=1).communicate(timeout=60)[0]
    assert message in output
    assert "Did you start on every host" in output
    assert "Check failure" not in output


def test_different_counts_are_refused():
    port = free_port()
    started = [process(port, 2, 1), process(port, 3, 0)]
    for p in started:
        assert "process 1 was started for 2 processes, process 0 for 3" in p.communicate(timeout=60)[0]
