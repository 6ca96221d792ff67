"""The cases of :mod:`tests.faults.hostile`: kinds of damage, and the places where people have such files."""

from __future__ import annotations

import copy
import functools
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.faults.hostile import PAYLOAD, Case
from tests.models.checkpoints import LLAMA, llama_tensors, write

DEEP = 100_000
WORDS = {"upright": 0, "[UNK]": 1, "</s>": 2}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
}  # fmt: skip


def cases() -> list[Case]:
    """Every case, in a fixed order."""
    parts = (json_files, config_values, headers, vectors, manifests, indices, tokenizers, templates, tables, images)
    return [case for part in (*parts, features, recipes, folders, pickles) for case in part()]


# JSON files: every kind of damage in every place.


def _text(text: str | bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def _within(change: Callable[[str], str]) -> Callable[[Path], None]:
    """A change of the text of the first object, which is not damaged otherwise."""
    return lambda file: file.write_text(change(file.read_text()))


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def _first(entry: str) -> Callable[[str], str]:
    return lambda text: text.replace("{", "{" + entry + ", ", 1)


def _sparse(file: Path) -> None:
    with file.open("wb") as handle:
        handle.write(b'{"a": "')
        handle.truncate(2**31)


TEXTS: dict[str, Callable[[Path], None]] = {
    "empty": _text(""),
    "blank": _text("  \n\n "),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]) and None,
    "words": _text("Entry not found"),
    "page": _text("<!DOCTYPE html><html><body>404</body></html>"),
    "pointer": _text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"),
    "array": _text("[1, 2]"),
    "number": _text("1"),
    "null": _text("null"),
    "string": _text('"a"'),
    "deep list": _text("[" * DEEP),
    "deep closed list": _text("[" * DEEP + "]" * DEEP),
    "deep objects": _text('{"a":' * DEEP + "1" + "}" * DEEP),
    "moderately deep": _within(_first('"x": ' + "[" * 500 + "]" * 500)),
    "key twice": _within(_first('"x": 1, "x": 2')),
    "long integer": _within(_first('"x": ' + "9" * 5000)),
    "surrogate": _within(_first('"x": "\\ud800"')),
    "raw control character": _within(_first('"x": "\x1b[31m"')),
    "latin-1": _text('{"a": "é"}'.encode("latin-1")),
    "utf-16": lambda file: file.write_bytes(file.read_text().encode("utf-16")) and None,
    "comment": _within(lambda text: text + " // a comment"),
    "two values": _within(lambda text: text + " {}"),
    "null bytes": _text(b"\0" * 64),
}
NUMBERS = {"not a number": _within(_first('"x": NaN')), "infinity": _within(_first('"x": -Infinity'))}
NUMBERS |= {"beyond a float": _within(_first('"x": 1e999'))}
FILES: dict[str, Callable[[Path], None]] = {
    "pipe": _replaced(lambda file: os.mkfifo(file)),
    "folder": _replaced(lambda file: file.mkdir()),
    "device": _replaced(lambda file: file.symlink_to("/dev/zero")),
    "link to itself": _replaced(lambda file: file.symlink_to(file)),
    "2 GiB": _replaced(_sparse),
}


def _model(folder: Path, description: dict[str, Any] = LLAMA, shards: int = 1) -> Path:
    return write(folder, _weights(), description, shards)


@functools.cache
def _weights() -> dict[str, np.ndarray]:
    return llama_tensors(dtype=np.float32)


def _tokenizer(folder: Path, **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def _load_model(folder: Any) -> Any:
    import jft

    return jft.load(folder, dtype=None)


def _load_tokenizer(folder: Any) -> Any:
    from jft.data import tokenizer

    loaded = tokenizer.load(folder)
    loaded.encode("upright", special=True)
    return loaded


def _adapter(folder: Path) -> Path:
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": np.ones((2, 32), np.float32)}
    factors |= {f"{prefix}.lora_B.weight": np.ones((32, 2), np.float32)}
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def _load_adapter(folder: Any) -> Any:
    from jft import models
    from jft.models.decoder import DecoderConfig

    config = DecoderConfig(64, 32, 2, 4, 2, hidden=48, tied=False)
    return models.load_adapter(models.Model(config), folder)


def _merge_adapter(folder: Any) -> Any:
    from jft.merge.adapters import PeftAdapter

    return PeftAdapter(folder)


def _features(folder: Path) -> Path:
    feature = {"type": "tensorflow_datasets.core.features.text_feature.Text", "content": {}}
    content = {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "content": {"text": feature}}
    (folder / "features.json").write_text(json.dumps(content))
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def _load_tfds(folder: Any) -> Any:
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


def _written(name: str, value: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(json.dumps(value))
        return folder

    return make


def _read_table(folder: Any) -> Any:
    from jft.kernels import tuning

    return tuning._table(folder / "table.json", 0)


def _read_metrics(folder: Any) -> Any:
    from jft.train import metrics

    return metrics.read(folder / "metrics.jsonl")


def _read_jsonl(folder: Any) -> Any:
    from jft.data.tables import Jsonl

    source = Jsonl(str(folder / "data.jsonl"))
    return [source[i] for i in range(len(source))]


RECORD = {"config": {"steps": 1}, "outcome": {"score": 1.0}}
PLACES: dict[str, tuple[Callable[[Path], Path], str, Callable[[object], object]]] = {
    "model config": (_model, "config.json", _load_model),
    "weights index": (lambda f: _model(f, shards=2), "model.safetensors.index.json", _load_model),
    "tokenizer config": (_tokenizer, "tokenizer_config.json", _load_tokenizer),
    "special tokens": (lambda f: _tokenizer(f, special_tokens_map={}), "special_tokens_map.json", _load_tokenizer),
    "tokenizer's model": (lambda f: _tokenizer(f, config={"eos_token_id": 2}), "config.json", _load_tokenizer),
    "adapter config": (_adapter, "adapter_config.json", _load_adapter),
    "adapter to merge": (_adapter, "adapter_config.json", _merge_adapter),
    "features": (_features, "features.json", _load_tfds),
    "dataset info": (_features, "dataset_info.json", _load_tfds),
    "run config": (_written("config.json", {"steps": 1}), "config.json", _load_options),
    "run outcome": (_written("outcome.json", RECORD), "outcome.json", _read_outcome),
    "study record": (_written("kept.json", RECORD), "kept.json", _read_kept),
    "kernel table": (_written("table.json", {"a": {"b": 1}}), "table.json", _read_table),
}
# Of files that a run writes for itself, in which scores may be infinite, and of TFDS's, of which it makes what it likes.
WITHOUT_NUMBERS = ("run config", "run outcome", "study record", "dataset info")
# There is no such file then, which is no error where it is optional; and a record that is not there is made anew.
OPTIONAL = ("special tokens", "tokenizer config", "tokenizer's model")
RECORDS = ("run outcome", "study record")


def json_files() -> Iterator[Case]:
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


# Values of config.json.

WRONG: dict[str, tuple[Any, ...]] = {
    "size": (float("nan"), -1, 0, 1.5, 64.0, True, "64", [], {}, 10**9, 2**31, 10**400, None),
    "number": (float("nan"), float("inf"), -1e-6, 0, "1e-6", True, [], {}, 10**400),
    "flag": ("no", 1, 0.0, [], {}),
    "text": (1, True, [], {}, 1.5),
    "token": (-2, 1.5, "2", {}, True, 2**31, [1, "2"]),
    "object": (1, "a", [1], True),
}
LLAMA_KEYS = {
    "size": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "number": ("rms_norm_eps", "rope_theta"),
    "flag": ("tie_word_embeddings", "attention_bias", "mlp_bias"),
    "text": ("hidden_act", "model_type"),
    "token": ("eos_token_id", "bos_token_id", "pad_token_id"),
    "object": ("rope_scaling", "rope_parameters", "id2label", "jft_classifier"),
}
# Keys of other families: what one table says of all, looked at without their weights.
OTHER_KEYS = {
    "size": ("n_embd", "n_layer", "n_head", "n_positions", "dim", "n_heads", "hidden_dim", "d_model", "d_kv", "d_ff", "num_heads"),
    "number": ("layer_norm_epsilon", "layer_norm_eps", "query_pre_attn_scalar", "rotary_emb_base"),
    "flag": ("use_sliding_window", "qkv_bias", "use_parallel_residual", "scale_decoder_outputs"),
}  # fmt: skip


def _with(**values: Any) -> dict[str, Any]:
    return copy.deepcopy(LLAMA) | values


def _describe(folder: Any) -> Any:
    from jft.models import loading

    return loading.describe(folder)


def config_values() -> Iterator[Case]:
    """Wrong values of every kind of key, and sizes that the weights do not have."""
    for kind, keys in LLAMA_KEYS.items():
        for key in keys:
            for value in WRONG[kind]:
                make = functools.partial(_model, description=_with(**{key: value}))
                yield Case(f"config value/{key} {str(value)[:12]}", make, _load_model, names="config.json")
    for kind, keys in OTHER_KEYS.items():
        for key in keys:
            for value in WRONG[kind][:3]:
                make = _written("config.json", {"model_type": "t5", key: value})
                yield Case(f"config value/{key} {str(value)[:12]}", make, _describe, names="config.json")
    scaling = {"rope_type": "linear", "factor": 2.0}
    for key in ("factor", "attention_factor", "low_freq_factor", "original_max_position_embeddings"):
        for value in (float("nan"), -1.0, "2", [], True):
            make = functools.partial(_model, description=_with(rope_scaling=scaling | {key: value}))
            yield Case(f"config value/rope_scaling.{key} {str(value)[:12]}", make, _load_model, names="config.json")
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "intermediate_size",
        "head_dim",
    ):
        for value in (3 if key == "num_hidden_layers" else 4096, 10**8):
            make = functools.partial(_model, description=_with(**{key: value}))
            # One layer more may be a tensor that is missing, which is what the message then says.
            yield Case(f"config value/{key} beyond the weights {value}", make, _load_model)
    experts = {"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2}
    yield Case(
        "config value/10**9 experts",
        functools.partial(_model, description=_with(**experts)),
        _load_model,
        names="experts",
    )
    windows = {"model_type": "qwen2", "num_hidden_layers": 10**9, "use_sliding_window": True}
    yield Case(
        "config value/10**9 windows",
        functools.partial(_model, description=_with(**windows)),
        _load_model,
        names="layers",
    )
    for value in (float("nan"), -1, "128", 1.5, [], True):
        make = functools.partial(_model, description=_with(max_position_embeddings=value))
        yield Case(f"config value/max_position_embeddings {value}", make, _load_model, names="config.json")
    code = {"auto_map": {"AutoModelForCausalLM": f"{PAYLOAD}.Feature"}, "torch_dtype": f"{PAYLOAD}.Feature"}
    yield Case(
        "config value/auto_map", functools.partial(_model, description=_with(**code)), _load_model, refused=False
    )


# Headers of safetensors files.


def _header(change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> Callable[[Path], Path]:
    """A model whose weights' header and data were changed."""

    def make(folder: Path) -> Path:
        file = _model(folder) / "model.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, data = change(json.loads(raw[8 : 8 + length]), raw[8 + length :])
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return folder

    return make


def _entry(**values: Any) -> Callable[[dict, bytes], tuple[dict, bytes]]:
    """The header with other values in the entry of the first tensor in the file."""

    def change(header: dict, data: bytes) -> tuple[dict, bytes]:
        name = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        entry = header[name]
        header[name] = {k: v(entry[k]) if callable(v) else v for k, v in (entry | values).items() if v is not ...}
        return header, data

    return change


def _overlap(header: dict, data: bytes) -> tuple[dict, bytes]:
    first, second = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
    header[second] = header[first]
    return header, data


def _shifted(by: int) -> Callable[[dict, bytes], tuple[dict, bytes]]:
    def change(header: dict, data: bytes) -> tuple[dict, bytes]:
        for name, entry in header.items():
            if name != "__metadata__":
                entry["data_offsets"] = [n + by for n in entry["data_offsets"]]
        return header, b"\0" * by + data

    return change


def _twice(header: dict, data: bytes) -> tuple[bytes, bytes]:
    text = json.dumps(header)
    name = next(n for n in header if n != "__metadata__")
    return ("{" + f"{json.dumps(name)}: {json.dumps(header[name])}, " + text[1:]).encode(), data


HEADERS: dict[str, Callable[[dict, bytes], tuple[Any, bytes]]] = {
    "overlapping": _overlap,
    "gap before": _shifted(8),
    "gap of one byte": _shifted(1),
    "trailing bytes": lambda h, d: (h, d + b"\0" * 16),
    "data cut": lambda h, d: (h, d[:-16]),
    "name twice": _twice,
    "shape as text": _entry(shape=lambda s: [str(n) for n in s]),
    "shape of floats": _entry(shape=lambda s: [float(n) for n in s]),
    "shape of bools": _entry(shape=[True]),
    "negative shape": _entry(shape=lambda s: [-n for n in s]),
    "shape a number": _entry(shape=64),
    "no shape": _entry(shape=...),
    "shape overflows": _entry(shape=[2**40, 2**40]),
    "shape of 10**5000": _entry(shape=[10**4000]),
    "offsets as text": _entry(data_offsets=lambda o: [str(n) for n in o]),
    "offsets of floats": _entry(data_offsets=lambda o: [float(n) for n in o]),
    "offsets backwards": _entry(data_offsets=lambda o: o[::-1]),
    "three offsets": _entry(data_offsets=lambda o: [*o, o[1]]),
    "negative offsets": _entry(data_offsets=lambda o: [-8, o[1] - 8]),
    "no offsets": _entry(data_offsets=...),
    "dtype unknown": _entry(dtype="F33"),
    "dtype a number": _entry(dtype=32),
    "dtype of another size": _entry(dtype="F64"),
    "integers": _entry(dtype="I32"),
    "entry null": lambda h, d: (h | {"extra": None}, d),
    "entry a list": lambda h, d: (h | {"extra": [1]}, d),
    "metadata a list": lambda h, d: (h | {"__metadata__": ["pt"]}, d),
    "metadata of numbers": lambda h, d: (h | {"__metadata__": {"format": 1}}, d),
    "array": lambda h, d: (b"[]", d),
    "deep": lambda h, d: (b"[" * DEEP, d),
    "deep entry": lambda h, d: (json.dumps(h)[:-1].encode() + b', "x": ' + b"[" * DEEP + b"]" * DEEP + b"}", d),
    "latin-1": lambda h, d: (b'{"\xe9": 1}', d),
    "space before": lambda h, d: (b"  " + json.dumps(h).encode(), d),
    "not a number": lambda h, d: (json.dumps(h).replace("[0,", "[NaN,", 1).encode(), d),
    "empty": lambda h, d: (b"", d),
    "control characters": lambda h, d: (
        h | {"\x1b]0;title\x07": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        d,
    ),
}


def headers() -> Iterator[Case]:
    """Every damage of the header of a model's weights, and of the file around it."""
    for kind, change in HEADERS.items():
        yield Case(f"weights/{kind}", _header(change), _load_model, names="model.safetensors")
    for kind, raw in {
        "nothing": b"",
        "8 bytes": b"\0" * 8,
        "length of 2**63": struct.pack("<Q", 2**63) + b"{}",
        "length of 99 MB": struct.pack("<Q", 99_000_000) + b"{}",
        "page": b"<html>" * 100,
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n",
        "pickle": b"\x80\x02}q\x00.",
    }.items():

        def make(folder: Path, raw: bytes = raw) -> Path:
            (_model(folder) / "model.safetensors").write_bytes(raw)
            return folder

        yield Case(f"weights/{kind}", make, _load_model, names="model.safetensors")
    for place, file, whole, use in (
        ("adapter weights", "adapter_model.safetensors", _adapter, _load_adapter),
        ("base of a study", "params.safetensors", _base, _read_base),
        ("curvature", "curvature.safetensors", _curvature, _read_curvature),
    ):
        for kind, change in {
            "cut": lambda raw: raw[:-5],
            "empty": lambda raw: b"",
            "words": lambda raw: b"Entry not found",
            "trailing bytes": lambda raw: raw + b"\0",
            "damaged header": lambda raw: raw[:9] + b"\xff" + raw[10:],
        }.items():

            def damaged(folder: Path, file: str = file, whole: Any = whole, change: Any = change) -> Path:
                path = whole(folder) / file
                path.write_bytes(change(path.read_bytes()))
                return folder

            yield Case(f"{place}/{kind}", damaged, use, names=file)
    yield Case("base of a study/gone", lambda folder: folder, _read_base, names="params.safetensors")
    for kind, metadata in {
        "deep": "[" * DEEP,
        "array": "[1]",
        "no version": '{"format": "jft.curvature"}',
        "examples as text": '{"format": "jft.curvature", "version": 1, "examples": "3", "base": "a"}',
        "base a number": '{"format": "jft.curvature", "version": 1, "examples": 3, "base": 4}',
    }.items():

        def described(folder: Path, metadata: str = metadata) -> Path:
            save_file({"w|inputs": np.ones((2, 2), np.float32)}, folder / "curvature.safetensors", {"jft": metadata})
            return folder

        yield Case(f"curvature/{kind}", described, _read_curvature, names="curvature.safetensors")


def _base(folder: Path) -> Path:
    save_file({"a/w": np.ones(3, np.float32)}, folder / "params.safetensors")
    return folder


def _read_base(folder: Any) -> Any:
    from jft.analysis.bases import read_params

    return read_params(folder / "params.safetensors")


def _curvature(folder: Path) -> Path:
    header = {"format": "jft.curvature", "version": 1, "examples": 3.0, "base": "a"}
    pair = {f"w|{name}": np.ones((2, 2), np.float32) for name in ("inputs", "outputs")}
    save_file(pair, folder / "curvature.safetensors", {"jft": json.dumps(header)})
    return folder


def _read_curvature(folder: Any) -> Any:
    from jft.tangent.curvature import Curvature

    return Curvature.load(folder / "curvature.safetensors")


# Task vectors.


@functools.cache
def _leaves() -> dict[str, Any]:
    from jft import delta

    return delta.describe({"w": np.ones((4, 6), np.float32)})


def _vector(
    change: Callable[[dict[str, Any]], Any] = lambda header: header, kind: str = "rows", **tensors: np.ndarray
) -> Callable[[Path], Path]:
    """A task vector written past jft, without checksums: what a person might make, not what damage makes."""

    def make(folder: Path) -> Path:
        held = {"indices": np.array([0, 3], np.int32), "values": np.ones((2, 6), np.float32)} | tensors
        entry = {"kind": kind, "shape": [4, 6], "static": {"shape": [4, 6]}}
        header = {
            "format": "jft.task_vector",
            "version": 1,
            "manifest": copy.deepcopy(_leaves()),
            "deltas": {"w": entry},
        }
        changed = change(header)
        text = changed if isinstance(changed, str) else json.dumps(changed)
        save_file({f"w|{name}": x for name, x in held.items()}, folder / "tau.safetensors", {"jft": text})
        return folder

    return make


def _apply_vector(folder: Any) -> Any:
    import jft
    from jft.delta import file

    file.inspect(folder / "tau.safetensors")
    tau = jft.TaskVector.load(folder / "tau.safetensors")
    return jft.apply({"w": np.ones((4, 6), np.float32)}, tau)


def vectors() -> Iterator[Case]:
    """Values, indices and headers of task vectors; and every byte of one that was written with checksums."""
    import ml_dtypes

    ones = np.ones((2, 6), np.float32)
    for name, value in (("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf)):
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            make = _vector(values=np.where(np.eye(2, 6) > 0, value, 0).astype(dtype))
            yield Case(f"task vector/{name} in {np.dtype(dtype).name}", make, _apply_vector, names="tau.safetensors")
    for name, indices in {
        "int64 beyond int32": np.array([0, 2**32 + 3]),
        "int64 that fit": np.array([0, 4]),
        "floats": np.array([0.5, 1.0], np.float32),
        "bools": np.array([True, False]),
        "negative": np.array([-1, 0], np.int32),
        "beyond": np.array([0, 4], np.int32),
        "twice": np.array([1, 1], np.int32),
        "too few": np.array([1], np.int32),
        "a matrix": np.array([[0], [1]], np.int32),
        "uint64": np.array([0, 2**63], np.uint64),
    }.items():
        make = _vector(indices=indices)
        yield Case(f"task vector/indices {name}", make, _apply_vector, names="tau.safetensors")
    for name, change in {
        "kind null": {"kind": None},
        "kind unknown": {"kind": "../x"},
        "kind a list": {"kind": []},
        "shape null": {"shape": None},
        "shape of text": {"shape": ["4", "6"]},
        "shape negative": {"shape": [-4, 6]},
        "shape of floats": {"shape": [4.0, 6]},
        "static null": {"static": None},
        "static a list": {"static": []},
        "static of text": {"static": {"shape": "46"}},
        "static huge": {"static": {"shape": [10**9, 6]}},
        "static null shape": {"static": {"shape": None}},
        "static nested": {"static": {"shape": [[4], 6]}},
    }.items():
        make = _vector(lambda h, change=change: h | {"deltas": {"w": h["deltas"]["w"] | change}})
        yield Case(f"task vector/{name}", make, _apply_vector, names="tau.safetensors")
    for name, value in {
        "format null": {"format": None},
        "version as text": {"version": "1"},
        "version true": {"version": True},
        "version of the future": {"version": 99},
        "version not a number": {"version": float("nan")},
        "deltas null": {"deltas": None},
        "deltas a list": {"deltas": []},
        "delta null": {"deltas": {"w": None}},
        "delta a list": {"deltas": {"w": []}},
        "deltas of nothing": {"deltas": {}},
        "delta without tensors": {"deltas": {"v": {"kind": "rows", "shape": [1], "static": {}}}},
        "manifest a list": {"manifest": []},
        "manifest text": {"manifest": "x"},
    }.items():
        yield Case(
            f"task vector/{name}", _vector(lambda h, value=value: h | value), _apply_vector, names="tau.safetensors"
        )
    for name, kind, tensors in (
        ("gate of nan", "gate", {"gate": np.array([[np.nan]], np.float32), "scale": np.float32(1)}),
        ("scale of inf", "gate", {"gate": np.array([[1.0]], np.float32), "scale": np.float32(np.inf)}),
    ):

        def make(folder: Path, kind: str = kind, tensors: Any = tensors) -> Path:
            entry = {"kind": kind, "shape": [4, 6], "static": {"shape": [4, 6]}}
            header = {"format": "jft.task_vector", "version": 1, "manifest": {}, "deltas": {"w": entry}}
            held = {f"w|{n}": np.asarray(x) for n, x in tensors.items()}
            save_file(held, folder / "tau.safetensors", {"jft": json.dumps(header)})
            return folder

        yield Case(f"task vector/{name}", make, _apply_vector, names="tau.safetensors")
    del ones
    for kind in ("rows", "entries", "low_rank", "signs"):
        for part in range(12):
            yield Case(
                f"flipped bit/{kind} {part}", functools.partial(_flipped, kind, part), _apply_flipped, names="tau"
            )


def _flipped(kind: str, part: int, folder: Path) -> Path:
    """A task vector of jft with one bit flipped, in the ``part``-th of twelve parts of the file."""
    import jft
    from tests.delta.algebra import make

    path = folder / "tau.safetensors"
    jft.TaskVector({"w": make(kind, 1)}, _leaves()).save(path)
    raw = bytearray(path.read_bytes())
    rng = np.random.default_rng(part)
    # Past the length of the header, of which the highest bytes are zero: any flip there is beyond the file.
    at = int(rng.integers(8 + len(raw) * part // 13, 8 + len(raw) * (part + 1) // 13))
    # Spaces at the header's end mean nothing.
    at = next(i for i in range(at, len(raw)) if raw[i] != 0x20)
    raw[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)
    return folder


def _apply_flipped(folder: Any) -> Any:
    import jft

    return jft.TaskVector.load(folder / "tau.safetensors")


def manifests() -> Iterator[Case]:
    """Entries of a manifest."""

    def base(**values: Any) -> Callable[[dict], dict]:
        return lambda h: h | {"manifest": h["manifest"] | {"base": h["manifest"]["base"] | values}}

    def entry(**values: Any) -> Callable[[dict], dict]:
        return lambda h: h | {"manifest": h["manifest"] | values}

    leaf = ["0" * 16, 24, "float32"]
    for name, change in {
        "no leaves": base(leaves={}),
        "leaves null": base(leaves=None),
        "leaves a list": base(leaves=[]),
        "leaf null": base(leaves={"w": None}),
        "leaf short": base(leaves={"w": leaf[:2]}),
        "leaf of numbers": base(leaves={"w": [1, 2, 3]}),
        "leaves of another": base(leaves={"v": leaf}),
        "fingerprint null": base(fingerprint=None),
        "fingerprint a number": base(fingerprint=3),
        "fingerprint of another": base(fingerprint="0" * 32),
        "parameters as text": base(parameters="24"),
        "parameters negative": base(parameters=-1),
        "base a number": entry(base=1),
        "base a list": entry(base=[1]),
        "base empty": entry(base={}),
        "operation null": entry(operation=None),
        "operation a list": entry(operation=[1]),
        "parents null": entry(parents=None),
        "parents of null": entry(parents=[None]),
        "parents of numbers": entry(parents=[1]),
        "parent without manifest": entry(parents=[{"coefficient": 1}]),
        "parent's manifest null": entry(parents=[{"manifest": None}]),
        "coefficient as text": entry(parents=[{"manifest": {}, "coefficient": "1"}]),
        "coefficient not a number": entry(parents=[{"manifest": {}, "coefficient": float("nan")}]),
        "narrowed a number": entry(narrowed=1),
        "narrowed of numbers": entry(narrowed=[1]),
        "method a list": entry(method=[1]),
        "deep": lambda h: json.dumps(h)[:-1] + ', "x": ' + "[" * DEEP + "]" * DEEP + "}",
        "moderately deep": lambda h: json.dumps(h)[:-1] + ', "x": ' + "[" * 600 + "]" * 600 + "}",
        "key twice": lambda h: json.dumps(h)[:-1] + ', "version": 1}',
        "surrogate": lambda h: json.dumps(h)[:-1] + ', "x": "\\ud800"}',
        "cut": lambda h: json.dumps(h)[:-1],
        "empty": lambda h: "",
        "null": lambda h: "null",
    }.items():
        yield Case(f"manifest/{name}", _vector(change), _apply_vector, names="tau.safetensors")
    yield Case("manifest/base null", _vector(entry(base=None)), _apply_vector, refused=False)
    yield Case(
        "manifest/control characters", _vector(entry(method="\x1b[2J\x1b]0;x\x07\u202e")), _info_vector, refused=False
    )


def _info_vector(folder: Any) -> Any:
    """``jft delta info``, whose output must be plain."""
    import contextlib
    import io

    from jft.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        main.call(["delta", "info", str(folder / "tau.safetensors")])
    assert all(c.isprintable() or c == "\n" for c in shown.getvalue()), shown.getvalue()


# The index of a sharded model.


def indices() -> Iterator[Case]:
    """Names of files in an index."""

    def index(value: Any, whole: bool = False) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            file = _model(folder, shards=2) / "model.safetensors.index.json"
            # What it would reach.
            for path in folder.glob("model-*"):
                (folder.parent / path.name).write_bytes(path.read_bytes())
            held = json.loads(file.read_text())
            if whole:
                held["weight_map"] = value
            else:
                change = value if callable(value) else lambda name: value
                held["weight_map"] = {k: change(v) for k, v in held["weight_map"].items()}
            file.write_text(json.dumps(held))
            return folder

        return make

    for name, value in {
        "parent folder": lambda name: f"../{name}",
        "further up": lambda name: f"a/../../{name}",
        "absolute": "/etc/passwd",
        "device": "/dev/zero",
        "number": 1,
        "null": None,
        "list": ["a"],
        "empty": "",
        "point": ".",
        "points": "..",
        "backslash": "..\\model.safetensors",
        "null byte": "model\0.safetensors",
        "control characters": "\x1b[31mmodel.safetensors",
        "long": "a" * 5000,
        "missing": "model-00009-of-00009.safetensors",
        "not weights": "config.json",
    }.items():
        yield Case(f"index/{name}", index(value), _load_model)
    for name, value in {"null": None, "list": [], "empty": {}, "text": "x", "number": 1}.items():
        yield Case(f"index/map {name}", index(value, whole=True), _load_model, names="index.json")


# Tokenizers.


def tokenizers() -> Iterator[Case]:
    """tokenizer.json and the ids beside it."""

    def changed(change: Callable[[dict], Any], **files: Any) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            value = change(copy.deepcopy(TOKENIZER))
            text = value if isinstance(value, str) else json.dumps(value)
            (_tokenizer(folder, **files) / "tokenizer.json").write_text(text)
            return folder

        return make

    for name, change in {
        "empty": lambda t: "",
        "null": lambda t: "null",
        "array": lambda t: "[]",
        "deep": lambda t: "[" * DEEP,
        "deep objects": lambda t: '{"a":' * DEEP,
        "words": lambda t: "Entry not found",
        "no model": lambda t: {k: v for k, v in t.items() if k != "model"},
        "model null": lambda t: t | {"model": None},
        "model unknown": lambda t: t | {"model": {"type": "Python"}},
        "vocab a list": lambda t: t | {"model": t["model"] | {"vocab": [1]}},
        "ids as text": lambda t: t | {"model": t["model"] | {"vocab": {"a": "1"}}},
        "ids negative": lambda t: t | {"model": t["model"] | {"vocab": {"a": -1}}},
        "ids of 2**40": lambda t: t | {"model": t["model"] | {"vocab": {"a": 2**40}}},
        "no unknown token": lambda t: t | {"model": t["model"] | {"vocab": {"b": 0}}},
        "unigram of nothing": lambda t: t | {"model": {"type": "Unigram", "vocab": [], "unk_id": 0}},
        "added token null": lambda t: t | {"added_tokens": [None]},
        "pre-tokenizer unknown": lambda t: t | {"pre_tokenizer": {"type": "Python"}},
        "bad expression": lambda t: (
            t | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}}
        ),
    }.items():
        yield Case(
            f"tokenizer/{name}",
            changed(change),
            _load_tokenizer,
            names="tokenizer.json" if name != "no unknown token" else None,
        )
    for key in ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"):
        for value in (-1, "2", 1.5, {}, [None], True):
            make = functools.partial(_tokenizer, config={key: value})
            yield Case(f"tokenizer/{key} {value}", make, _load_tokenizer, names="config.json")
    for value in (1, {}, [1], [{"name": 1}], [{"template": "x"}], [None]):
        make = functools.partial(_tokenizer, tokenizer_config={"chat_template": value})
        yield Case(f"tokenizer/chat_template {value}", make, _load_tokenizer, names="tokenizer_config.json")
    gap = functools.partial(changed, config={})
    vocab = {"vocab": WORDS | {"far": 64}}
    yield Case("tokenizer/gap in ids", gap(lambda t: t | {"model": t["model"] | vocab}), _fits, names=None)
    for key in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
        bare = functools.partial(_tokenizer, config={key: 64}, tokenizer_config={})
        yield Case(f"tokenizer/{key} past the embedding", bare, _fits, names=None)
    yield Case("tokenizer/surrogate", _tokenizer, lambda folder: _load_tokenizer(folder).encode("\ud800"), names=None)


def _fits(folder: Any) -> Any:
    """The check of a tokenizer against the embedding of 64 rows that it is to be used with."""
    from jft.train.experiment import _check_vocabulary

    return _check_vocabulary({"embed": {"table": np.zeros((64, 4), np.float32)}}, _load_tokenizer(folder))


# Chat templates.

TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "product": "{{ 'a' * 10**12 }}",
    "product in a condition": "{% if 'a' * 10**12 %}x{% endif %}",
    "product of lists": "{{ [0] * 10**12 }}",
    "power": "{{ 10**(10**10) }}",
    "power of powers": "{{ 9**9**9**9 }}",
    "filter of constants": "{{ 'a'|center(10**11) }}",
    "filter that repeats": "{{ ('a' * 9999999)|replace('a', 'b' * 999999) }}",
    "indent": "{{ ('\n' * 999999)|indent(999999, true) }}",
    "justified": "{{ 'a'.ljust(10**11) }}",
    "zeros": "{{ 'a'.zfill(10**11) }}",
    "format": "{{ '{:99999999999}'.format(1) }}",
    "format by a number": "{{ '{:{}}'.format(1, 10**11) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "percent filter": "{{ '%99999999999d'|format(1) }}",
    "replace": "{{ ('a' * 999999).replace('a', 'b' * 999999) }}",
    "join": "{{ ('a' * 999999).join(['b'] * 999999) }}",
    "join filter": "{{ range(99999)|join('a' * 999999) }}",
    "tabs": "{{ ('\t' * 999999).expandtabs(999999) }}",
    "doubling by ~": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling blocks": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubling numbers": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "slices": "{% set n = namespace(x=[]) %}{% set s = 'a' * 999999 %}{% for i in range(99999) %}{% set n.x = n.x + [s[1:]] %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "static text": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "deep loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "long": "a" * 1_000_001,
    "long number": "{{ " + "9" * 5000 + " }}",
    "unfinished": "{% for",
    "undefined call": "{{ nothing() }}",
    "division": "{{ 1 / 0 }}",
    "attribute": "{{ messages[0].content.nothing.more }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format to classes": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "batches": "{{ [1]|batch(10**10, 0)|list }}",
    "sliced": "{{ [1]|slice(10**10)|list }}",
    "json": "{{ messages|tojson(indent=10**9) }}",
    "date": "{{ strftime_now('%99999999999d') }}",
    "surrogate": "{{ '\\ud800' }}",
}
HARMLESS_TEMPLATES = ("surrogate",)
CHAT = [{"role": "user", "content": "upright"}, {"role": "assistant", "content": "upright"}]


def templates() -> Iterator[Case]:
    """Templates that loop, multiply, or look for what is outside."""

    def render(folder: Any) -> Any:
        from jft.data.chat import ChatTemplate

        template = (folder / "chat_template.jinja").read_text()
        return ChatTemplate(template, {"eos_token": "</s>"}, date="2026-01-02").render(CHAT)

    for name, template in TEMPLATES.items():

        def make(folder: Path, template: str = template) -> Path:
            (folder / "chat_template.jinja").write_text(template)
            return folder

        yield Case(f"chat template/{name}", make, render, refused=name not in HARMLESS_TEMPLATES)


# Tables.


def tables() -> Iterator[Case]:
    """JSONL, CSV, and the log of a run."""

    def jsonl(line: bytes) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            (folder / "data.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
            return folder

        return make

    lines = {
        "words": b"Entry not found",
        "array": b"[1]",
        "null": b"null",
        "number": b"1",
        "cut": b'{"text": "a',
        "deep": b"[" * DEEP,
        "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "key twice": b'{"text": "a", "text": "b"}',
        "not a number": b'{"text": NaN}',
        "long integer": b'{"text": ' + b"9" * 5000 + b"}",
        "beyond a float": b'{"text": 1e999}',
        "surrogate": b'{"text": "\\ud800"}',
        "latin-1": b'{"text": "\xe9"}',
        "null bytes": b"\0\0\0",
        "control characters": b'{"text": "\x1b[31m"}',
    }
    for name, line in lines.items():
        yield Case(f"jsonl/{name}", jsonl(line), _read_jsonl, names="data.jsonl:2")
    for name, damage in FILES.items():
        for file, use in (("data.jsonl", _read_jsonl), ("data.csv", _read_csv)):
            if name != "link to itself":
                yield Case(f"{file.split('.')[1]}/{name}", _damaged(file, damage), use, names=file)
    yield Case("jsonl/line of 65 MiB", _damaged("data.jsonl", _long), _read_jsonl, names="data.jsonl:1")
    for name, text in {
        "long field": b"a,b\n1," + b"x" * 200_000 + b"\n",
        "open quote": b'a,b\n1,"x\n2,3\n',
        "too wide": b"a,b\n1,2,3\n",
        "too narrow": b"a,b\n1\n",
        "column twice": b"a,a\n1,2\n",
        "latin-1": b"a,b\n1,\xe9\n",
        "latin-1 header": b"a,\xe9\n1,2\n",
        "utf-16": "a,b\n1,2\n".encode("utf-16"),
        "nothing": b"",
        "header alone": b"a,b\n",
    }.items():
        yield Case(f"csv/{name}", _damaged("data.csv", _text(text)), _read_csv, names="data.csv")
    row = {"step": 1, "split": "train", "loss": 1.0}
    rows = {
        "no step": {k: v for k, v in row.items() if k != "step"},
        "no split": {k: v for k, v in row.items() if k != "split"},
        "step as text": row | {"step": "1"},
        "step null": row | {"step": None},
        "step negative": row | {"step": -1},
        "step of a float": row | {"step": 1.0},
        "split a number": row | {"split": 1},
        "array": [row],
        "null": None,
    }
    for name, value in rows.items():
        text = f"{json.dumps(row)}\n{json.dumps(value)}\n{json.dumps(row)}\n"
        yield Case(
            f"metrics/{name}", _damaged("metrics.jsonl", _text(text)), _read_metrics, names="metrics.jsonl: line 2"
        )
    for name in ("words", "deep", "not a number", "latin-1", "key twice"):
        text = json.dumps(row).encode() + b"\n" + lines[name] + b"\n" + json.dumps(row).encode() + b"\n"
        yield Case(f"metrics/{name}", _damaged("metrics.jsonl", _text(text)), _read_metrics, names="metrics.jsonl")
    yield Case("metrics/pipe", _damaged("metrics.jsonl", FILES["pipe"]), _read_metrics, names="metrics.jsonl")
    yield Case(
        "metrics/last line cut",
        _damaged("metrics.jsonl", _text('{"step": 1, "split": "a"}\n{"st')),
        _read_metrics,
        refused=False,
    )


def _long(file: Path) -> None:
    with file.open("wb") as handle:
        handle.write(b'{"text": "')
        handle.truncate(65 * 2**20)


def _damaged(name: str, damage: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text('{"text": "a"}\n')
        damage(folder / name)
        return folder

    return make


def _read_csv(folder: Any) -> Any:
    from jft.data.tables import Csv

    source = Csv(str(folder / "data.csv"))
    return [source[i] for i in range(len(source))]


# Images.


def _png(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def images() -> Iterator[Case]:
    """Images of a folder."""

    def read(folder: Any) -> Any:
        from jft.data.folders import ImageFolder

        source = ImageFolder(str(folder))
        return [source[i] for i in range(len(source))]

    def image(damage: Callable[[Path], object]) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            (folder / "cat").mkdir()
            (folder / "cat" / "a.png").write_bytes(_png(2, 2))
            damage(folder / "cat" / "a.png")
            return folder

        return make

    kinds: dict[str, Callable[[Path], object]] = {
        "8193 x 8192": _text(_png(8193, 8192)),
        "60000 x 60000": _text(_png(60_000, 60_000)),
        "2**31 - 1 wide": _text(_png(2**31 - 1, 2**31 - 1)),
        "0 x 0": _text(_png(0, 0)),
        "cut": _text(_png(64, 64)[:60]),
        "empty": _text(""),
        "words": _text("Entry not found"),
        "another format's head": _text(b"\xff\xd8\xff\xe0" + b"\0" * 99),
        "gif of nothing": _text(b"GIF89a" + b"\xff" * 20),
        "tiff of nothing": _text(b"II*\0" + b"\xff" * 40),
        "bmp of nothing": _text(b"BM" + b"\xff" * 60),
        "webp of nothing": _text(b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 40),
        "text of 2 GiB": _replaced(_sparse),
    }
    for name, damage in kinds.items():
        yield Case(f"image/{name}", image(damage), read, names="a.png")
    for name in ("pipe", "folder", "device"):
        yield Case(f"image/{name}", image(FILES[name]), read, names="a.png")


# TFDS folders.


def features() -> Iterator[Case]:
    """Classes that a TFDS folder names."""
    own = "tensorflow_datasets.core.features"

    def named(value: Any) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            (_features(folder) / "features.json").write_text(json.dumps(value))
            return folder

        return make

    def outer(feature: Any) -> dict[str, Any]:
        return {"type": f"{own}.features_dict.FeaturesDict", "content": {"x": feature}}

    evil = f"{PAYLOAD}.Feature"
    for name, value in {
        "older form": {"type": evil, "content": {}},
        "older form inside": outer({"type": evil, "content": {}}),
        "in a sequence": outer({"type": f"{own}.sequence_feature.Sequence", "content": {"feature": {"type": evil}}}),
        "newer form": {"pythonClassName": evil, "featuresDict": {"features": {}}},
        "newer form inside": {
            "pythonClassName": f"{own}.features_dict.FeaturesDict",
            "featuresDict": {"features": {"x": {"pythonClassName": evil, "jsonFeature": {"json": "{}"}}}},
        },
        "other spelling": {
            "python_class_name": f"{own}.features_dict.FeaturesDict",
            "features_dict": {"features": {"x": {"python_class_name": evil, "json_feature": {"json": "{}"}}}},
        },
        "JSON in JSON": outer({"type": f"{own}.text_feature.Text", "json": json.dumps({"type": evil})}),
        "look-alike": {"type": f"tensorflow_datasets_{PAYLOAD}.Feature", "content": {}},
        "builtins": {"type": "os.path", "content": {}},
    }.items():
        yield Case(f"tfds/{name}", named(value), _load_tfds, names="features.json")
    for name, value in {
        "class of no feature": {"type": f"{own}.nothing.Nothing", "content": {}},
        "class a number": {"type": 1, "content": {}},
        "class null": {"pythonClassName": None},
        "content null": {"type": f"{own}.features_dict.FeaturesDict", "content": None},
        "no content": {"type": f"{own}.features_dict.FeaturesDict"},
        "nothing": {},
    }.items():
        yield Case(f"tfds/{name}", named(value), _load_tfds)


# Recipes of merges.


def recipes() -> Iterator[Case]:
    """YAML."""

    def read(folder: Any) -> Any:
        from jft.merge import recipe

        return recipe.load(folder / "recipe.yml")

    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
    )
    whole = "merge_method: linear\nmodels: [{model: a}]\n"
    for name, text in {
        "empty": "",
        "words": "Entry not found",
        "list": "- 1",
        "python object": "!!python/object/apply:os.system ['touch ../reached']",
        "python module": f"a: !!python/module:{PAYLOAD}",
        "aliases": bomb,
        "endless": "a: &a [*a]",
        "endless mapping": "a: &a {b: *a}",
        "deep": "[" * 20_000,
        "deep mappings": "{a: " * 5_000,
        "seed a list": whole + "seed: [1]",
        "seed of floats": whole + "seed: 1.5",
        "seed not a number": whole + "seed: .nan",
        "seed of 5000 digits": whole + "seed: " + "9" * 5000,
        "models null": "merge_method: linear\nmodels: [null]",
        "models numbers": "merge_method: linear\nmodels: [1]",
        "method a list": "merge_method: [1]\nmodels: [{model: a}]",
        "dtype a list": whole + "dtype: [1]",
        "dtype a mapping": whole + "dtype: {a: 1}",
        "parameters a list": whole + "parameters: [1]",
        "parameter null": whole + "parameters: {weight: null}",
        "key a list": whole + "? [1]\n: 1",
        "binary": "\0\1\2",
    }.items():
        yield Case(f"recipe/{name}", _damaged("recipe.yml", _text(text)), read, names="recipe.yml")
    for name, damage in FILES.items():
        if name not in ("link to itself",):
            yield Case(f"recipe/{name}", _damaged("recipe.yml", damage), read, names="recipe.yml")


# Names and links that lead out, and folders with files of others.


def folders() -> Iterator[Case]:
    """What is written, and where."""
    for name in ("../x", "..", "/tmp/x", "a/b", "", ".", "a\\b", "a\0b", "\x1b[31m", "x" * 300):
        yield Case(f"name/study {name[:9]!r}", lambda folder, name=name: name, _check_study, names=None)
        yield Case(f"name/task {name[:9]!r}", lambda folder, name=name: name, _check_task, names=None)
        yield Case(f"name/method {name[:9]!r}", lambda folder, name=name: name, _check_method, names=None)
        yield Case(f"name/member {name[:9]!r}", lambda folder, name=name: name, _check_member, names=None)

    def linked(folder: Path, target: str) -> Path:
        _model(folder / "like")
        secret = folder / "secret"
        secret.write_text("secret")
        (folder / "like" / "tokenizer.json").symlink_to(target.format(secret=secret))
        return folder

    for name, target in {"absolute": "{secret}", "relative": "../secret", "device": "/dev/zero"}.items():
        make = functools.partial(linked, target=target)
        # What is no file is not copied.
        yield Case(
            f"link/{name}",
            make,
            _copy_companions,
            refused=name != "device",
            names="tokenizer.json" if name != "device" else None,
        )

    def cached(folder: Path) -> Path:
        blobs, like = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "0"
        blobs.mkdir(parents=True)
        like.mkdir(parents=True)
        (blobs / "1").write_text("{}")
        (like / "tokenizer.json").symlink_to("../../blobs/1")
        (folder / "like").symlink_to(like)
        return folder

    yield Case("link/of the hub's cache", cached, _copy_companions, refused=False)
    for name in ("notes.txt", ".git", "pytorch_model.bin", "model.safetensors.bak"):

        def occupied(folder: Path, name: str = name) -> Path:
            (_model(folder) / name).write_text("mine")
            return folder

        yield Case(f"overwrite/{name}", occupied, _overwrite, names=name)
    yield Case("overwrite/own files", _model, _overwrite, refused=False)


def _study(**parts: Any) -> dict[str, Any]:
    from jft.analysis import study

    data = {"source": "digits"}
    given = {
        "tasks": {"a": {"data": data}},
        "methods": {"full": {"method": {"name": "full"}}},
        "base": {"source": "x"},
    } | parts
    return study.study(**given).to_dict()


def _check_study(name: Any) -> Any:
    from jft.analysis import study

    return study.check({"studies": {name: _study()}})


def _check_task(name: Any) -> Any:
    from jft.analysis import study

    # Into the dict: a ConfigDict takes no such names, and results come from JSON.
    one = _study()
    one["tasks"] = {name: one["tasks"]["a"]}
    return study.check({"studies": {"s": one}})


def _check_method(name: Any) -> Any:
    from jft.analysis import study

    one = _study()
    one["methods"] = {name: one["methods"]["full"]}
    return study.check({"studies": {"s": one}})


def _check_member(name: Any) -> Any:
    from jft.train.members import _name

    return _name(0, {"name": name})


def _copy_companions(folder: Any) -> Any:
    from jft.models.hf import writer

    (folder / "out").mkdir()
    writer.copy_companions(folder / "like", folder / "out")


def _overwrite(folder: Any) -> Any:
    from jft.models.hf import writer

    writer.check_target(folder, overwrite=True)


def pickles() -> Iterator[Case]:
    """Weights as pickles, which would run what they say."""
    raw = f"cos\nsystem\n(S'touch ../reached; python -c \"import {PAYLOAD}\"'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):

        def make(folder: Path, name: str = name) -> Path:
            (_model(folder) / "model.safetensors").unlink()
            (folder / name).write_bytes(raw)
            return folder

        yield Case(f"pickle/{name}", make, _load_model, names=name)

    def renamed(folder: Path) -> Path:
        (_model(folder) / "model.safetensors").write_bytes(raw)
        return folder

    yield Case("pickle/model.safetensors", renamed, _load_model, names="model.safetensors")
