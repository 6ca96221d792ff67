import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest

from jft.parallel import distributed, start

CODE = "from jft.parallel import start; import jax; print(start(timeout=20), jax.process_count(), jax.device_count())"


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def process(port, processes, process_id):
    env = {**os.environ, "JFT_COORDINATOR": f"localhost:{port}", "JFT_NUM_PROCESSES": str(processes)}
    env |= {"JFT_PROCESS_ID": str(process_id), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", CODE]
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


def test_a_cluster_says_who_this_process_is(monkeypatch):
    for variable in ("JFT_COORDINATOR", "JFT_NUM_PROCESSES", "JFT_PROCESS_ID"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match="no cluster found; give coordinator"):
        distributed._detected(1)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    for variable, value in (slurm | {"SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(variable, value)
    settings, local = distributed._detected(1)
    assert distributed._validated(settings) == (settings["coordinator"], 2, 1)
    assert settings["coordinator"].startswith("node3:")
    assert local == [0]


def test_two_processes_meet():
    port = free_port()
    outputs = [p.communicate(timeout=60)[0] for p in [process(port, 2, i) for i in (1, 0)]]
    assert [o.splitlines()[-1] for o in outputs] == ["True 2 4"] * 2, outputs


@pytest.mark.parametrize(("process_id", "message"), [(0, "processes 1 of 2 have not come"), (1, "did not meet at")])
def test_a_missing_process_is_a_clear_error(process_id, message):
    with pytest.raises(TimeoutError, match=rf"{message}(.|\n)*Did you start on every host"):
        distributed.meet(f"localhost:{free_port()}", 2, process_id, 0.5)


def test_different_counts_are_refused():
    address, errors = f"localhost:{free_port()}", []

    def meet(processes, process_id):
        with pytest.raises(ConnectionError) as error:
            distributed.meet(address, processes, process_id, 20)
        errors.append(str(error.value))

    other = threading.Thread(target=meet, args=(2, 1))
    other.start()
    meet(3, 0)
    other.join()
    assert errors == ["process 1 was started for 2 processes, process 0 for 3"] * 2


def test_the_service_of_a_run_before_may_have_the_port_for_a_while(monkeypatch):
    monkeypatch.setattr(distributed.service, "LINGER", 2.0)
    port = free_port()
    before = socket.create_server(("localhost", port))
    threading.Timer(0.3, before.close).start()

    def stranger():
        with contextlib.suppress(OSError):
            connection, _ = before.accept()
            connection.close()

    threading.Thread(target=stranger).start()
    other = []
    thread = threading.Thread(target=lambda: other.append(distributed.meet(f"localhost:{port}", 2, 1, 10)))
    thread.start()
    connections = distributed.meet(f"localhost:{port}", 2, 0, 10)
    thread.join()
    assert [list(c) for c in (connections, *other)] == [[1], [0]]
    connections[1].sendall(b"x")
    assert other[0][0].recv(1) == b"x"
    for connection in (connections[1], other[0][0]):
        connection.close()
