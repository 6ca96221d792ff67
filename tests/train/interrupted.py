"""A tiny run in a process of its own, for tests that stop it: python -m tests.train.interrupted WORKDIR STEPS."""

import sys
import time

import jft
from jft.train import Preempted
from tests.train import tools


class Slow:
    """Batches that come slowly enough to be interrupted between, from an iterator that tells its position as bytes."""

    def __init__(self):
        self.batches, self.drawn = tools.batches(7), 0

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(0.005)
        self.drawn += 1
        return self.batches[(self.drawn * 5) % 7]

    def get_state(self):
        return str(self.drawn).encode()

    def set_state(self, state):
        self.drawn = int(state)


def main(workdir: str, steps: str) -> None:
    try:
        jft.finetune(
            tools.apply, tools.parameters(), Slow(), steps=int(steps), workdir=workdir, seed=3,
            optimizer={"lr": 1e-2, "schedule": "cosine", "warmup": 5}, checkpoint={"every": 7}, log=1,
        )  # fmt: skip
    except Preempted as stopped:
        print(stopped, flush=True)
        raise
    heavy = {"torch", "transformers", "tensorflow"} & set(sys.modules)
    print(f"heavy modules: {sorted(heavy)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
