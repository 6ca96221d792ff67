"""Task vectors: values, indices, headers, manifests, and single bits."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.faults.hostile import Case
from tests.faults.hostile_damage import DEEP

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
        "checksums a number": {"crc32": 1},
        "checksums of numbers": {"crc32": {"indices": 1, "values": 2}},
        "checksums of others": {"crc32": {"indices": "00000000", "values": "00000000"}},
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

    from jft.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        main.call(["delta", "info", str(folder / "tau.safetensors")])
    assert all(c.isprintable() or c == "\n" for c in shown.getvalue()), shown.getvalue()


def cases() -> Iterator[Case]:
    """All of them, in a fixed order."""
    yield from itertools.chain(vectors(), manifests())
