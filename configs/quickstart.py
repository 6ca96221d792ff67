"""The quickstart: pretrain two small bases, fine-tune them, and do arithmetic with the task vectors. No download.

    jft quickstart --workdir=runs/quickstart

`digits`: a vision transformer learns scikit-learn's 8 x 8 digits from 400 scans, upright, turned, inverted and mirrored.
Fine-tuned on each of these domains and on two other labelings by seven methods, it gives the task vectors of the
addition and negation tables; `posthoc` is those of `full` in the model linearized at the base, and `linear` trains there.
`library`: a decoder of bytes learns the Python library's source text, then its docstrings. Both are cut short, so that some
three minutes are enough; `comparison.py` and `tangent.py` train them at the length that is the default here.
"""

from ml_collections import ConfigDict

from jft.analysis.study import collection, study

DOMAINS = ({"rotate": 0}, {"rotate": 90}, {"invert": True}, {"flip": "horizontal"})
COSINE = {"name": "adamw", "schedule": "cosine", "warmup": 20, "clip": 1.0}
# More steps than any run has: one checkpoint, after the last.
LAST = {"every": 100_000}
# Records are read faster than threads could hand them over.
READING = {"threads": 0, "prefetch": 0}


def digits(pretraining: int = 400, steps: int = 200, points: int = 9, fleet: bool = False) -> ConfigDict:
    scans = {"source": "digits", "split": "train", **READING}
    vit = {"image": 8, "patch": 2, "channels": 1, "width": 64, "layers": 2, "heads": 4, "hidden": 256}
    return study(
        title="Digits: six tasks from one vision transformer",
        note="The base has seen 400 scans, each upright, turned, inverted and mirrored. The tasks are these four domains "
        "with all 1197 training scans, and two other labelings of the upright ones: parity, and the number of loops.",
        base={
            "description": "Vision transformer, 2 layers, width 64, patches of 2 x 2 pixels",
            "train": {
                "steps": pretraining,
                "batch_size": 64,
                "model": {"arch": "vision", "options": vit, "classes": 10, "pool": "mean"},
                "data": {**scans, "limit": 400, "mixture": DOMAINS},
                "optimizer": {**COSINE, "lr": 4e-3, "weight_decay": 0.1},
            },
        },
        head={"kind": "probe", "pool": "mean"},
        fleet=fleet,
        common={"steps": steps, "batch_size": 64, "log": {"every": 5}, "checkpoint": LAST},
        tasks={
            "upright": {"data": scans},
            "rotated": {"data": {**scans, "rotate": 90}},
            "inverted": {"data": {**scans, "invert": True}},
            "mirrored": {"data": {**scans, "flip": "horizontal"}},
            "parity": {"data": {**scans, "task": "parity"}},
            "loops": {"data": {**scans, "task": "loops"}},
        },
        methods={
            "full": {"method": {"name": "full"}, "optimizer": {**COSINE, "lr": 7e-4}},
            "lora": {"method": {"name": "lora", "rank": 4}, "optimizer": {**COSINE, "lr": 5e-3}},
            "bitfit": {"method": {"name": "bitfit"}, "optimizer": {**COSINE, "lr": 1e-2}},
            "blocks": {
                "method": {"name": "block_sparse", "density": 0.1, "block": (8, 8)},
                "optimizer": {**COSINE, "lr": 5e-3},
            },
            "lift": {
                "method": {"name": "lift", "rank": 4, "filter_rank": 8, "every": 0},
                "optimizer": {**COSINE, "lr": 5e-3},
            },
            "masking": {
                "method": {"name": "masking", "start": "two_point", "threshold": 5e-3},
                "optimizer": {**COSINE, "lr": 5e-3},
            },
            "linear": {"method": {"name": "linearized"}, "optimizer": {**COSINE, "lr": 2e-3}},
            "posthoc": {"of": "full", "forward": "linearized"},
        },
        arithmetic={"points": 11, "control": "upright"},
        disentangle={"pairs": (("rotated", "inverted"),), "points": points},
    )


def library(pretraining: int = 600, steps: int = 200) -> ConfigDict:
    text = {"source": "stdlib", "tokenizer": "bytes", "max_length": 64, "pack": "concat", **READING}
    return study(
        title="Library: from Python's source text to its docstrings",
        note="A language model of bytes, scored by bits per byte of docstrings in modules it has not seen.",
        metric="bits_per_byte",
        base={
            "description": "Llama-style decoder of bytes, 2 layers, width 64, pretrained with Muon",
            "train": {
                "steps": pretraining,
                "batch_size": 16,
                "model": {"arch": "decoder", "options": {"width": 64, "layers": 2, "heads": 4}},
                "data": {**text, "kind": "source", "split": "train"},
                "optimizer": {**COSINE, "name": "muon", "lr": 2e-2, "weight_decay": 0.1},
            },
        },
        head={"kind": "none"},
        common={"steps": steps, "batch_size": 16, "log": {"every": 5}, "checkpoint": LAST},
        tasks={
            "docstrings": {
                "data": {**text, "kind": "docstrings", "split": "train"},
                "eval_data": {**text, "kind": "docstrings", "split": "validation", "limit": 100},
                "test_data": {**text, "kind": "docstrings", "split": "test", "limit": 200},
            }
        },
        methods={
            "full": {"method": {"name": "full"}, "optimizer": {**COSINE, "lr": 2e-3}},
            "lora": {"method": {"name": "lora", "rank": 8}, "optimizer": {**COSINE, "lr": 1e-2}},
        },
    )


def get_config() -> ConfigDict:
    return collection(
        "jft quickstart",
        "Two small models pretrained and fine-tuned on data that every machine has, and arithmetic with what changed.",
        digits=digits(pretraining=256, steps=128, points=7, fleet=True),
        library=library(pretraining=256, steps=128),
    )
