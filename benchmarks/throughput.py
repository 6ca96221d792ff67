"""Tokens per second of a training step, jft beside torch + transformers + peft, same weights, same machine, same run.

    python benchmarks/throughput.py                      # a 98M Llama-shaped decoder, batch 4 x 256, float32, full and LoRA
    python benchmarks/throughput.py --steps 9 --out benchmarks/results/throughput_cpu.json

Both sides run AdamW on everything that trains, clip the global norm at 1, and are given the same tokens; the first losses
are compared before anything is timed. Steps alternate (jft, torch, jft, torch, ...), so that a machine whose speed drifts
slows both alike; medians and the ratio of medians are reported. Needs the ``peers`` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

import jax
import numpy as np

import jft

# jft's method and its options, and what torch's side trains: there block-sparse training has no peer, LoRA is what people use.
METHODS = {
    "full": ("full", {}, "full"),
    "lora": ("lora", {"rank": "RANK"}, "lora"),
    "block_sparse": ("block_sparse", {"density": 0.05}, "lora"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each side, after two to warm up")
    parser.add_argument("--methods", nargs="+", default=["full", "lora"], choices=list(METHODS))
    parser.add_argument("--attention", default="plain", choices=["plain", "blockwise"], help="jft's form of attention")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--unroll", type=int, default=1, help="layers per scan step on jft's side; 0 for all")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here as JSON")
    return parser.parse_args()


def torch_model(args: argparse.Namespace):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        tie_word_embeddings=True,
        max_position_embeddings=args.tokens,
    )
    return transformers.LlamaForCausalLM(config)


def torch_step(model, method: str, args: argparse.Namespace):
    """A function of tokens that makes one step and returns the loss."""
    import copy

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(model).to(device, dtype=getattr(torch, args.dtype))
    if method == "lora":
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear")
        )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(tokens: np.ndarray) -> float:
        ids = torch.tensor(tokens, dtype=torch.long, device=device)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


def jft_step(model, params, method: str, args: argparse.Namespace):
    """A function of tokens that makes one step and returns the loss: the step that :func:`jft.finetune` runs."""
    from jft.bench.step import by_chance, drawn
    from jft.train import feed, step
    from jft.train.objectives import objective
    from jft.train.optimizers import optimizer
    from jft.train.state import hold

    name, options, _ = METHODS[method]
    options = {k: args.rank if v == "RANK" else v for k, v in options.items()}
    plan = by_chance(jft.method(name, **options)).plan(params, model)
    chosen = drawn(plan, params, model)
    adamw = optimizer({"name": "adamw", "lr": 1e-4, "weight_decay": 0.0, "clip": 1.0})
    recipe = step.Recipe(model.apply, plan, objective("lm"), adamw, dtype=model.execution.dtype)
    update = step.compile_step(recipe, params, chosen, None)
    held = hold(update, params, chosen, seed=0)
    sound = np.asarray(True)

    def run(tokens: np.ndarray) -> float:
        nonlocal held
        batch = feed.put({"tokens": tokens.astype(np.int32)}, update.layout)
        held, out = update(held, batch, np.float32(1e-4), sound)
        return float(out["loss"])

    return run


def compare(method: str, args: argparse.Namespace, folder: str, theirs) -> dict:
    """Alternate steps of both sides; medians in seconds, tokens/s, and jft's speed over torch's."""
    model, params = jft.load(folder, dtype=args.dtype)
    sides = {
        "jft": jft_step(model.with_(unroll=args.unroll, attention=args.attention), params, method, args),
        "torch": torch_step(theirs, METHODS[method][2], args),
    }
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, args.vocab, (args.batch, args.tokens)) for _ in range(args.steps + 2)]
    losses = {name: step(batches[0]) for name, step in sides.items()}
    if abs(losses["jft"] - losses["torch"]) > (1e-3 if args.dtype == "float32" else 5e-2):
        raise SystemExit(f"first losses differ, so the two sides compute different things: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for batch in batches[1:]:
        for name, step in sides.items():
            began = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    tokens = args.batch * args.tokens
    return {
        "method": method,
        "seconds": {name: round(t, 4) for name, t in medians.items()},
        "tokens_per_second": {name: round(tokens / t, 1) for name, t in medians.items()},
        "speed_over_torch": round(medians["torch"] / medians["jft"], 3),
        "first_loss": losses,
    }


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    names = ("jax", "jaxlib", "optax", "torch", "transformers", "peft")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def main() -> None:
    args = arguments()
    theirs = torch_model(args)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        rows = [compare(method, args, folder, theirs) for method in args.methods]
    shape = {k: v for k, v in vars(args).items() if k not in ("out", "methods")}
    count = sum(p.numel() for p in theirs.parameters())
    device = jax.devices()[0]
    chip = f"{device.platform}: {device.device_kind}, {os.cpu_count()} cores"
    report = {"parameters": count, **shape, "device": chip, "versions": versions(), "results": rows}
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
