"""Joining the processes of a multi-host run."""

from __future__ import annotations

import os
from typing import Any

from jft.parallel.rendezvous import meet

COORDINATOR, PROCESSES, PROCESS_ID = "JFT_COORDINATOR", "JFT_NUM_PROCESSES", "JFT_PROCESS_ID"
CLUSTER = "JFT_MULTIHOST"
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

    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    given = {
        "coordinator": coordinator or os.environ.get(COORDINATOR),
        "processes": processes if processes is not None else _integer(PROCESSES),
        "process_id": process_id if process_id is not None else _integer(PROCESS_ID),
    }
    if all(value is None for value in given.values()):
        if not (os.environ.get(CLUSTER, "0") != "0" if cluster is None else cluster):
            return False
        _initialize(timeout)
        return jax.process_count() > 1
    address, count, own = _checked(given)
    if count > 1:
        _before_first_use()
        meet(address, count, own, timeout)
    _initialize(timeout, coordinator_address=address, num_processes=count, process_id=own)
    return count > 1


def _integer(variable: str) -> int | None:
    written = os.environ.get(variable)
    if not written:
        return None
    try:
        return int(written)
    except ValueError:
        raise ValueError(f"{variable}={written!r} is not an integer") from None


def _checked(given: dict) -> tuple[str, int, int]:
    variables = dict(zip(given, (COORDINATOR, PROCESSES, PROCESS_ID), strict=True))
    missing = [f"{name} ({variables[name]})" for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"a multi-host run needs all of coordinator, processes and process_id; missing: {', '.join(missing)}"
        )
    coordinator, processes, process_id = given.values()
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
