"""Plain and blockwise attention by the number of tokens: memory and seconds of an ordinary and of a linearized step.

    python benchmarks/attention.py --json benchmarks/results/attention_cpu.json

A decoder of two layers (width 256, four heads, vocabulary 256), one row of T tokens, float32. The ordinary step is the
gradient of the loss in all parameters; the linearized one that of the loss of ``f(theta0) + J(theta0) tau`` in a dense tau.
Memory is what XLA's buffer assignment gives the compiled program beyond arguments and results. Steps are run, blockwise and
plain in turn, where that is at most ``--gigabytes``; seconds are medians, of the wall and of all cores' time.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import jft
from jft.models import DecoderConfig, Execution, Model

CONFIG = DecoderConfig(vocab=256, width=256, layers=2, heads=4, hidden=512)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="run what takes at most so much memory")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, after one that warms up")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    return parser.parse_args()


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    ahead = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(ahead)


def steps(model: Model) -> dict[str, Any]:
    def ordinary(params: Any, tau: Any, tokens: jax.Array) -> jax.Array:
        return loss(model.apply(params, tokens), tokens)

    def linearized(params: Any, tau: Any, tokens: jax.Array) -> jax.Array:
        return loss(jft.linearize(model.apply, params)(tau, tokens), tokens)

    return {"ordinary": jax.grad(ordinary), "linearized": jax.grad(linearized, argnums=1)}


def measured(length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each step and kind of attention."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (1, length)).astype(np.int32)
    params = Model(CONFIG).init(jax.random.key(0))
    tau = jax.tree.map(lambda x: 0.01 * x, params)
    rows = []
    for step in ("ordinary", "linearized"):
        programs, here = {}, {}
        for kind in ("blockwise", "plain"):
            model = Model(CONFIG, Execution(attention=kind, attention_block=options.block))  # type: ignore[arg-type]
            start = time.process_time()
            compiled = jax.jit(steps(model)[step]).lower(params, tau, tokens).compile()
            size = compiled.memory_analysis().temp_size_in_bytes
            here[kind] = {"tokens": length, "step": step, "attention": kind, "temporaries": size}
            here[kind]["compile_cpu_seconds"] = round(time.process_time() - start, 2)
            if size <= options.gigabytes * 2**30:
                programs[kind] = compiled
        for kind, times in timed(programs, (params, tau, tokens), options.repeats).items():
            wall, cpu = (statistics.median(x) for x in zip(*times, strict=True))
            here[kind] |= {"seconds": round(wall, 4), "cpu_seconds": round(cpu, 4)}
        rows += here.values()
    return rows


def timed(programs: dict[str, Any], given: tuple, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each program's runs, the programs in turn."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in programs}
    for _ in range(repeats + 1):
        for kind, program in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*given))
            found[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {kind: times[1:] for kind, times in found.items()}


def main() -> None:
    options = arguments()
    rows = []
    for length in map(int, options.tokens.split(",")):
        rows += measured(length, options)
        for row in rows[-4:]:
            print(json.dumps(row), flush=True)
    if options.json:
        about = {
            "jax": jax.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
        }
        options.json.write_text(json.dumps({"about": about, "block": options.block, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
