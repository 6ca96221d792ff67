"""Start one command as several processes of one program on this machine.

    python launch/local.py --processes 2 --devices 4 -- jft train --config=configs/decoder_sft.py --workdir=runs/two

Each process gets its own fake CPU devices (--devices) and the three variables by which jft finds the others:
JFT_COORDINATOR, JFT_NUM_PROCESSES, JFT_PROCESS_ID. Output lines carry the process number. When one process fails, the
others are stopped, and its exit code is returned; Ctrl-C and SIGTERM are passed on to all, so that each can save.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What process number ``process`` of ``processes`` runs with."""
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "JFT_COORDINATOR": f"127.0.0.1:{port}",
        "JFT_NUM_PROCESSES": str(processes),
        "JFT_PROCESS_ID": str(process),
    }


def relay(process: int, stream) -> None:
    """Print a process's lines under its number."""
    for line in stream:
        print(f"[{process}] {line}", end="", flush=True)


def stop(children: list[subprocess.Popen], signum: int = signal.SIGTERM) -> None:
    """Pass a signal on to all that still run."""
    for child in children:
        if child.poll() is None:
            child.send_signal(signum)


def run(command: list[str], processes: int, devices: int, port: int = 0) -> int:
    """Run ``command`` in all processes to the end; the first failure's exit code, or 0. port: 0 for a free one."""
    port = port or free_port()
    children = [
        subprocess.Popen(command, env=environment(i, processes, devices, port), stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, bufsize=1)
        for i in range(processes)
    ]  # fmt: skip
    threads = [threading.Thread(target=relay, args=(i, c.stdout), daemon=True) for i, c in enumerate(children)]
    for thread in threads:
        thread.start()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: stop(children, number))
    code = wait(children)
    for thread in threads:
        thread.join(timeout=5)
    return code


def wait(children: list[subprocess.Popen]) -> int:
    """Wait for all; when one fails, give the others ten seconds to end, then kill them."""
    code = 0
    running = list(children)
    while running:
        for child in list(running):
            try:
                child.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            running.remove(child)
            if child.returncode and not code:
                code = child.returncode
                stop(running)
                deadline = threading.Timer(10, lambda rest=tuple(running): [c.kill() for c in rest if c.poll() is None])
                deadline.daemon = True
                deadline.start()
    return code if code >= 0 else 128 - code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many processes")
    parser.add_argument("--devices", type=int, default=4, help="fake CPU devices in each")
    parser.add_argument("--port", type=int, default=0, help="where they meet (default: a free one)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command given: put it after --")
    if args.processes < 1 or args.devices < 1:
        parser.error("--processes and --devices are at least 1")
    return run(command, args.processes, args.devices, args.port)


if __name__ == "__main__":
    sys.exit(main())
