"""The cost of digests: seconds to save a state of 100M parameters (1.2 GB with Adam's moments), with and without them.

python -m tests.faults.digest_cost [DIRECTORY]
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jft.train import checkpoints, digests

PARAMETERS, REPEATS = 100_000_000, 3


def seconds(folder: Path, state: dict) -> float:
    """One save, to its end."""
    saver = checkpoints.Checkpoints(folder / "checkpoints", checkpoints.Checkpointing(), {})
    since = time.perf_counter()
    saver.save(state, 1, None)
    saver.close()
    elapsed = time.perf_counter() - since
    shutil.rmtree(folder / "checkpoints")
    return elapsed


def main() -> None:
    """Print both times, each the median of alternate saves, and their ratio."""
    keys = jax.random.split(jax.random.key(0), 3)
    state = {n: jax.random.normal(k, (PARAMETERS // 1000, 1000), jnp.float32) for n, k in zip("wmv", keys, strict=True)}
    write, times = digests.write, {"with": [], "without": []}
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        seconds(Path(folder), state)  # warms the disk and Orbax
        for _ in range(REPEATS):
            for name, function in (("without", lambda folder, step: None), ("with", write)):
                digests.write = function
                times[name].append(seconds(Path(folder), state))
    one, other = (statistics.median(times[name]) for name in ("with", "without"))
    print(f"with digest {one:.2f} s, without {other:.2f} s: ratio {one / other:.3f}")


if __name__ == "__main__":
    main()
