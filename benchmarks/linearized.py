"""A linearized training step beside the same step in torch: ``torch.func.jvp``, then backward. Same weights, same run.

    python benchmarks/linearized.py --out benchmarks/results/linearized_cpu.json

Both train tau in ``f(theta0) + J tau`` with AdamW from zero, clip the global norm at 1, and are given the same tokens; the
losses of the first steps are compared before anything is timed. torch's side is dense whatever jft's tau is: there is no
other there. Each round makes one step of every side; medians, and FLOPs and peak memory of the compiled programs over
those of the ordinary full step. Needs the ``peers`` extra.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from throughput import torch_model, versions

import jft
from jft import parallel, tree
from jft.bench.step import by_chance, drawn
from jft.train import feed, step
from jft.train.objectives import objective
from jft.train.optimizers import optimizer
from jft.train.state import hold

SIDES = {
    "full": ("full", {}),
    "full, linearized": ("full", {"forward": "linearized"}),
    "block_sparse 5%, linearized": ("block_sparse", {"density": 0.05, "block": (64, 64), "forward": "linearized"}),
    "rows (s2ft), linearized": ("s2ft", {"forward": "linearized"}),
}
TORCH = "torch.func.jvp + backward"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("width", 768), ("hidden", 2048), ("heads", 12), ("vocab", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="timed rounds, after two to warm up")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here as JSON")
    return parser.parse_args()


def torch_step(model):
    """A function of tokens that makes one linearized step and returns the loss before it."""
    import torch

    model.set_attn_implementation("eager")  # the fused ones have no forward derivative
    base = {name: p.detach() for name, p in model.named_parameters()}
    tau = {name: torch.zeros_like(p).requires_grad_() for name, p in base.items()}
    update = torch.optim.AdamW(tau.values(), lr=1e-4, weight_decay=0.0)

    def run(tokens: np.ndarray) -> float:
        ids = torch.tensor(tokens, dtype=torch.long)

        def outputs(parameters):
            return torch.func.functional_call(model, parameters, (ids,)).logits

        f0, moved = torch.func.jvp(outputs, (base,), (tau,))
        logits = (f0 + moved)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        update.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tau.values(), 1.0)
        update.step()
        return loss.item()

    return run


def jft_step(model, params, name: str, options: dict, shape: tuple[int, int]):
    """``(run, cost)``: a function of tokens that makes the step of :func:`jft.finetune`; FLOPs and bytes of its program."""
    plan = by_chance(jft.method(name, **options)).plan(params, model)
    chosen = drawn(plan, params, model)
    adamw = optimizer({"name": "adamw", "lr": 1e-4, "weight_decay": 0.0, "clip": 1.0})
    recipe = step.Recipe(model.apply, plan, objective("lm"), adamw, dtype=model.execution.dtype)
    update = step.compile_step(recipe, params, chosen, None)
    compiled = update.compiled({"tokens": jax.ShapeDtypeStruct(shape, np.int32)})
    memory = parallel.estimate(compiled)
    cost = {"flops": step.flops(compiled), "peak": memory.total, "trained": tree.count(update.holdings.state.trained)}
    held = hold(update, params, chosen, seed=0)

    def run(tokens: np.ndarray) -> float:
        nonlocal held
        batch = feed.put({"tokens": tokens.astype(np.int32)}, update.layout)
        held, out = update(held, batch, np.float32(1e-4), np.asarray(True))
        return float(out["loss"])

    return run, cost


def main() -> None:
    args = arguments()
    args.dtype = "float32"
    theirs = torch_model(args)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, params = jft.load(folder, dtype="float32")
    model = model.with_(unroll=0)
    made = {label: jft_step(model, params, *how, (args.batch, args.tokens)) for label, how in SIDES.items()}
    sides = {TORCH: torch_step(theirs)} | {label: run for label, (run, _) in made.items()}
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, args.vocab, (args.batch, args.tokens)) for _ in range(args.steps + 2)]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for n, batch in enumerate(batches):
        losses = {}
        for name, run in sides.items():
            began = time.perf_counter()
            losses[name] = run(batch)
            seconds[name].append(time.perf_counter() - began)
        if n < 2 and abs(losses["full, linearized"] - losses[TORCH]) > 1e-3:
            raise SystemExit(f"losses of step {n} differ, so the sides compute different things: {losses}")
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    full = made["full"][1]
    rows = []
    for name, took in medians.items():
        row = {"step": name, "seconds": round(took, 3), "torch_over_this": round(medians[TORCH] / took, 3)}
        if name in made:
            cost = made[name][1]
            row |= {"of_full": round(took / medians["full"], 3), "trained": cost["trained"]}
            row |= {k: round(cost[k] / full[k], 4) for k in ("flops", "peak")}
        rows.append(row)
        print(json.dumps(row), flush=True)
    shape = {k: v for k, v in vars(args).items() if k != "out"}
    count = sum(p.numel() for p in theirs.parameters())
    chip = jax.devices()[0]
    report = {"parameters": count, **shape, "device": chip.device_kind, "versions": versions(), "results": rows}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
