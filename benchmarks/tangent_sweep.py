"""A sweep of 21 coefficients of 8 task vectors in the tangent space, beside 8 and 168 evaluations one by one.

    python benchmarks/tangent_sweep.py --out benchmarks/results/tangent_sweep_cpu.json

The models are those of configs/quickstart.py, the vision transformer of the digits (64 images a batch) and the decoder of
bytes (16 rows of 64), and a decoder with more to do before its outputs (4 layers, width 256, vocabulary 1024, one batch of
4 rows of 64); weights and data are random, and so are the task vectors: of all weights (``full``), of rank 4 in the matrices
of the layers (``low_rank``), or a tenth of their blocks of 8 x 8 (``blocks``). ``jft.tangent.sweep`` is timed as it is
called, its preparation included. Beside it, everything compiled, weights and vectors as arguments, on the same batches: 8
*single* evaluations of ``f_lin(tau_t)``, one for each vector; all 168 of ``f_lin(c tau_t)``, once; and 8 *ordinary* ones of
``f(theta0 + tau_t)``. Sides alternate, ``--repeats`` times; medians of wall and of CPU seconds of the process. FLOPs are
those of ``cost_analysis`` of the compiled programs for one batch, layers unrolled and all points in one piece, so that no
loop is counted once for all its turns. The tables are compared entry by entry.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import jft
from jft import delta, tangent, tree
from jft.models import Classifier, DecoderConfig, Model, VisionConfig
from jft.tangent import Linearized
from jft.train.evaluation import batch_sums
from jft.train.objectives import Classification, LanguageModel

TASKS, POINTS = 8, np.linspace(0, 1, 21)


def vision(batches: int):
    backbone = VisionConfig(image=8, patch=2, channels=1, width=64, layers=2, heads=4, hidden=256)
    model = Model(Classifier(backbone, classes=10, pool="mean"))
    rng = np.random.default_rng(0)
    data = [
        {"images": rng.standard_normal((64, 8, 8, 1), np.float32), "labels": rng.integers(0, 10, 64).astype(np.int32)}
        for _ in range(batches)
    ]
    return model, data, Classification()


def decoder(batches: int):
    model = Model(DecoderConfig(vocab=256, width=64, layers=2, heads=4))
    rng = np.random.default_rng(0)
    return model, [{"tokens": rng.integers(0, 256, (16, 64)).astype(np.int32)} for _ in range(batches)], LanguageModel()


def wider_decoder(batches: int):
    model = Model(DecoderConfig(vocab=1024, width=256, layers=4, heads=4))
    tokens = np.random.default_rng(0).integers(0, 1024, (4, 64)).astype(np.int32)
    return model, [{"tokens": tokens}], LanguageModel()


def vector(kind: str, params, seed: int) -> delta.TaskVector:
    """A random change a tenth as large as the weights."""
    rng, deltas = np.random.default_rng(seed), {}
    for path, w in tree.flatten(params).items():
        x = 0.1 * float(jnp.std(w) + 0.01) * rng.standard_normal(w.shape).astype(np.float32)
        matrix = path.endswith("/w") and "layers/" in path
        if kind == "full":
            deltas[path] = delta.Dense(jnp.asarray(x))
        elif matrix and kind == "low_rank":
            deltas[path] = delta.LowRank(
                jnp.asarray(x[..., :4]), jnp.asarray(rng.standard_normal(x[..., :4, :].shape), jnp.float32)
            )
        elif matrix:
            grid = (*w.shape[:-2], w.shape[-2] // 8, w.shape[-1] // 8)
            indices = np.argwhere(rng.random(grid) < 0.1).astype(np.int32)
            deltas[path] = delta.Blocks(jnp.asarray(indices), jnp.asarray(x.reshape(-1, 8, 8)[: len(indices)]), w.shape)
    return delta.TaskVector(deltas)


class Sides:
    """The programs to compare, for one model and kind of task vector."""

    def __init__(self, make, kind: str, batches: int) -> None:
        self.model, self.batches, self.objective = make(batches)
        self.params = self.model.init(jax.random.key(0))
        self.f_lin = jft.linearize(self.model.apply, self.params)
        self.taus = [vector(kind, self.params, seed) for seed in range(TASKS)]
        self.directions = [self.f_lin.direction(tau) for tau in self.taus]
        self.grid = np.concatenate([POINTS[:, None] * np.eye(TASKS)[t] for t in range(TASKS)])
        self.merged = jax.jit(lambda params, tau: delta.apply(params, tau, check=False))
        self.evaluate = jax.jit(self._evaluate)
        self.ordinary = jax.jit(lambda params, batch: self.score(self.model.apply(params, batch), batch))

    def score(self, outputs, batch):
        return batch_sums(self.objective, outputs, batch)

    def _evaluate(self, params, direction, c, batch):
        f0, moved = Linearized(self.model.apply, params).parts(direction, batch)
        return self.score(jax.tree.map(lambda y, dy: y + c * dy, f0, moved), batch)

    def mean(self, compute) -> dict[str, float]:
        sums = [jax.device_get(compute(batch)) for batch in self.batches]
        weight = sum(float(s["weight"]) for s in sums)
        return {k: sum(float(s[k]) for s in sums) / weight for k in ("loss", "accuracy")}

    def sweep(self):
        return tangent.sweep(self.f_lin, self.taus, self.batches, self.score, self.grid)

    def single(self, points=(1.0,)):
        rows = [
            self.mean(lambda batch: self.evaluate(self.params, d, np.float32(c), batch))  # noqa: B023
            for d in self.directions
            for c in points
        ]
        return {k: np.array([row[k] for row in rows]) for k in rows[0]}

    def every(self):
        return self.single(POINTS)

    def ordinarily(self):
        for tau in self.taus:
            params = self.merged(self.params, tau)
            self.mean(lambda batch: self.ordinary(params, batch))  # noqa: B023


def flops(make, kind: str) -> dict[str, float]:
    """Of one batch, by compiled program."""
    sides = Sides(lambda n: (lambda m, *rest: (m.with_(unroll=0), *rest))(*make(n)), kind, 1)
    module = sys.modules["jft.tangent.sweep"]
    kept, module._POINTS_BYTES = module._POINTS_BYTES, 2**50
    program = module._read(sides.model.apply, None, sides.score, None)
    given = (sides.params, sides.directions, module._compact(sides.grid), sides.batches[0])
    cost = lambda fn, *args: fn.lower(*args).compile().cost_analysis()["flops"]
    found = {
        "sweep": cost(program, *given),
        "single": TASKS * cost(sides.evaluate, sides.params, sides.directions[0], np.float32(1), sides.batches[0]),
        "ordinary": TASKS * cost(sides.ordinary, sides.params, sides.batches[0]),
    }
    module._POINTS_BYTES = kept
    return found


def timed(run) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(make, kind: str, batches: int, repeats: int) -> dict:
    sides = Sides(make, kind, batches)
    runs = {"sweep": sides.sweep, "single": sides.single, "ordinary": sides.ordinarily}
    for run in runs.values():
        run()
    table = sides.sweep()
    expected: dict[str, np.ndarray] = {}
    every = timed(lambda: expected.update(sides.every()))
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run))
    seconds = {name: [statistics.median(t[i] for t in found) for i in (0, 1)] for name, found in times.items()}
    counted = flops(make, kind)
    return {
        "seconds": {name: wall for name, (wall, _) in seconds.items()} | {"168 single": every[0]},
        "cpu_seconds": {name: cpu for name, (_, cpu) in seconds.items()} | {"168 single": every[1]},
        "flops": counted,
        "sweep_over_8_single": {
            "seconds": seconds["sweep"][0] / seconds["single"][0],
            "cpu_seconds": seconds["sweep"][1] / seconds["single"][1],
            "flops": counted["sweep"] / counted["single"],
        },
        "sweep_over_8_ordinary": {
            "seconds": seconds["sweep"][0] / seconds["ordinary"][0],
            "flops": counted["sweep"] / counted["ordinary"],
        },
        "largest_difference": {k: float(np.abs(table[k] - expected[k]).max()) for k in expected},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kinds", default="full,low_rank,blocks")
    parser.add_argument("--out", type=Path, help="write the figures here")
    args = parser.parse_args()
    found = {}
    for make in (vision, decoder, wider_decoder):
        for kind in args.kinds.split(","):
            found[f"{make.__name__}, {kind}"] = row = measure(make, kind, args.batches, args.repeats)
            print(make.__name__, kind, json.dumps(row, indent=1), flush=True)
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "processor": platform.machine()}
    versions = {"jax": jax.__version__, "jft": jft.__version__, "python": platform.python_version()}
    if args.out:
        args.out.write_text(json.dumps({**found, "machine": machine, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
