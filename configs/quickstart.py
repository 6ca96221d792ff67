"""The quickstart: pretrain two small bases, fine-tune them, and do arithmetic with the task vectors. No download.

    jft quickstart --workdir=runs/quickstart

`digits`: a vision transformer learns scikit-learn's 8 x 8 digits from a few hundred scans, turned, mirrored and inverted.
Fine-tuned on each of these domains and on two other labelings by three methods, it gives the task vectors of the
addition and negation tables. `library`: a byte-level decoder learns the Python library's source text, then its docstrings.
"""

from ml_collections import ConfigDict

from jft.analysis.study import collection, study

DOMAINS = ({"rotate": 0}, {"rotate": 90}, {"invert": True}, {"flip": "horizontal"})
ADAMW = {"name": "adamw", "schedule": "cosine", "warmup": 10, "clip": 1.0}


def digits() -> ConfigDict:
    return study(
        title="Digits: six tasks from one vision transformer",
        note="The base has seen 400 scans in four domains. The tasks are those domains with all 1197 training scans, and "
        "two labelings of the upright ones: parity, and the number of closed loops.",
        base={
            "source": "",
            "description": "Vision transformer, 3 layers, width 64, patches of 2 x 2 pixels",
            "train": {
                "steps": 400,
                "batch_size": 64,
                "model": {
                    "arch": "vision",
                    "options": {
                        "image": 8,
                        "patch": 2,
                        "channels": 1,
                        "width": 64,
                        "layers": 3,
                        "heads": 4,
                        "hidden": 256,
                    },
                    "classes": 10,
                },
                "data": {"source": "digits", "split": "train", "limit": 400, "mixture": DOMAINS},
                "optimizer": {**ADAMW, "lr": 2e-3, "weight_decay": 0.05},
            },
        },
        common={"steps": 150, "batch_size": 64, "log": {"every": 5}},
        tasks={
            "upright": {"data": {"source": "digits"}},
            "rotated": {"data": {"source": "digits", "rotate": 90}},
            "inverted": {"data": {"source": "digits", "invert": True}},
            "mirrored": {"data": {"source": "digits", "flip": "horizontal"}},
            "parity": {"data": {"source": "digits", "task": "parity"}},
            "loops": {"data": {"source": "digits", "task": "loops"}},
        },
        methods={
            "full": {"method": {"name": "full"}, "optimizer": {**ADAMW, "lr": 5e-4}},
            "lora": {"method": {"name": "lora", "rank": 4}, "optimizer": {**ADAMW, "lr": 5e-3}},
            "bitfit": {"method": {"name": "bitfit"}, "optimizer": {**ADAMW, "lr": 5e-3}},
        },
        arithmetic={"points": 11, "control": "upright"},
    )


def library() -> ConfigDict:
    text = {"source": "stdlib", "tokenizer": "bytes", "max_length": 128, "pack": "concat"}
    return study(
        title="Library: from Python's source text to its docstrings",
        note="A language model of bytes. Its score is bits per byte of unseen modules' docstrings.",
        metric="bits_per_byte",
        base={
            "source": "",
            "description": "Llama-style decoder of bytes, 3 layers, width 96",
            "train": {
                "steps": 300,
                "batch_size": 16,
                "model": {"arch": "decoder", "options": {"width": 96, "layers": 3, "heads": 4, "tied": True}},
                "data": {**text, "kind": "source", "split": "train"},
                "optimizer": {**ADAMW, "lr": 3e-3, "weight_decay": 0.1},
            },
        },
        common={"steps": 150, "batch_size": 16, "log": {"every": 5}},
        tasks={
            "docstrings": {
                "data": {**text, "kind": "docstrings", "split": "train"},
                "eval_data": {**text, "kind": "docstrings", "split": "validation", "limit": 100},
                "test_data": {**text, "kind": "docstrings", "split": "test", "limit": 200},
            }
        },
        methods={
            "full": {"method": {"name": "full"}, "optimizer": {**ADAMW, "lr": 1e-3}},
            "lora": {"method": {"name": "lora", "rank": 8}, "optimizer": {**ADAMW, "lr": 5e-3}},
        },
        head={"kind": "none"},
    )


def get_config() -> ConfigDict:
    return collection(
        "jft quickstart",
        "Two small models pretrained and fine-tuned on data that every machine has, and arithmetic with what changed.",
        digits=digits(),
        library=library(),
    )
