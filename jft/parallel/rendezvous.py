"""All processes meet in plain sockets before JAX connects them.

JAX's own client aborts the interpreter when a process is missing, which no caller can catch or explain. Meeting first
gives an exception instead, and names who is missing.
"""

from __future__ import annotations

import json
import socket
import time

REFUSED = "refused: "


def meet(coordinator: str, processes: int, process_id: int, timeout: float) -> None:
    """Return once all of ``processes`` have called this; ``RuntimeError`` after ``timeout`` seconds or on a clash."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _gather(int(port), processes, deadline, timeout)
    else:
        _join(host.strip("[]"), int(port), processes, process_id, deadline, timeout)


def _gather(port: int, processes: int, deadline: float, timeout: float) -> None:
    """Process 0: hear from every other process, then let all go."""
    joined: dict[int, socket.socket] = {}
    try:
        with _listen(port) as server:
            while len(joined) < processes - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, processes)) - set(joined))
                    raise RuntimeError(
                        f"after {timeout:g} s, processes {', '.join(map(str, missing))} of {processes} have not come to the "
                        f"coordinator (process 0, port {port}). Did you start on every host, with the same coordinator, "
                        "and can the hosts reach that port?"
                    ) from None
                _welcome(connection, processes, joined)
        for connection in joined.values():
            connection.sendall(b"go\n")
            connection.recv(1)  # the other side closes first, so that the port is free for JAX
    finally:
        for connection in joined.values():
            connection.close()


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise RuntimeError(f"the coordinator cannot listen on port {port}: {error.strerror}; choose another") from error


def _welcome(connection: socket.socket, processes: int, joined: dict[int, socket.socket]) -> None:
    """Note who is there; what does not speak this protocol is hung up on."""
    connection.settimeout(10)
    try:
        hello = json.loads(connection.makefile(errors="replace").readline(1000))
        who, count = int(hello["process_id"]), int(hello["processes"])
    except (OSError, ValueError, TypeError, KeyError):
        connection.close()
        return
    problem = None
    if count != processes:
        problem = f"process {who} was started for {count} processes, process 0 for {processes}"
    elif who in joined:
        problem = f"two processes were started with process_id {who}"
    if problem is None:
        joined[who] = connection
        return
    for other in [connection, *joined.values()]:
        other.sendall(f"{REFUSED}{problem}\n".encode())
    connection.close()
    raise RuntimeError(problem)


def _join(host: str, port: int, processes: int, process_id: int, deadline: float, timeout: float) -> None:
    """Another process: find the coordinator, say who this is, wait for the word."""
    late = (
        f"process {process_id}: the {processes} processes did not meet at {host}:{port} within {timeout:g} s. Did you start "
        "on every host, with the same coordinator, and can the hosts reach that port?"
    )
    with _connect(host, port, deadline, late) as connection:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection.sendall(json.dumps({"process_id": process_id, "processes": processes}).encode() + b"\n")
            word = connection.makefile(errors="replace").readline().strip()
        except OSError:
            raise RuntimeError(late) from None
    if word.startswith(REFUSED):
        raise RuntimeError(word.removeprefix(REFUSED))
    if word != "go":
        raise RuntimeError(
            f"process {process_id}: {host}:{port} does not answer like a coordinator that waits for processes. Is the run "
            "under way already (a process_id given twice), or does another program use that port?"
        )


def _connect(host: str, port: int, deadline: float, late: str) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001))
        except OSError as error:
            if time.monotonic() + 0.2 >= deadline:
                raise RuntimeError(f"{late} ({error})") from error
            time.sleep(0.2)
