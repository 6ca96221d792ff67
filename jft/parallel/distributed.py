"""Joining the processes of a multi-host run.

All processes meet in plain sockets before JAX connects them: JAX's own client aborts the interpreter when a process is
missing, which no caller can catch or explain. Meeting first gives an exception instead, which names the missing processes.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

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
) -> bool:
    """Connect this process to the others; true if the run has several. Call it once, before any array is made.

    coordinator ``host:port`` (process 0 listens there), processes (how many) and process_id (0, 1, ...) come from the
    arguments, else from ``JFT_COORDINATOR``, ``JFT_NUM_PROCESSES`` and ``JFT_PROCESS_ID``. Where none is given, the run is
    a single process, unless ``cluster=True`` or ``JFT_MULTIHOST=1`` asks JAX to find them itself (TPU pods, SLURM, Open
    MPI, Kubernetes).
    ``timeout``: seconds to wait for all processes; with ``cluster=True`` JAX ends the process when they are over.

    Raises ``ValueError`` where only some of the three are given or one makes no sense, ``RuntimeError`` where JAX was
    already in use or the others did not come in time.
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
    if all(value is None for value in settings.values()):
        if not (os.environ.get(CLUSTER, "0") != "0" if cluster is None else cluster):
            return False
        _initialize(timeout)
        return jax.process_count() > 1
    address, count, own_id = _validated(settings)
    if count > 1:
        # Before the meeting, in which the other processes would wait for one that cannot go on.
        _before_first_use()
        meet(address, count, own_id, timeout)
    _initialize(timeout, coordinator_address=address, num_processes=count, process_id=own_id)
    return count > 1


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


def _initialize(timeout: int, **arguments: Any) -> None:
    import jax

    try:
        jax.distributed.initialize(initialization_timeout=timeout, **arguments)
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise RuntimeError(LATE) from error
        raise RuntimeError(f"JAX could not connect the processes: {error}. Did you start on every host?") from error
    except ValueError as error:
        raise ValueError(f"no cluster found ({error}); give coordinator, processes and process_id") from error


def meet(coordinator: str, processes: int, process_id: int, timeout: float) -> None:
    """Return once all of ``processes`` have called this; ``RuntimeError`` after ``timeout`` seconds or on a clash."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _gather(int(port), processes, deadline, timeout)
    else:
        # An IPv6 address is in brackets before a port; sockets take it without.
        _join(host.strip("[]"), int(port), processes, process_id, deadline, timeout)


def _gather(port: int, processes: int, deadline: float, timeout: float) -> None:
    """Process 0: a connection from every other process, then a ``go`` to all."""
    connections: dict[int, socket.socket] = {}
    try:
        with _listen(port) as server:
            while len(connections) < processes - 1:
                # A timeout of 0 would mean not to wait at all, and to fail in another way.
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, processes)) - set(connections))
                    raise RuntimeError(
                        f"after {timeout:g} s, processes {', '.join(map(str, missing))} of {processes} have not come to the "
                        f"coordinator (process 0, port {port}). Did you start on every host, with the same coordinator, "
                        "and can the hosts reach that port?"
                    ) from None
                _register(connection, processes, connections)
        for connection in connections.values():
            connection.sendall(b"go\n")
            connection.recv(1)  # the other side closes first, so that the port is free for JAX
    finally:
        for connection in connections.values():
            connection.close()


def _listen(port: int) -> socket.socket:
    try:
        # Hosts may know the coordinator by an address of either protocol.
        if socket.has_dualstack_ipv6():
            # All hosts of a pod may connect in the same moment.
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise RuntimeError(f"the coordinator cannot listen on port {port}: {error.strerror}; choose another") from error


def _register(connection: socket.socket, processes: int, connections: dict[int, socket.socket]) -> None:
    """A new connection into ``connections``; one that does not speak this protocol is closed."""
    # A stranger that connects and sends nothing must not delay the others.
    connection.settimeout(10)
    try:
        # Bounded, and not necessarily text: anything may connect to an open port.
        hello = json.loads(connection.makefile(errors="replace").readline(1000))
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
    raise RuntimeError(problem)


def _join(host: str, port: int, processes: int, process_id: int, deadline: float, timeout: float) -> None:
    """Any other process: connect to the coordinator, send the process id, wait for ``go``."""
    message = (
        f"process {process_id}: the {processes} processes did not meet at {host}:{port} within {timeout:g} s. Did you start "
        "on every host, with the same coordinator, and can the hosts reach that port?"
    )
    with _connect(host, port, deadline, message) as connection:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection.sendall(json.dumps({"process_id": process_id, "processes": processes}).encode() + b"\n")
            answer = connection.makefile(errors="replace").readline().strip()
        except OSError:
            raise RuntimeError(message) from None
    if answer.startswith(REFUSED):
        raise RuntimeError(answer.removeprefix(REFUSED))
    if answer != "go":
        raise RuntimeError(
            f"process {process_id}: {host}:{port} does not answer like a coordinator that waits for processes. Is the run "
            "under way already (a process_id given twice), or does another program use that port?"
        )


def _connect(host: str, port: int, deadline: float, message: str) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001))
        # Nobody listens before process 0 has come this far: try again.
        except OSError as error:
            if time.monotonic() + 0.2 >= deadline:
                raise RuntimeError(f"{message} ({error})") from error
            time.sleep(0.2)
