"""Joining the processes of a multi-host run.

All processes meet in plain sockets before JAX connects them: JAX's own client aborts the interpreter when a process is
missing, which no caller can catch or explain. Meeting first gives an exception instead, which names the missing processes;
and the connections stay, so that the end of one process reaches all (:mod:`jft.parallel.peers`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

from jft.parallel import coordinator as service
from jft.parallel import peers

COORDINATOR, PROCESSES, PROCESS_ID = "JFT_COORDINATOR", "JFT_NUM_PROCESSES", "JFT_PROCESS_ID"
CLUSTER = "JFT_MULTIHOST"
REFUSED = "refused: "
LATE = "jft.parallel.start() must come before the first use of JAX in this process"


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    cluster: bool | None = None,
    timeout: int = 300,
    heartbeat: int = 60,
) -> bool:
    """Connect this process to the others; true if the run has several. Call it once, before any array is made.

    coordinator ``host:port`` (process 0 listens there), processes (how many) and process_id (0, 1, ...) come from the
    arguments, else from ``JFT_COORDINATOR``, ``JFT_NUM_PROCESSES`` and ``JFT_PROCESS_ID``. Where none is given, the run is
    a single process, unless ``cluster=True`` or ``JFT_MULTIHOST=1`` asks JAX to find them itself (TPU pods, SLURM, Open
    MPI, Kubernetes).
    ``timeout``: seconds to wait for all processes. ``heartbeat``: seconds without a sign of life after which one counts as
    lost; one that is killed is noticed at once. When a process is lost (exit status 75) or ends by an error (status 1), all
    others end with one line that says which and why.

    Raises ``ValueError`` where only some of the three are given or one makes no sense, ``OSError`` where the others did not
    come in time or do not fit together, ``RuntimeError`` where JAX was already in use.
    """
    import jax

    # A second call, as from a notebook cell that is run again, is no error.
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    settings = {
        "coordinator": coordinator or os.environ.get(COORDINATOR),
        "processes": processes if processes is not None else _integer(PROCESSES),
        "process_id": process_id if process_id is not None else _integer(PROCESS_ID),
    }
    local = None
    if all(value is None for value in settings.values()):
        if not (os.environ.get(CLUSTER, "0") not in ("", "0") if cluster is None else cluster):
            return False
        settings, local = _detected(timeout)
    if timeout < 1 or heartbeat < 1:
        raise ValueError(f"timeout is {timeout} and heartbeat {heartbeat} seconds; they are at least 1")
    address, count, own_id = _validated(settings)
    arguments: dict[str, Any] = {"coordinator_address": address, "num_processes": count, "process_id": own_id}
    arguments |= {"local_device_ids": local, "initialization_timeout": timeout}
    if count == 1:
        _initialize(**arguments)
        return False
    # Before the meeting, in which the other processes would wait for one that cannot go on.
    _before_first_use()
    connections = meet(address, count, own_id, timeout)
    others = peers.connect(own_id, count, connections, heartbeat)
    server = None
    # JAX would notice a lost process by ending this one, and a long last step of another is no reason to.
    waits = {"heartbeat_timeout_seconds": 100 + 10 * heartbeat, "shutdown_timeout_seconds": 3600}
    if own_id == 0:
        server = _serve(address, count, list(waits.values()))
        # A service that nobody uses: JAX has no way to start none.
        arguments["coordinator_bind_address"] = "localhost:0"
    _initialize(**arguments, **waits)
    # Registered after JAX's own exit, and so called before it.
    atexit.register(_leave, others, server)
    return True


def _serve(address: str, processes: int, timeouts: list[int]) -> subprocess.Popen:
    """JAX's coordination service, which listens at ``address`` when this returns."""
    port = address.rpartition(":")[2]
    command = [sys.executable, service.__file__, f"[::]:{port}", str(processes), *map(str, timeouts)]
    # Its logs tell of ends that all processes hear of anyway.
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    answer = server.stdout.readline().strip() if server.stdout else ""
    if answer != service.READY:
        raise ConnectionError(f"the coordinator cannot listen on port {port}: {answer or 'its process ended'}")
    return server


def _leave(others: peers.Peers, server: subprocess.Popen | None) -> None:
    """The end of a process that has done its work: together with the others, then without the service."""
    import jax

    others.leave()
    jax.distributed.shutdown()
    if server is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            server.communicate(f"{service.END}\n", timeout=service.LINGER)


def _detected(timeout: int) -> tuple[dict[str, Any], Any]:
    """What the scheduler says of this process (TPU pods, SLURM...), and which of the host's devices are its own."""
    from jax._src import clusters  # for what `jax.distributed.initialize` would do by itself, without our meeting

    address, count, own_id, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, timeout
    )
    if address is None or count is None or own_id is None:
        raise ValueError("no cluster found; give coordinator, processes and process_id")
    return {"coordinator": address, "processes": count, "process_id": own_id}, local


def _integer(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{variable}={text!r} is not an integer") from None


def _validated(settings: dict) -> tuple[str, int, int]:
    variables = dict(zip(settings, (COORDINATOR, PROCESSES, PROCESS_ID), strict=True))
    missing = [f"{name} ({variables[name]})" for name, value in settings.items() if value is None]
    if missing:
        raise ValueError(
            f"a multi-host run needs all of coordinator, processes and process_id; missing: {', '.join(missing)}"
        )
    coordinator, processes, process_id = settings.values()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator {coordinator!r} is not host:port")
    if processes < 1 or not 0 <= process_id < processes:
        raise ValueError(f"process_id {process_id} is not one of {processes} processes; ids are 0 to processes - 1")
    return coordinator, processes, process_id


def _before_first_use() -> None:
    from jax._src import xla_bridge  # the only place that tells whether a backend exists already

    if xla_bridge.backends_are_initialized():
        raise RuntimeError(LATE)


def _initialize(**arguments: Any) -> None:
    import jax

    try:
        jax.distributed.initialize(**arguments)
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise RuntimeError(LATE) from error
        raise ConnectionError(f"JAX could not connect the processes: {error}. Did you start on every host?") from error


def meet(coordinator: str, processes: int, process_id: int, timeout: float) -> dict[int, socket.socket]:
    """Connect all of ``processes`` once they have called this: the connections of process 0 to each, of the others to it.

    Raises ``OSError`` after ``timeout`` seconds, or where two do not fit together.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        return _gather(int(port), processes, deadline, timeout)
    # An IPv6 address is in brackets before a port; sockets take it without.
    return {0: _join(host.strip("[]"), int(port), processes, process_id, deadline, timeout)}


def _gather(port: int, processes: int, deadline: float, timeout: float) -> dict[int, socket.socket]:
    """Process 0: a connection from every other process, then a ``go`` to all."""
    connections: dict[int, socket.socket] = {}
    try:
        with _listen(port, deadline) as server:
            while len(connections) < processes - 1:
                # A timeout of 0 would mean not to wait at all, and to fail in another way.
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, processes)) - set(connections))
                    raise TimeoutError(
                        f"after {timeout:g} s, processes {', '.join(map(str, missing))} of {processes} have not come to the "
                        f"coordinator (process 0, port {port}). Did you start on every host, with the same coordinator, "
                        "and can the hosts reach that port?"
                    ) from None
                _register(connection, processes, connections)
        for connection in connections.values():
            connection.sendall(b"go\n")
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    return connections


def _listen(port: int, deadline: float) -> socket.socket:
    # The service of a run before this one may have the port for a few seconds more.
    deadline = min(deadline, time.monotonic() + 2 * service.LINGER)
    while True:
        try:
            # Hosts may know the coordinator by an address of either protocol.
            if socket.has_dualstack_ipv6():
                # All hosts of a pod may connect in the same moment.
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() + 0.2 >= deadline:
                reason = f"the coordinator cannot listen on port {port}: {error.strerror}; choose another"
                raise ConnectionError(reason) from error
            time.sleep(0.2)


def _register(connection: socket.socket, processes: int, connections: dict[int, socket.socket]) -> None:
    """A new connection into ``connections``; one that does not speak this protocol is closed."""
    # A stranger that connects and sends nothing must not delay the others.
    connection.settimeout(10)
    try:
        # Bounded, and not necessarily text: anything may connect to an open port.
        hello = json.loads(_line(connection))
        sender, count = int(hello["process_id"]), int(hello["processes"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        connection.close()
        return
    problem = None
    if count != processes:
        problem = f"process {sender} was started for {count} processes, process 0 for {processes}"
    elif sender in connections:
        problem = f"two processes were started with process_id {sender}"
    if problem is None:
        connections[sender] = connection
        return
    # Every process gets the reason, not only the one that was last.
    for other in [connection, *connections.values()]:
        other.sendall(f"{REFUSED}{problem}\n".encode())
    connection.close()
    raise ConnectionError(problem)


def _join(host: str, port: int, processes: int, process_id: int, deadline: float, timeout: float) -> socket.socket:
    """Any other process: connect to the coordinator, send the process id, wait for ``go``."""
    message = (
        f"process {process_id}: the {processes} processes did not meet at {host}:{port} within {timeout:g} s. Did you start "
        "on every host, with the same coordinator, and can the hosts reach that port?"
    )
    # At the port there may still be the service of a run before this one.
    patience = time.monotonic() + 2 * service.LINGER
    while True:
        connection = _connect(host, port, deadline, message)
        try:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            connection.sendall(json.dumps({"process_id": process_id, "processes": processes}).encode() + b"\n")
            answer = _line(connection)
        except TimeoutError:
            connection.close()
            raise TimeoutError(message) from None
        except OSError:
            answer = ""
        if answer == "go":
            return connection
        connection.close()
        if answer.startswith(REFUSED):
            raise ConnectionError(answer.removeprefix(REFUSED))
        if time.monotonic() > min(patience, deadline):
            raise ConnectionError(
                f"process {process_id}: {host}:{port} does not answer like a coordinator that waits for processes. Is the run "
                "under way already (a process_id given twice), or does another program use that port?"
            )
        time.sleep(0.5)


def _line(connection: socket.socket) -> str:
    """A short line, and nothing of what comes after it."""
    line = b""
    while len(line) < 1000 and not line.endswith(b"\n"):
        piece = connection.recv(1)
        if not piece:
            break
        line += piece
    return line.decode(errors="replace").strip()


def _connect(host: str, port: int, deadline: float, message: str) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001))
        # Nobody listens before process 0 has come this far: try again.
        except OSError as error:
            if time.monotonic() + 0.2 >= deadline:
                raise TimeoutError(f"{message} ({error})") from error
            time.sleep(0.2)
