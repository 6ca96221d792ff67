"""JSON files: every kind of damage in every place."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.faults.hostile import Case
from tests.faults.hostile_damage import FILES, NUMBERS, TEXTS
from tests.models.checkpoints import LLAMA, llama_tensors, write

WORDS = {"upright": 0, "[UNK]": 1, "</s>": 2}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
}  # fmt: skip


def model_folder(folder: Path, description: dict[str, Any] = LLAMA, shards: int = 1) -> Path:
    return write(folder, tensors(), description, shards)


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return llama_tensors(dtype=np.float32)


def tokenizer_folder(folder: Path, **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def load_model(folder: Any) -> Any:
    import jft

    return jft.load(folder, dtype=None)


def load_tokenizer(folder: Any) -> Any:
    from jft.data import tokenizer

    loaded = tokenizer.load(folder)
    loaded.encode("upright", special=True)
    return loaded


def adapter_folder(folder: Path) -> Path:
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": np.ones((2, 32), np.float32)}
    factors |= {f"{prefix}.lora_B.weight": np.ones((32, 2), np.float32)}
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def load_adapter(folder: Any) -> Any:
    from jft import models
    from jft.models.decoder import DecoderConfig

    config = DecoderConfig(64, 32, 2, 4, 2, hidden=48, tied=False)
    return models.load_adapter(models.Model(config), folder)


def _merge_adapter(folder: Any) -> Any:
    from jft.merge.adapters import PeftAdapter

    return PeftAdapter(folder)


def tfds_folder(folder: Path) -> Path:
    feature = {"type": "tensorflow_datasets.core.features.text_feature.Text", "content": {}}
    content = {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "content": {"text": feature}}
    (folder / "features.json").write_text(json.dumps(content))
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def load_tfds(folder: Any) -> Any:
    from jft.data.tfds import Tfds

    return Tfds(directory=str(folder))


def _load_options(folder: Any) -> Any:
    from jft.cli import options

    return options.load(str(folder / "config.json"))


def _read_outcome(folder: Any) -> Any:
    from jft.analysis import run_store

    return run_store.read(folder, {"steps": 1})


def _read_kept(folder: Any) -> Any:
    from jft.analysis import run_store

    return run_store.kept(folder / "kept.json", {"steps": 1}, dict)


def json_file(name: str, value: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(json.dumps(value))
        return folder

    return make


def _read_table(folder: Any) -> Any:
    from jft.kernels import tuning

    return tuning._table(folder / "table.json", 0)


def read_metrics(folder: Any) -> Any:
    from jft.train import metrics

    return metrics.read(folder / "metrics.jsonl")


def read_jsonl(folder: Any) -> Any:
    from jft.data.tables import Jsonl

    source = Jsonl(str(folder / "data.jsonl"))
    return [source[i] for i in range(len(source))]


RECORD = {"config": {"steps": 1}, "outcome": {"score": 1.0}}
PLACES: dict[str, tuple[Callable[[Path], Path], str, Callable[[object], object]]] = {
    "model config": (model_folder, "config.json", load_model),
    "weights index": (lambda f: model_folder(f, shards=2), "model.safetensors.index.json", load_model),
    "tokenizer config": (tokenizer_folder, "tokenizer_config.json", load_tokenizer),
    "special tokens": (lambda f: tokenizer_folder(f, special_tokens_map={}), "special_tokens_map.json", load_tokenizer),
    "tokenizer's model": (lambda f: tokenizer_folder(f, config={"eos_token_id": 2}), "config.json", load_tokenizer),
    "adapter config": (adapter_folder, "adapter_config.json", load_adapter),
    "adapter to merge": (adapter_folder, "adapter_config.json", _merge_adapter),
    "features": (tfds_folder, "features.json", load_tfds),
    "dataset info": (tfds_folder, "dataset_info.json", load_tfds),
    "run config": (json_file("config.json", {"steps": 1}), "config.json", _load_options),
    "run outcome": (json_file("outcome.json", RECORD), "outcome.json", _read_outcome),
    "study record": (json_file("kept.json", RECORD), "kept.json", _read_kept),
    "kernel table": (json_file("table.json", {"a": {"b": 1}}), "table.json", _read_table),
}
# Of files that a run writes for itself, in which scores may be infinite, and of TFDS's, of which it makes what it likes.
WITHOUT_NUMBERS = ("run config", "run outcome", "study record", "dataset info")
# There is no such file then, which is no error where it is optional; and a record that is not there is made anew.
OPTIONAL = ("special tokens", "tokenizer config", "tokenizer's model")
RECORDS = ("run outcome", "study record")


def cases() -> Iterator[Case]:
    """Every kind of text and of file in every place."""
    for place, (make, name, use) in PLACES.items():
        kinds = TEXTS | FILES | ({} if place in WITHOUT_NUMBERS else NUMBERS)
        for kind, damage in kinds.items():

            def damaged(folder: Path, make: Any = make, name: str = name, damage: Any = damage) -> Path:
                made = make(folder)
                damage(made / name)
                return made

            gone = kind in ("pipe", "folder", "device", "link to itself")
            refused = not ((gone and place in OPTIONAL) or (kind == "link to itself" and place in RECORDS))
            # What is no file of the folder is not there, and the message speaks of the folder.
            yield Case(f"{place}/{kind}", damaged, use, refused, None if gone or place == "dataset info" else name)
