"""JAX's coordination service as a program of its own: it outlives process 0 for some seconds.

JAX runs the service inside process 0, and where that is killed its client aborts every other process at once, in C++. With
the service beside it, the others go on until :mod:`jft.parallel.peers` ends them, with a reason.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

# Seconds after the end of process 0 in which the others end.
LINGER = 5.0
READY, END = "ready", "end"


def main(address: str, processes: str, heartbeat: str, shutdown: str) -> int:
    """Serve ``processes`` processes on ``address`` until the parent says so, or is gone."""
    parent = os.getppid()
    # They are for the run, which may want to save first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The library alone: importing jax would take longer than all else here.
    from jaxlib import _jax

    try:
        options = {"heartbeat_timeout": int(heartbeat), "shutdown_timeout": int(shutdown)}
        service = _jax.get_distributed_runtime_service(address, int(processes), **options)
    except Exception as error:
        print(str(error).splitlines()[0], flush=True)
        return 1
    print(READY, flush=True)
    # Not by the end of the pipe alone, which workers of the parent may hold open.
    while os.getppid() == parent and not select.select([sys.stdin], [], [], 0.5)[0]:
        pass
    if sys.stdin.readline().strip() == END:
        service.shutdown()
    else:
        time.sleep(LINGER)
    return 0


if __name__ == "__main__":
    # Without destructors, which wait for clients that are gone.
    os._exit(main(*sys.argv[1:]))
