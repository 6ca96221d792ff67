"""Tokens per second of greedy generation, jft beside transformers, same weights, same prompts, same machine, same run.

    python benchmarks/generate.py                                   # SmolLM2-135M's shape, batch 1 and 16, float32
    python benchmarks/generate.py --model model.gguf --dtype float32 bfloat16 --out benchmarks/results/generate_cpu.json

Both sides continue prompts of the same length by the same number of tokens, with their caches and without an end; the tokens
are compared before anything is timed. Runs alternate (jft, transformers, jft, ...), so that a machine whose speed drifts slows
both alike; medians and the ratio of medians are reported, of whole calls: prompts read, tokens decoded and brought back. Needs
the ``peers`` extra.
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a directory, hub id or GGUF file; default random weights of SmolLM2-135M's shape"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side, after one to warm up")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here as JSON")
    return parser.parse_args()


def directory(args: argparse.Namespace, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint that both sides read."""
    if args.model:
        model, params = jft.load(args.model, dtype="float32")
    else:
        from jft.bench.shapes import MODELS

        model = jft.Model(MODELS["smollm2-135m"]())
        params = model.init(jax.random.key(0))
    return jft.save(model, params, folder / "model")


def compare(source: pathlib.Path, dtype: str, batch: int, args: argparse.Namespace) -> dict:
    import torch
    import transformers

    model, params = jft.load(source, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    prompts = np.random.default_rng(0).integers(3, model.config.vocab, (batch, args.prompt))
    ids = torch.tensor(prompts)

    def ours() -> np.ndarray:
        return np.stack(jft.generate(model, params, list(prompts), max_tokens=args.new, eos=()))

    def peers() -> np.ndarray:
        options = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, args.prompt :].numpy()

    sides = {"jft": ours, "transformers": peers}
    # Later tokens follow from earlier ones: after one tie in the logits, rounded differently, texts part.
    first = {name: run() for name, run in sides.items()}
    same = float(np.mean(first["jft"] == first["transformers"]))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "dtype": dtype,
        "batch": batch,
        "seconds": {name: round(t, 3) for name, t in medians.items()},
        "tokens_per_second": {name: round(batch * args.new / t, 1) for name, t in medians.items()},
        "speed_over_transformers": round(medians["transformers"] / medians["jft"], 3),
        "same_tokens": same,
    }


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        source = directory(args, pathlib.Path(folder))
        rows = []
        for dtype in args.dtype:
            for batch in args.batch:
                rows.append(compare(source, dtype, batch, args))
                print(json.dumps(rows[-1]), flush=True)
    import importlib.metadata as metadata

    names = ("jax", "jaxlib", "torch", "transformers")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
    device = f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    report = {"model": args.model, "prompt": args.prompt, "new": args.new, "device": device, "versions": versions}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**report, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
