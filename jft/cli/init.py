"""Write a config to begin with: every key with what it means, those that matter set for one kind of task.

jft init KIND writes KIND.py; what it leaves as it is by default stands there as a comment. With --data and --model it is one
for your files and model. Then: jft train --config=KIND.py --dry-run, and jft train --config=KIND.py --workdir=runs/one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jft.cli.errors import Parser, UsageError
from jft.names import nearest

_LORA = {"name": "lora", "rank": 16, "alpha": 32.0}
_LM = {
    "epochs": 3.0,
    "batch_size": 16,
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.remat": "dots",
    "method": _LORA,
    "optimizer.lr": 2e-4,
    "optimizer.schedule": "cosine",
    "checkpoint.every": 200,
    "eval.every": 200,
}
_HEAD = {
    "epochs": 3.0,
    "batch_size": 32,
    "optimizer.weight_decay": 0.01,
    "optimizer.schedule": "linear",
    "checkpoint.every": 500,
    "eval.every": 500,
}
_HELD_OUT = {"held_out": 0.05}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of task: what it is, the base, an example of its data, its data settings and what else is set."""

    about: str
    model: str
    example: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]


KINDS = {
    "sft": Kind(
        "Supervised fine-tuning of a decoder on prompts and responses.",
        "Qwen/Qwen2.5-0.5B",
        'train.jsonl: {"prompt": "2 + 2 = ", "response": "4"} a line; also Alpaca\'s instruction, input and output',
        {
            "source": "jsonl",
            "files": "train.jsonl",
            "task": "sft",
            "max_length": 1024,
            "pack": "first_fit",
            "holdout": 0.05,
        },
        _LM,
    ),
    "chat": Kind(
        "Supervised fine-tuning of a chat model on conversations, in its own template.",
        "Qwen/Qwen2.5-0.5B-Instruct",
        'train.jsonl: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} a line; also ShareGPT\'s '
        "conversations",
        {
            "source": "jsonl",
            "files": "train.jsonl",
            "task": "sft",
            "loss": "responses",
            "max_length": 2048,
            "pack": "first_fit",
            "holdout": 0.05,
        },
        _LM,
    ),
    "lm": Kind(
        "Language modelling on plain texts (continued pretraining).",
        "Qwen/Qwen2.5-0.5B",
        'train.jsonl: {"text": ...} a line',
        {
            "source": "jsonl",
            "files": "train.jsonl",
            "task": "lm",
            "text": "text",
            "max_length": 1024,
            "pack": "concat",
            "holdout": 0.05,
        },
        {**_LM, "method": {"name": "full"}, "optimizer.lr": 1e-5, "epochs": 1.0},
    ),
    "classification": Kind(
        "Classification of texts by an encoder with a new head.",
        "google-bert/bert-base-uncased",
        "train.csv: columns text and label; the labels that are there are the classes",
        {
            "source": "csv",
            "files": "train.csv",
            "task": "classification",
            "text": "text",
            "label": "label",
            "max_length": 128,
            "holdout": 0.05,
        },
        {**_HEAD, "model.classes": -1, "optimizer.lr": 2e-5},
    ),
    "regression": Kind(
        "A number for each text, or pair of texts, by an encoder with a new head.",
        "google-bert/bert-base-uncased",
        "train.csv: columns text and label, a number",
        {
            "source": "csv",
            "files": "train.csv",
            "task": "regression",
            "text": "text",
            "label": "label",
            "max_length": 128,
            "holdout": 0.05,
        },
        {**_HEAD, "model.classes": 1, "optimizer.lr": 2e-5},
    ),
    "seq2seq": Kind(
        "Text to text by an encoder-decoder.",
        "google-t5/t5-small",
        'train.jsonl: {"prompt": "translate ...", "response": ...} a line',
        {
            "source": "jsonl",
            "files": "train.jsonl",
            "task": "seq2seq",
            "prompt": "prompt",
            "response": "response",
            "max_length": 512,
            "max_target_length": 128,
            "holdout": 0.05,
        },
        {**_HEAD, "batch_size": 16, "optimizer.lr": 1e-4},
    ),
    "images": Kind(
        "Classification of images by a vision transformer with a new head.",
        "google/vit-base-patch16-224-in21k",
        "images/: a folder for each class",
        {
            "source": "image_folder",
            "root": "images",
            "task": "classification",
            "image": {"size": 224, "crop": "random", "flip": True},
            "holdout": 0.05,
        },
        {**_HEAD, "model.classes": -1, "optimizer.lr": 5e-5, "epochs": 10.0},
    ),
}
# What a key of the data means, for those that the kinds set.
DATA = {
    "source": "jsonl, json, csv, parquet, hf, tfds, image_folder, stdlib, digits: see help(jft.data)",
    "files": "a path, a pattern or a list of them",
    "root": "the folder of the classes' folders",
    "task": "sft, lm, classification, regression, seq2seq, contrastive",
    "text": "the field, or a pattern such as '{title}: {body}'",
    "label": "the field",
    "prompt": "the field, or a pattern such as 'Q: {question}'",
    "response": "the same",
    "loss": "over all responses; last: over the last one; all: over every token",
    "max_length": "tokens; longer rows: too_long='truncate' or 'drop'",
    "max_target_length": "tokens of the response",
    "pack": "first_fit, concat, or False: then rows are padded to a few lengths (buckets)",
    "image": "how pixels are prepared",
    "holdout": "the share of rows that training leaves out",
    "held_out": "the rows that training leaves out; a file of its own: {'files': 'test.jsonl'}",
}
SOURCES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_WIDTH = 60


def data_of(kind: Kind, path: str | None) -> dict[str, Any]:
    """The data settings of a kind, for the files at ``path`` where one is given.

    Raises :class:`UsageError` for files of another kind than there is a source for.
    """
    if path is None:
        return dict(kind.data)
    rest = {k: v for k, v in kind.data.items() if k not in ("source", "files", "root")}
    if kind.data["source"] == "image_folder":
        return {"source": "image_folder", "root": path, **rest}
    suffix = os.path.splitext(path)[1]
    if suffix not in SOURCES:
        raise UsageError(f"init: --data={path}: one of {', '.join(SOURCES)} is expected, as the end of its name")
    return {"source": SOURCES[suffix], "files": path, **({"separator": "\t"} if suffix == ".tsv" else {}), **rest}


def _line(text: str, doc: str) -> str:
    return f"{text:<{_WIDTH}}  # {doc}" if doc else text


def _section(key: str, values: Mapping[str, Any], doc: str) -> Iterator[str]:
    """A key that is a section: a dict over several lines, each with what it means."""
    yield f"    # {doc}"
    yield f"    config.{key} = {{"
    for name, value in values.items():
        yield _line(f"        {name!r}: {value!r},", DATA.get(name, "") if key.endswith("data") else "")
    yield "    }"


def text(name: str, data: str | None = None, model: str | None = None, out: str = "") -> str:
    """The config file of the kind ``name``, for these files and this base. out: the path that it gets."""
    from jft.train.config import documentation

    kind = KINDS[name]
    settings = {
        **kind.settings,
        "model.source": model or kind.model,
        "data": data_of(kind, data),
        "eval_data": _HELD_OUT,
    }
    out = out or f"{name}.py"
    lines = [f'"""{kind.about}', "", f"    jft train --config={out} --dry-run"]
    lines += [f"    jft train --config={out} --workdir=runs/{Path(out).stem}", "", f"Data: {kind.example}.", '"""', ""]
    lines += ["from jft.train.config import default", "", "", "def get_config():", "    config = default()"]
    section = ""
    for key, default, doc in documentation():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        value = settings.get(key, default)
        if isinstance(value, dict) and key in settings:
            lines += _section(key, value, doc)
        elif key in settings:
            lines.append(_line(f"    config.{key} = {value!r}", doc))
        else:
            lines.append(_line(f"    # config.{key} = {default!r}", doc))
    return "\n".join([*lines, "", "    return config", ""])


def main(argv: Sequence[str]) -> int:
    """``jft init KIND [--data=FILES] [--model=SOURCE] [--out=FILE.py]``."""
    about = "\n".join(f"  {name:<16}{kind.about}" for name, kind in KINDS.items())
    parser = Parser(prog="jft init", description=__doc__, epilog=f"kinds:\n{about}")
    parser.add_argument("kind", metavar="KIND", help="one of " + ", ".join(KINDS))
    parser.add_argument("--data", help="your files (.jsonl, .json, .csv, .tsv, .parquet), or a folder of images")
    parser.add_argument("--model", help="the base: a Hugging Face directory or hub id")
    parser.add_argument("--out", help="where to write it (default: KIND.py)")
    args = parser.strict(argv)
    if args.kind not in KINDS:
        parser.error(f"unknown kind {args.kind!r}{nearest(args.kind, KINDS)}; there are {', '.join(KINDS)}")
    from jft import files

    out = Path(args.out or f"{args.kind}.py")
    if out.exists():
        raise UsageError(f"init: {str(out)!r} exists; give another --out=FILE.py, or remove it")
    files.write_text(out, text(args.kind, args.data, args.model, str(out)))
    print(f"{out}: look through it, then: jft train --config={out} --dry-run")
    return 0
