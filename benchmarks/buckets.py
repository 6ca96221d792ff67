"""An epoch of text classification with rows padded to max_length, and with rows in buckets: FLOPs, seconds and padding.

    python benchmarks/buckets.py --json benchmarks/results/buckets_cpu.json

An encoder of BERT's kind (width 256, four layers) trains whole on 2048 texts, batches of 32, max_length 128, the one shipped.
`short`: texts of about 13 tokens. `mixed`: lengths like those of sentences, log-normal with median 24. FLOPs are XLA's count
of every step of one epoch (of a loop over layers the body once, in both). With ``--seconds`` both epochs are run, the two in
turn, after an epoch that compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import time
from collections import Counter
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import jft
from jft.data.tokenizer import byte_tokenizer
from jft.models import Classifier, EncoderConfig, Model
from jft.train import Optimizer, step
from jft.train.objectives import Classification

TEXTS, BATCH, MAX_LENGTH = 2048, 32, 128
TOKENIZER = byte_tokenizer()
CONFIG = EncoderConfig(vocab=TOKENIZER.vocab_size, width=256, layers=4, heads=4, hidden=1024, positions=MAX_LENGTH)


def loader(kind: str, buckets: bool) -> Any:
    r = np.random.default_rng(0)
    lengths = r.integers(10, 17, TEXTS) if kind == "short" else np.exp(r.normal(np.log(24), 0.6, TEXTS)).astype(int) + 1
    rows = [{"text": "x" * min(int(n), MAX_LENGTH), "label": "ab"[i % 2]} for i, n in enumerate(lengths)]
    settings = {"source": "rows", "rows": rows, "task": "classification", "max_length": MAX_LENGTH, "buckets": buckets}
    return jft.data.build(settings, batch_size=BATCH, tokenizer=TOKENIZER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=0, help="epochs of each to time")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    args = parser.parse_args()
    model = Model(Classifier(CONFIG, 2))
    params = model.init(jax.random.key(0))
    recipe = step.Recipe(
        step.apply_of(model),
        jft.method("full").plan(params, model),
        Classification(),
        Optimizer(name="adamw"),
        dtype="float32",
    )
    update = step.compile_step(dataclasses.replace(recipe), params, {}, None)
    results = {}
    for kind in ("short", "mixed"):
        loaders = {name: loader(kind, name == "buckets") for name in ("padded", "buckets")}
        found: dict[str, Any] = {name: {} for name in loaders}
        for name, data in loaders.items():
            batches = list(itertools.islice(data, TEXTS // BATCH))
            shapes = Counter(batch["tokens"].shape[1] for batch in batches)
            by_shape = {b["tokens"].shape[1]: b for b in batches}
            found[name]["batches"] = {str(length): count for length, count in sorted(shapes.items())}
            found[name]["padding"] = 1 - sum(b["segments"].sum() for b in batches) / sum(
                b["segments"].size for b in batches
            )
            found[name]["flops"] = sum(n * (step.flops(update.compiled(by_shape[t])) or 0) for t, n in shapes.items())
        times: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(args.seconds + 1 if args.seconds else 0):
            for name, data in loaders.items():
                since = time.perf_counter()
                jft.finetune(model, params, data, epochs=1, log={"every": 10**6, "progress": False})
                times[name].append(time.perf_counter() - since)
        for name, seconds in times.items():
            if seconds:
                found[name]["seconds"] = statistics.median(seconds[1:])
        ratios = {
            key: found["buckets"][key] / found["padded"][key] for key in ("flops", "seconds") if key in found["padded"]
        }
        results[kind] = {**found, "ratios": ratios}
        print(kind, json.dumps(results[kind], indent=1, default=float))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
