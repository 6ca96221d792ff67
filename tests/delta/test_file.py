"""The file format: round trips bit for bit, and refuses what it cannot read."""

import json
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jft.delta import BaseMismatch, Dense, TaskVector, apply, describe, file
from tests.delta.algebra import KINDS, make

MUTATIONS = [
    ("jft/delta/file.py", "checksum(value) != sums[field]", "checksum(value) == sums[field][1:]"),
    ("jft/delta/file.py", 'start = zlib.crc32(f"{name}{list(value.shape)}".encode())', "start = 0"),
    (
        "jft/delta/file.py",
        "        if not finite(value):\n            raise FileError",
        "        if False:\n            raise FileError",
    ),
    (
        "jft/delta/file.py",
        "            if not finite(value):\n                raise ValueError",
        "            if False:\n                raise ValueError",
    ),
    ("jft/delta/file.py", "    if strange:", "    if False:"),
    ("jft/delta/manifest.py", 'if not base["leaves"]:', "if False:"),
    ("jft/delta/manifest.py", "if leaves else {})", "if True else {})"),
]


def vector(kinds=KINDS, seed=0):
    base = {"w": jnp.ones((2, 3))}
    return TaskVector(
        {f"layers/{i}/w": make(k, seed + i) for i, k in enumerate(kinds)}, describe(base, method="lora", seed=3)
    )


def same(a, b):
    assert a.manifest == b.manifest
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(KINDS), max_size=4), st.integers(0, 2**20), st.sampled_from([None, "bfloat16", "float16"])
)
def test_round_trip_is_bit_equal(tmp_path, kinds, seed, dtype):
    tau = vector(kinds, seed)
    tau.save(tmp_path / "x.safetensors", dtype)
    same(TaskVector.load(tmp_path / "x.safetensors"), tau if dtype is None else tau.astype(dtype))


def test_unusual_values_and_shapes(tmp_path):
    values = jnp.array([0.0, -0.0, 3.4e38, 1e-40, -1e-45])
    tau = TaskVector(
        {
            "scalar": Dense(jnp.float32(2)),
            "empty": Dense(jnp.zeros((0, 3))),
            "odd": Dense(values),
            "transposed": Dense(np.arange(6.0, dtype=np.float32).reshape(2, 3).T),
        }
    )
    tau.save(tmp_path / "x.safetensors")
    same(TaskVector.load(tmp_path / "x.safetensors"), tau)


def test_sharded_vector(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    tau = TaskVector({"w": Dense(jax.device_put(jnp.arange(32.0), NamedSharding(mesh, PartitionSpec("fsdp"))))})
    tau.save(tmp_path / "x.safetensors")
    same(TaskVector.load(tmp_path / "x.safetensors"), tau)


def test_names_follow_the_documented_format(tmp_path):
    path = tmp_path / "x.safetensors"
    vector(["rows", "sum"]).save(path)
    with safetensors.safe_open(path, framework="numpy") as handle:
        assert sorted(handle.keys()) == [
            "layers/0/w|indices",
            "layers/0/w|values",
            "layers/1/w|0.indices",
            "layers/1/w|0.values",
            "layers/1/w|1.a",
            "layers/1/w|1.b",
        ]
        metadata = handle.metadata()
    assert sorted(metadata) == ["crc32", "jft"]
    assert metadata["crc32"] == f"{zlib.crc32(metadata['jft'].encode()):08x}"
    header = json.loads(metadata["jft"])
    assert (header["format"], header["version"]) == ("jft.task_vector", 1)
    rows = header["deltas"]["layers/0/w"]
    assert sorted(rows.pop("crc32")) == ["indices", "values"]
    assert rows == {"kind": "rows", "shape": [4, 24, 20], "static": {"shape": [4, 24, 20]}}


def test_inspect_reads_no_values(tmp_path):
    path = tmp_path / "x.safetensors"
    tau = vector()
    tau.save(path, "bfloat16")
    header = file.inspect(path)
    assert header.manifest == tau.manifest
    stored = tau.astype(jnp.bfloat16)
    packed = {p: sum(x.nbytes for x in d.pack()[0].values()) for p, d in stored.items()}
    assert {p: (e.kind, e.shape, e.nbytes) for p, e in header.entries.items()} == {
        p: (d.kind, d.shape, packed[p]) for p, d in stored.items()
    }
    assert {d.kind for p, d in stored.items() if d.nbytes != packed[p]} == {"entries"}
    assert {e.dtype for e in header.entries.values()} == {"BF16"}


def test_load_some_paths(tmp_path):
    path = tmp_path / "x.safetensors"
    vector().save(path)
    assert TaskVector.load(path, ["layers/1/w"]).paths == ["layers/1/w"]
    with pytest.raises(ValueError, match="no delta for 'q'; it has: layers/0/w"):
        TaskVector.load(path, ["q"])


def test_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    vector(["dense"]).save(path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        with open(name, "wb") as half:
            half.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        vector(["rows"]).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_path_with_the_separator_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path 'a\|b' cannot be written"):
        TaskVector({"a|b": make("dense", 1)}).save(tmp_path / "x.safetensors")
    assert not os.listdir(tmp_path)


def _rewrite(path, change, drop=()):
    with safetensors.safe_open(path, framework="numpy") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys() if name not in drop}  # noqa: SIM118
        header = json.loads(handle.metadata()["jft"])
    safetensors.numpy.save_file(tensors, path, {"jft": json.dumps(change(header))})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "truncated, damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "truncated, damaged"),
        (lambda p: p.write_bytes(b""), "truncated, damaged"),
        (lambda p: p.write_bytes(b"not a tensor file at all, but long enough to look at"), "truncated, damaged"),
        (lambda p: safetensors.numpy.save_file({"w": np.ones(2)}, p), "no task vector; jft.load reads"),
        (lambda p: safetensors.numpy.save_file({"w": np.ones(2)}, p, {"jft": "{"}), "damaged header"),
        (lambda p: safetensors.numpy.save_file({"w": np.ones(2)}, p, {"jft": "[]"}), "is no task vector"),
        (lambda p: _rewrite(p, lambda h: h | {"version": 2}), "format version 2, this jft reads 1; upgrade"),
        (lambda p: _rewrite(p, lambda h: h | {"format": "other"}), "is no task vector"),
        (lambda p: _rewrite(p, lambda h: {k: v for k, v in h.items() if k != "deltas"}), "no manifest or no deltas"),
        (
            lambda p: _rewrite(p, lambda h: h, drop=["layers/0/w|values"]),
            r"'layers/0/w' is damaged: it has \['indices'\]",
        ),
        (
            lambda p: _rewrite(
                p, lambda h: h | {"deltas": {"layers/0/w": h["deltas"]["layers/0/w"] | {"kind": "magic"}}}
            ),
            "encoding 'magic', this jft knows dense",
        ),
        (
            lambda p: _rewrite(p, lambda h: h | {"deltas": {"layers/0/w": h["deltas"]["layers/0/w"] | {"shape": [1]}}}),
            r"its header says \[1\]",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "x.safetensors"
    vector(["rows"]).save(path)
    damage(path)
    with pytest.raises(file.FileError, match=message) as error:
        TaskVector.load(path)
    assert str(path) in str(error.value)


def test_every_byte_is_under_a_checksum(tmp_path):
    path = tmp_path / "x.safetensors"
    tau = TaskVector({"w": make("rows", 1, (2, 2, 2))}, {"method": "lora"})
    tau.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            same(TaskVector.load(path), tau)
        except file.FileError:
            continue
        # Spaces that fill up the header are the one thing that means nothing.
        assert whole[at : at + 1] == b" ", (at, whole[at - 20 : at + 20])


def test_a_checksum_is_of_dtype_and_shape_too():
    x = np.arange(6, dtype=np.float32)
    others = (x.view(np.int32), x.reshape(2, 3), x.reshape(3, 2), x.astype(np.float64), x + 1)
    assert len({file.checksum(y) for y in (x, *others)}) == 6
    assert file.checksum(x.reshape(2, 3).T) == file.checksum(np.ascontiguousarray(x.reshape(2, 3).T))


def test_damage_is_seen_where_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    tau = vector(["dense", "rows"])
    tau.save(path)
    data = path.read_bytes()
    at = data.index(np.asarray(tau["layers/1/w"].values).tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert TaskVector.load(path, ["layers/0/w"]).paths == ["layers/0/w"]
    for read in (TaskVector.load, file.verify, lambda p: TaskVector.load(p, ["layers/1/w"])):
        with pytest.raises(file.FileError, match="'layers/1/w' is damaged: its values have another checksum"):
            read(path)


def test_files_of_before_there_were_checksums_load(tmp_path):
    path = tmp_path / "x.safetensors"
    tau = vector(["dense", "sum", "entries"])
    tau.save(path)
    without = lambda entry: {k: v for k, v in entry.items() if k != "crc32"}
    _rewrite(path, lambda h: h | {"deltas": {p: without(entry) for p, entry in h["deltas"].items()}})
    same(TaskVector.load(path), tau)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"delta of 'w' is not finite \(value, as float32\); nothing was written"):
        TaskVector({"w": Dense(jnp.array([1.0, value]))}).save(path)
    # 1e5 is beyond float16.
    with pytest.raises(ValueError, match="as float16"):
        TaskVector({"w": Dense(jnp.array([1e5]))}).save(path, "float16")
    assert not path.exists()
    TaskVector({"w": Dense(jnp.array([1.0, 2.0]))}).save(path)
    with safetensors.safe_open(path, framework="numpy") as handle:
        header = json.loads(handle.metadata()["jft"])
    del header["deltas"]["w"]["crc32"]
    safetensors.numpy.save_file({"w|value": np.array([1, value], np.float32)}, path, {"jft": json.dumps(header)})
    with pytest.raises(file.FileError, match=r"x\.safetensors: the delta of 'w' has value that are not finite"):
        TaskVector.load(path)


def test_a_base_without_leaves_agrees_with_nothing(tmp_path):
    base = {"w": jnp.ones(3), "v": jnp.ones(2)}
    tau = TaskVector({"w": Dense(jnp.ones(3)), "head": Dense(jnp.ones(2))}, describe(base))
    assert set(tau.select("w").manifest["base"]["leaves"]) == {"w"}
    # Of the head its base says nothing.
    assert "base" not in tau.select("head").manifest
    empty = TaskVector(dict(tau.items()), tau.manifest | {"base": {**tau.manifest["base"], "leaves": {}}})
    with pytest.raises(
        BaseMismatch, match=r"names no leaf of its base, so these parameters cannot be verified; pass check"
    ):
        apply(base | {"head": jnp.ones(2)}, empty)
    empty.save(tmp_path / "x.safetensors")
    with pytest.raises(file.FileError, match=r"base: leaves is \{\}; it must be leaves, at least one"):
        TaskVector.load(tmp_path / "x.safetensors")
