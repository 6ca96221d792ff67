"""Models: values of config.json, headers of weights, the index of shards, pickles."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.faults.hostile import PAYLOAD, Case
from tests.faults.hostile_damage import DEEP
from tests.faults.hostile_json import adapter_folder, json_file, load_adapter, load_model, model_folder
from tests.models.checkpoints import LLAMA

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
    "size": ("n_embd", "n_layer", "n_head", "n_positions", "dim", "n_heads", "d_model", "d_kv", "d_ff", "num_heads"),
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
                make = functools.partial(model_folder, description=_with(**{key: value}))
                yield Case(f"config value/{key} {str(value)[:12]}", make, load_model, names="config.json")
    for kind, keys in OTHER_KEYS.items():
        for key in keys:
            for value in WRONG[kind][:3]:
                make = json_file("config.json", {"model_type": "t5", key: value})
                yield Case(f"config value/{key} {str(value)[:12]}", make, _describe, names="config.json")
    scaling = {"rope_type": "linear", "factor": 2.0}
    for key in ("factor", "attention_factor", "low_freq_factor", "original_max_position_embeddings"):
        for value in (float("nan"), -1.0, "2", [], True):
            make = functools.partial(model_folder, description=_with(rope_scaling=scaling | {key: value}))
            yield Case(f"config value/rope_scaling.{key} {str(value)[:12]}", make, load_model, names="config.json")
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "intermediate_size",
        "head_dim",
    ):
        for value in (3 if key == "num_hidden_layers" else 4096, 10**8):
            make = functools.partial(model_folder, description=_with(**{key: value}))
            # One layer more may be a tensor that is missing, which is what the message then says.
            yield Case(f"config value/{key} beyond the weights {value}", make, load_model)
    experts = {"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2}
    yield Case(
        "config value/10**9 experts",
        functools.partial(model_folder, description=_with(**experts)),
        load_model,
        names="experts",
    )
    windows = {"model_type": "qwen2", "num_hidden_layers": 10**9, "use_sliding_window": True}
    yield Case(
        "config value/10**9 windows",
        functools.partial(model_folder, description=_with(**windows)),
        load_model,
        names="layers",
    )
    for value in (float("nan"), -1, "128", 1.5, [], True):
        make = functools.partial(model_folder, description=_with(max_position_embeddings=value))
        yield Case(f"config value/max_position_embeddings {value}", make, load_model, names="config.json")
    code = {"auto_map": {"AutoModelForCausalLM": f"{PAYLOAD}.Feature"}, "torch_dtype": f"{PAYLOAD}.Feature"}
    yield Case(
        "config value/auto_map", functools.partial(model_folder, description=_with(**code)), load_model, refused=False
    )


# Headers of safetensors files.


def _header(change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> Callable[[Path], Path]:
    """A model whose weights' header and data were changed."""

    def make(folder: Path) -> Path:
        file = model_folder(folder) / "model.safetensors"
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


def adapters() -> Iterator[Case]:
    """Values of the config of an adapter."""
    for name, values in {
        "no alpha": {"lora_alpha": ...},
        "alpha as text": {"lora_alpha": "4"},
        "alpha null": {"lora_alpha": None},
        "rank of a float": {"r": 2.0},
        "rank 0": {"r": 0},
        "patterns a list": {"alpha_pattern": [1]},
        "pattern of text": {"alpha_pattern": {"q_proj": "8"}},
        "pattern that is none": {"alpha_pattern": {"(": 8}},
        "pattern without end": {"alpha_pattern": {"(([a-z._0-9]+)+)+x": 8}},
        "pattern of many stars": {"alpha_pattern": {".*" * 30 + "x": 8}},
        "long pattern": {"rank_pattern": {"a" * 10_000: 8}},
        "type a list": {"peft_type": ["LORA"]},
        "start that changes the base": {"init_lora_weights": "pissa"},
        "bias a list": {"bias": [1]},
    }.items():

        def make(folder: Path, values: Any = values) -> Path:
            file = adapter_folder(folder) / "adapter_config.json"
            config = {k: v for k, v in (json.loads(file.read_text()) | values).items() if v is not ...}
            file.write_text(json.dumps(config))
            return folder

        yield Case(f"adapter value/{name}", make, load_adapter, names="adapter_config.json")


def headers() -> Iterator[Case]:
    """Every damage of the header of a model's weights, and of the file around it."""
    for kind, change in HEADERS.items():
        yield Case(f"weights/{kind}", _header(change), load_model, names="model.safetensors")
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
            (model_folder(folder) / "model.safetensors").write_bytes(raw)
            return folder

        yield Case(f"weights/{kind}", make, load_model, names="model.safetensors")
    for place, file, whole, use in (
        ("adapter weights", "adapter_model.safetensors", adapter_folder, load_adapter),
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


# The index of a sharded model.


def indices() -> Iterator[Case]:
    """Names of files in an index."""

    def index(value: Any, whole: bool = False) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            file = model_folder(folder, shards=2) / "model.safetensors.index.json"
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
        yield Case(f"index/{name}", index(value), load_model)
    for name, value in {"null": None, "list": [], "empty": {}, "text": "x", "number": 1}.items():
        yield Case(f"index/map {name}", index(value, whole=True), load_model, names="index.json")


def pickles() -> Iterator[Case]:
    """Weights as pickles, which would run what they say."""
    raw = f"cos\nsystem\n(S'touch ../reached; python -c \"import {PAYLOAD}\"'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):

        def make(folder: Path, name: str = name) -> Path:
            (model_folder(folder) / "model.safetensors").unlink()
            (folder / name).write_bytes(raw)
            return folder

        yield Case(f"pickle/{name}", make, load_model, names=name)

    def renamed(folder: Path) -> Path:
        (model_folder(folder) / "model.safetensors").write_bytes(raw)
        return folder

    yield Case("pickle/model.safetensors", renamed, load_model, names="model.safetensors")


def cases() -> Iterator[Case]:
    """All of them, in a fixed order."""
    yield from itertools.chain(config_values(), adapters(), headers(), indices(), pickles())
