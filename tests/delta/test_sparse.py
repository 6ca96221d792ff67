"""Entries, blocks and slices: sparse stays sparse, conversions are exact, weights change in place, files are small."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jft.delta import NM, Blocks, Dense, Encoding, Entries, LowRank, Rows, Slices, Sum, TaskVector, elias_fano, kinds
from jft.delta.file import FileError
from tests.delta.algebra import SHAPE, SPARSE, close, make, reference

thorough = settings(max_examples=40, deadline=None, derandomize=True)
HUGE = (80, 8192, 28672)  # 1.9e10 elements


def stored(delta):
    """What an encoding stores, from its definition: ``{(row, column): value}``."""
    nan = delta._with(values=np.full(delta.values.shape, np.nan, np.float32))
    rows, columns = np.nonzero(np.isnan(reference(nan).reshape(-1, delta.shape[-1])))
    values = reference(delta).reshape(-1, delta.shape[-1])[rows, columns]
    return dict(zip(zip(rows.tolist(), columns.tolist(), strict=True), values.tolist(), strict=True))


@pytest.fixture
def no_dense(monkeypatch):
    def refuse(self):
        raise AssertionError(f"{type(self).__name__} was made dense")

    for cls in kinds().values():
        monkeypatch.setattr(cls, "dense", refuse)


@pytest.mark.parametrize(
    ("first", "second"),
    [p for p in itertools.combinations_with_replacement((*SPARSE, "low_rank", "dense"), 2) if set(p) & set(SPARSE)],
)
def test_products_of_sparse_deltas_densify_nothing(first, second, no_dense):
    x, y = make(first, 1), make(second, 2)
    close(x.dot(y), np.sum(reference(x) * reference(y)), 100)
    jax.eval_shape(lambda x, y: y.dot(x), x, y)


@pytest.mark.parametrize(
    ("below", "above"), [*itertools.product(("rows", "no_rows", "entries", "blocks", "dense"), repeat=2)]
)
def test_values_under_values_are_written_as_one_after_the_other(below, above):
    x, y = make(below, 1).astype("bfloat16"), make(above, 2).astype("bfloat16")
    w = jnp.asarray(np.random.default_rng(3).normal(size=SHAPE).astype(jnp.bfloat16))
    both = x.under(y)
    written, back, in_turn = jax.jit(
        lambda both, x, y, w: (both.written(w), both.minus(w).add_to(w.astype(jnp.float32)), y.written(x.written(w)))
    )(both, x, y, w)
    np.testing.assert_array_equal(written, in_turn)
    np.testing.assert_allclose(back, written, atol=1e-6)
    kinds_of = {type(x), type(y)}
    assert type(both) is (Dense if Dense in kinds_of else Rows if kinds_of == {Rows} else Entries)


def test_sums_of_sparse_deltas_stay_sparse(no_dense):
    for kind in SPARSE:
        x, y = (make(kind, seed, (16, 24, 20)) for seed in (1, 2))
        total = x + y
        assert type(x + x) is type(x)
        assert stored(x + x) == {at: 2 * value for at, value in stored(x).items()}
        if kind == "n_m":  # two choices of n of m are together more than that
            assert [type(part) for part in total.parts] == [NM, NM]
            continue
        assert type(total) is type(x)
        assert set(stored(total)) == set(stored(x)) | set(stored(y))
        assert type(jax.jit(lambda x, y: x + y)(x, y)) is Sum
    mixed = make("entries", 1) + make("blocks", 2) + make("columns", 3) + make("entries", 4)
    assert [type(part) for part in mixed.parts] == [Entries, Blocks, Slices]
    assert type(make("blocks", 1) + make("tall_blocks", 2)) is Sum
    assert type(make("slices", 1) + make("columns", 2)) is Sum


def test_a_union_that_is_large_becomes_dense():
    total = make("entries", 0)
    for seed in range(1, 12):
        total = total + make("entries", seed)
    assert type(total) is Dense
    close(total, sum(reference(make("entries", seed)) for seed in range(12)))


@pytest.mark.parametrize("kind", SPARSE)
def test_conversions_are_exact(kind):
    x = make(kind, 3)
    entries = Entries.of(x)
    assert stored(entries) == stored(x)
    assert stored(jax.jit(Entries.of)(x)) == stored(x)
    dense = x.dense()
    others = Blocks.of(x, (6, 4)), Slices.of(x), Slices.of(x, -1), Entries.from_dense(dense)
    for other in jax.jit(lambda found: [x.dense() for x in found])(others):
        np.testing.assert_array_equal(other, dense)
    want = {(r // 6, c // 4) for r, c in stored(x)}
    assert len(others[0].indices) == len(want)
    assert len(others[2].indices) == len({(r // SHAPE[1], c) for r, c in stored(x)})


def test_conversions_of_other_encodings():
    for kind in ("dense", "low_rank", "sum"):
        np.testing.assert_array_equal(Entries.of(make(kind, 1)).dense(), make(kind, 1).dense())
    value = jnp.array([[0.0, 2, 0], [jnp.nan, 0, 1]])
    assert Entries.from_dense(value).columns.tolist() == [1, 0, 2]
    kept = Entries.from_dense(value, jnp.array([[1, 1, 0], [0, 0, 0]], bool))
    assert (kept.values.tolist(), kept.nnz) == ([0, 2], 1)
    assert Entries.from_dense(jnp.array([0.0, 3, 4])).rows.tolist() == [0, 0]
    assert Blocks.of(Dense(jnp.array([0.0, 3, 4, 0, 0, 0])), (1, 2)).indices.tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)])
def test_shapes_of_any_rank(shape):
    rng = np.random.default_rng(0)
    dense = np.where(rng.random(shape) < 0.2, rng.normal(size=shape), 0).astype(np.float32)
    w = rng.normal(size=shape).astype(np.float32)
    for x in (Entries.from_dense(dense), Rows(jnp.arange(shape[0]), jnp.asarray(dense), shape)):
        np.testing.assert_array_equal(x.dense(), dense)
        np.testing.assert_array_equal(Entries.of(x).dense(), dense)
        np.testing.assert_array_equal(x.apply_to(jnp.asarray(w)), w + dense)
        close(x.dot(Entries.from_dense(dense)), np.sum(dense.astype(np.float64) ** 2))


def test_coordinates_come_in_any_order_and_are_kept_row_major():
    x = Entries(jnp.array([2, 0, 2]), jnp.array([1, 3, 0]), jnp.array([1.0, 2, 3]), (3, 4))
    assert (x.rows.tolist(), x.columns.tolist(), x.values.tolist()) == ([0, 2, 2], [3, 0, 1], [2, 3, 1])
    wide = Entries(np.array([2, 0]), np.array([1, 3]), np.ones(2, np.float32), (3, 4))
    assert wide.rows.dtype == jnp.int32
    values = jnp.arange(8.0).reshape(2, 2, 2)
    blocks = Blocks(jnp.array([[1, 0, 0], [0, 1, 1]]), values, (2, 4, 4))
    assert blocks.indices.tolist() == [[0, 1, 1], [1, 0, 0]]
    np.testing.assert_array_equal(blocks.values, values[::-1])


def test_more_elements_than_int32_counts(tmp_path):
    rng = np.random.default_rng(0)
    keys = np.unique(np.r_[0, 2**31 - 1, 2**31, 2**32, math.prod(HUGE) - 1, rng.integers(0, math.prod(HUGE), 5000)])
    split = lambda keys: [jnp.asarray(part, jnp.int32) for part in np.divmod(keys, HUGE[-1])]
    x = Entries(*split(keys), jnp.arange(1.0, len(keys) + 1), HUGE)
    others = np.setdiff1d(keys + 28672, keys)[:1000]
    others = np.r_[keys[::2], others[others < math.prod(HUGE)]]
    y = Entries(*split(others), jnp.ones(len(others)), HUGE)
    want = sum(range(1, len(keys) + 1, 2))
    close(x.dot(y), want)
    close(jax.jit(lambda x, y: x.dot(y))(x, y), want)
    total = x + y
    assert type(total) is Entries
    np.testing.assert_array_equal(total.keys(), np.union1d(x.keys(), y.keys()))
    index = [np.asarray(i) for i in x.at]
    np.testing.assert_array_equal(np.ravel_multi_index(index, HUGE), keys)
    TaskVector({"w": x}).save(tmp_path / "x.safetensors")
    again = TaskVector.load(tmp_path / "x.safetensors")["w"]
    np.testing.assert_array_equal(again.keys(), keys)
    assert TaskVector({"w": x}).parameters == math.prod(HUGE)

    a, b = jnp.ones((80, 8192, 1)), jnp.arange(80.0)[:, None, None] * jnp.ones((1, 1, HUGE[-1]))
    layers = keys // (HUGE[1] * HUGE[2])
    close(x.dot(LowRank(a, b)), np.sum(np.arange(1, len(keys) + 1) * layers), 1e9)
    low = Slices(jnp.array([5, 80 * 28672 - 1]), jnp.full((2, 8192), 2.0), HUGE, -1)
    assert float(x.dot(low)) == 2 * len(keys)  # the last entry of all
    assert float(Blocks(jnp.array([[79, 63, 223]]), jnp.full((1, 128, 128), 3.0), HUGE).dot(x)) == 3 * len(keys)


def bits_of(x):
    return "".join(f"{byte:08b}" for byte in x.tobytes())


@thorough
@given(st.sets(st.integers(0, 999), max_size=200), st.integers(1000, 10**6))
def test_the_code_is_the_documented_one(keys, universe):
    keys = sorted(keys)
    low, high = elias_fano.encode(np.array(keys, np.int64), universe)
    np.testing.assert_array_equal(elias_fano.decode(low, high, len(keys), universe), keys)
    if not keys:
        assert low.size == high.size == 0
        return
    bits = max(0, math.floor(math.log2(universe / len(keys))))
    assert low.shape == (bits, -(-len(keys) // 8))
    marked = [i for i, bit in enumerate(bits_of(high)) if bit == "1"]
    assert marked == [(key >> bits) + i for i, key in enumerate(keys)]
    for j in range(bits):
        assert bits_of(low[j]).ljust(len(keys))[: len(keys)] == "".join(str(key >> j & 1) for key in keys)
    assert 8 * (low.size + high.size) <= (bits + 3) * len(keys) + 8 * bits + 9


@pytest.mark.parametrize(("density", "most"), [(0.001, 1.51), (0.01, 1.09), (0.05, 0.80), (1.0, 0.26)])
def test_bytes_of_indices_in_a_file(density, most, tmp_path):
    shape = (4, 512, 1376)  # a layer of a 7B model, an eighth as wide
    support = np.random.default_rng(0).random(shape) < density
    x = Entries.from_dense(jnp.ones(shape, jnp.bfloat16), support)
    tensors, _ = x.pack()
    assert (tensors["low"].nbytes + tensors["high"].nbytes) / len(x.values) <= most
    TaskVector({"w": x}).save(tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size <= (most + 2) * len(x.values) + 1000


def damaged(change):
    tensors, static = make("entries", 1).pack()
    tensors = {name: np.array(x) for name, x in tensors.items()}
    return Entries.unpack(*(change(tensors, static) or (tensors, static)))


def flip(tensors, static):
    tensors["low"][1, 3] ^= 4


def moved(tensors, static):
    tensors["high"][0] ^= 1
    static["crc32"] = elias_fano.checksum(tensors["low"], tensors["high"])


def cut(tensors, static):
    tensors["high"] = tensors["high"][:-1]
    static["crc32"] = elias_fano.checksum(tensors["low"], tensors["high"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "another checksum"),
        (moved, r"hold \d+ entries, its values 160"),
        (cut, "bytes of high bits"),
        (lambda t, s: (t | {"values": t["values"][:10]}, s), "low bits of shape"),
        (lambda t, s: (t, s | {"coding": "varint"}), "coded as 'varint'"),
        (lambda t, s: (t, {"shape": s["shape"]}), "has fields"),
    ],
)
def test_corrupt_indices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        damaged(change)


def test_corrupt_file_is_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    tau = TaskVector({"w": make("entries", 1)})
    tau.save(path)
    low = tau["w"].pack()[0]["low"].tobytes()
    data = path.read_bytes()
    at = data.index(low)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(FileError, match=r"x.safetensors: the delta of 'w' is damaged: .* checksum"):
        TaskVector.load(path)


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["entries", "blocks", "slices", "columns"])
def test_weights_are_changed_in_place(kind):
    shape = (2, 240, 400)
    x, w = make(kind, 1, shape), jnp.ones(shape)
    if kind == "entries":
        x = x._with(rows=x.rows[::10], columns=x.columns[::10], values=x.values[::10])
    program = jax.jit(lambda w, x: x.apply_to(w, 0.5), donate_argnums=0).lower(w, x).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == w.nbytes
    assert memory.temp_size_in_bytes <= 1.5 * x.nbytes < 0.15 * w.nbytes
    close(program(w, x), 1 + 0.5 * reference(x))


@pytest.mark.parametrize("kind", [k for k in SPARSE if not k.startswith("no")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", [("tensor", "fsdp"), (None, "fsdp", "tensor")])
def test_sharded_weights(kind, dtype, spec):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    shape = (4, 96, 20)  # blocks lie within the shards
    x = make(kind, 1, shape)
    w = np.random.default_rng(0).normal(size=shape).astype(dtype)
    program = jax.jit(lambda w, x: x.apply_to(w, 2.0), donate_argnums=0, out_shardings=sharding)
    program = program.lower(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), x).compile()
    got = program(jax.device_put(w, sharding), x)
    assert got.sharding == sharding
    added = w.astype(np.float32) + 2 * reference(x).astype(np.float32)
    np.testing.assert_array_equal(got, added.astype(dtype))
    if dtype == jnp.float32:  # every device changes what it has of the weight, and asks nobody
        assert not any(word in program.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "permute"))


def test_donated_parameters_are_consumed():
    import jft

    base = {"a": jnp.ones(SHAPE), "b": jnp.ones(3)}
    tau = TaskVector({"a": make("entries", 1)})
    where = base["a"].unsafe_buffer_pointer()
    moved = jft.apply(base, tau, donate=True)
    assert base["a"].is_deleted() and not base["b"].is_deleted()
    back = jft.revert(moved, tau, donate=True)
    assert moved["a"].is_deleted()
    assert back["a"].unsafe_buffer_pointer() == where
    np.testing.assert_allclose(back["a"], 1, atol=3e-7)


def test_gradients_flow_through_values():
    x, w = make("entries", 1), jnp.ones(SHAPE)
    slope = jax.grad(lambda values: jnp.sum(x._with(values=values).apply_to(w) ** 2))(x.values)
    close(slope, 2 * (1 + np.asarray(x.values, np.float64)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Entries(jnp.array([0]), jnp.array([0, 1]), jnp.ones(2), (3, 4)), r"rows \[n\], columns \[n\]"),
        (lambda: Entries(jnp.array([3]), jnp.array([0]), jnp.ones(1), (3, 4)), "entries rows 3..3 leave the 3 rows"),
        (lambda: Entries(jnp.array([0]), jnp.array([-1]), jnp.ones(1), (3, 4)), "columns -1..-1 leave the 4"),
        (lambda: Entries(jnp.array([1, 0, 1]), jnp.array([2, 0, 2]), jnp.ones(3), (3, 4)), "must be distinct"),
        (lambda: Entries(jnp.zeros(0), jnp.zeros(0), jnp.ones(0), (2**20, 2**12, 4)), "int32 counts to"),
        (lambda: Entries(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), ()), "shape \\(\\)"),
        (lambda: Entries.from_dense(jnp.ones(3), jnp.ones(4, bool)), "support of shape \\(4,\\)"),
        (lambda: jax.jit(lambda x: Entries.from_dense(x).values)(jnp.ones(3)), "counted under jit"),
        (lambda: Blocks(jnp.array([[0, 0, 0]]), jnp.ones((1, 2, 3)), (4, 4)), "2 x 3 do not divide matrices of 4 x 4"),
        (lambda: Blocks(jnp.array([[0, 0]]), jnp.ones((1, 2, 2)), (4, 4)), r"indices \[n, 3\]"),
        (lambda: Blocks(jnp.array([[0, 2, 0]]), jnp.ones((1, 2, 2)), (4, 4)), "block rows 2..2 leave the 2"),
        (lambda: Blocks(jnp.array([[1, 0, 0]]), jnp.ones((1, 2, 2)), (4, 4)), "block matrices 1..1 leave the 1"),
        (lambda: Blocks(jnp.array([[0, 0, 2]]), jnp.ones((1, 2, 2)), (4, 4)), "block columns 2..2 leave the 2"),
        (lambda: Blocks(jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 2, 2)), (4, 4)), "must be distinct"),
        (lambda: Blocks.of(Dense(jnp.ones((4, 4))), (3, 1)), "3 x 1 do not divide"),
        (lambda: Slices(jnp.array([0]), jnp.ones((1, 4)), (2, 3, 4), 0), "not axis 0"),
        (lambda: Slices(jnp.array([0]), jnp.ones((1, 4)), (4,)), "Entries fits a vector"),
        (lambda: Slices(jnp.array([0]), jnp.ones((1, 4)), (2, 3, 4), -1), r"values \[k, \*\(3,\)\]"),
        (lambda: Slices(jnp.array([8]), jnp.ones((1, 3)), (2, 3, 4), -1), "slices 8..8 leave the 8 slices"),
        (lambda: Slices(jnp.array([1, 1]), jnp.ones((2, 4)), (2, 3, 4)), "must be distinct"),
        (lambda: Rows(jnp.array([0]), jnp.ones(1), ()), "Dense fits it"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_every_encoding_is_exported():
    import jft.delta

    assert all(issubclass(getattr(jft.delta, cls.__name__), Encoding) for cls in kinds().values())


@pytest.mark.parametrize("axis", [-2, -1])
def test_slices_of_a_single_matrix(axis):
    w = jnp.arange(24.0).reshape(4, 6)
    values = 1 + jnp.arange(2.0 * w.shape[-3 - axis]).reshape(2, -1)
    x = Slices(jnp.array([3, 1]), values, (4, 6), axis)
    expected = np.zeros((4, 6))
    for i, index in enumerate((3, 1)):
        expected[(index, slice(None)) if axis == -2 else (slice(None), index)] = values[i]
    np.testing.assert_array_equal(x.dense(), expected)
    np.testing.assert_array_equal(x.apply_to(w), w + expected)
    np.testing.assert_array_equal(x.apply_to(w.astype(jnp.bfloat16)), (w + expected).astype(jnp.bfloat16))
    np.testing.assert_allclose(x.dot(Dense(w)), np.sum(expected * np.asarray(w)), rtol=1e-6)
    np.testing.assert_array_equal(Slices.of(Dense(jnp.asarray(expected)), axis).dense(), expected)
