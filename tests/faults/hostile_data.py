"""Data: tokenizers, tables, images, TFDS folders."""

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

from tests.faults.hostile import PAYLOAD, Case
from tests.faults.hostile_damage import DEEP, FILES, content, damaged, replaced, sparse
from tests.faults.hostile_json import (
    TOKENIZER,
    WORDS,
    load_tfds,
    load_tokenizer,
    read_jsonl,
    read_metrics,
    tfds_folder,
    tokenizer_folder,
)

# Tokenizers.


def tokenizers() -> Iterator[Case]:
    """tokenizer.json and the ids beside it."""

    def changed(change: Callable[[dict], Any], **files: Any) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            value = change(copy.deepcopy(TOKENIZER))
            text = value if isinstance(value, str) else json.dumps(value)
            (tokenizer_folder(folder, **files) / "tokenizer.json").write_text(text)
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
            load_tokenizer,
            names="tokenizer.json" if name != "no unknown token" else None,
        )
    for key in ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"):
        for value in (-1, "2", 1.5, {}, [None], True):
            make = functools.partial(tokenizer_folder, config={key: value})
            yield Case(f"tokenizer/{key} {value}", make, load_tokenizer, names="config.json")
    for value in (1, {}, [1], [{"name": 1}], [{"template": "x"}], [None]):
        make = functools.partial(tokenizer_folder, tokenizer_config={"chat_template": value})
        yield Case(f"tokenizer/chat_template {value}", make, load_tokenizer, names="tokenizer_config.json")
    gap = functools.partial(changed, config={})
    vocab = {"vocab": WORDS | {"far": 64}}
    yield Case("tokenizer/gap in ids", gap(lambda t: t | {"model": t["model"] | vocab}), _fits, names=None)
    for key in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
        bare = functools.partial(tokenizer_folder, config={key: 64}, tokenizer_config={})
        yield Case(f"tokenizer/{key} past the embedding", bare, _fits, names=None)
    yield Case(
        "tokenizer/surrogate", tokenizer_folder, lambda folder: load_tokenizer(folder).encode("\ud800"), names=None
    )


def _fits(folder: Any) -> Any:
    """The check of a tokenizer against the embedding of 64 rows that it is to be used with."""
    from jft.train.experiment import _check_vocabulary

    return _check_vocabulary({"embed": {"table": np.zeros((64, 4), np.float32)}}, load_tokenizer(folder))


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
        yield Case(f"jsonl/{name}", jsonl(line), read_jsonl, names="data.jsonl:2")
    for name, damage in FILES.items():
        for file, use in (("data.jsonl", read_jsonl), ("data.csv", _read_csv)):
            if name != "link to itself":
                yield Case(f"{file.split('.')[1]}/{name}", damaged(file, damage), use, names=file)
    yield Case("jsonl/line of 65 MiB", damaged("data.jsonl", _long), read_jsonl, names="data.jsonl:1")
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
        yield Case(f"csv/{name}", damaged("data.csv", content(text)), _read_csv, names="data.csv")
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
            f"metrics/{name}", damaged("metrics.jsonl", content(text)), read_metrics, names="metrics.jsonl: line 2"
        )
    for name in ("words", "deep", "not a number", "latin-1", "key twice"):
        text = json.dumps(row).encode() + b"\n" + lines[name] + b"\n" + json.dumps(row).encode() + b"\n"
        yield Case(f"metrics/{name}", damaged("metrics.jsonl", content(text)), read_metrics, names="metrics.jsonl")
    yield Case("metrics/pipe", damaged("metrics.jsonl", FILES["pipe"]), read_metrics, names="metrics.jsonl")
    yield Case(
        "metrics/last line cut",
        damaged("metrics.jsonl", content('{"step": 1, "split": "a"}\n{"st')),
        read_metrics,
        refused=False,
    )


def _long(file: Path) -> None:
    with file.open("wb") as handle:
        handle.write(b'{"text": "')
        handle.truncate(65 * 2**20)


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
        "8193 x 8192": content(_png(8193, 8192)),
        "60000 x 60000": content(_png(60_000, 60_000)),
        "2**31 - 1 wide": content(_png(2**31 - 1, 2**31 - 1)),
        "0 x 0": content(_png(0, 0)),
        "cut": content(_png(64, 64)[:60]),
        "empty": content(""),
        "words": content("Entry not found"),
        "another format's head": content(b"\xff\xd8\xff\xe0" + b"\0" * 99),
        "gif of nothing": content(b"GIF89a" + b"\xff" * 20),
        "tiff of nothing": content(b"II*\0" + b"\xff" * 40),
        "bmp of nothing": content(b"BM" + b"\xff" * 60),
        "webp of nothing": content(b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 40),
        "text of 2 GiB": replaced(sparse),
    }
    for name, damage in kinds.items():
        yield Case(f"image/{name}", image(damage), read, names="a.png")
    for name in ("pipe", "folder", "device"):
        yield Case(f"image/{name}", image(FILES[name]), read, names="a.png")


# Arrays of NumPy.


class _Runs:
    """What a pickle would run."""

    def __reduce__(self) -> tuple:
        return __import__, (PAYLOAD,)


def _npz(file: Path) -> None:
    np.savez(file, a=np.arange(99))


def arrays() -> Iterator[Case]:
    """``.npz`` files, whose arrays of objects would be pickles."""

    def read(folder: Any) -> Any:
        from jft import files

        return files.read_npz(folder / "data.npz")

    def cut(file: Path) -> None:
        _npz(file)
        file.write_bytes(file.read_bytes()[:-30])

    def flipped(file: Path) -> None:
        _npz(file)
        raw = bytearray(file.read_bytes())
        raw[300] ^= 1
        file.write_bytes(raw)

    def single(file: Path) -> None:
        with file.open("wb") as handle:
            np.save(handle, np.arange(3))

    kinds = {
        "objects": lambda file: np.savez(file, a=np.array([_Runs()], object)),
        "empty": content(""),
        "words": content("Entry not found"),
        "cut": cut,
        "bit flipped": flipped,
        "single array": single,
        "pickle": content(b"\x80\x04\x95."),
        "pipe": FILES["pipe"],
        "device": FILES["device"],
    }
    for name, damage in kinds.items():
        yield Case(f"npz/{name}", damaged("data.npz", damage), read, names="data.npz")


# TFDS folders.


def tfds_folders() -> Iterator[Case]:
    """Classes that a TFDS folder names."""
    own = "tensorflow_datasets.core.features"

    def named(value: Any) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            (tfds_folder(folder) / "features.json").write_text(json.dumps(value))
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
        yield Case(f"tfds/{name}", named(value), load_tfds, names="features.json")
    for name, value in {
        "class of no feature": {"type": f"{own}.nothing.Nothing", "content": {}},
        "class a number": {"type": 1, "content": {}},
        "class null": {"pythonClassName": None},
        "content null": {"type": f"{own}.features_dict.FeaturesDict", "content": None},
        "no content": {"type": f"{own}.features_dict.FeaturesDict"},
        "nothing": {},
    }.items():
        yield Case(f"tfds/{name}", named(value), load_tfds)


def cases() -> Iterator[Case]:
    """All of them, in a fixed order."""
    yield from itertools.chain(tokenizers(), tables(), images(), arrays(), tfds_folders())
