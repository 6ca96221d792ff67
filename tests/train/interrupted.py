"""A tiny run in a process (or several) of its own, for tests that stop it: python -m tests.train.interrupted WORKDIR STEPS."""

import atexit
import os
import sys
import time

import jax

import jft
from tests.train import tools


class Slow:
    """This process's rows of batches that come slowly enough to be interrupted between; its position is bytes."""

    def __init__(self):
        self.batches, self.drawn = tools.batches(7), 0

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(0.005)
        self.drawn += 1
        batch, rows = self.batches[(self.drawn * 5) % 7], 8 // jax.process_count()
        start = rows * jax.process_index()
        return {k: x[start : start + rows] for k, x in batch.items()}

    def get_state(self):
        return f"{self.drawn} of process {jax.process_index()}".encode()

    def set_state(self, state):
        drawn, process = state.decode().split(" of process ")
        assert int(process) == jax.process_index(), "each process gets its own position back"
        self.drawn = int(drawn)


def main(workdir: str, steps: str) -> None:
    jft.parallel.start()
    jft.finetune(
        tools.apply, tools.parameters(), Slow(), steps=int(steps), workdir=workdir, seed=3,
        optimizer={"lr": 1e-2, "schedule": "cosine", "warmup": 5}, checkpoint={"every": 7}, log=1,
    )  # fmt: skip
    heavy = {"torch", "transformers", "tensorflow"} & set(sys.modules)
    print(f"heavy modules: {sorted(heavy)}", flush=True)


def forked(output, workdir: str, steps: str, environment: dict[str, str]) -> None:
    """The same in a fork of a process that has imported all of it; what it prints goes through the connection ``output``."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
    os.environ |= environment
    try:
        main(workdir, steps)
    finally:
        # Which processes of multiprocessing leave out: the others would take this one for lost.
        atexit._run_exitfuncs()


if __name__ == "__main__":
    main(*sys.argv[1:])
