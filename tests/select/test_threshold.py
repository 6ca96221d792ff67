import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jft.parallel import make_mesh
from jft.select import threshold, top, top_each, top_together, uint64

SHAPES = {"a": (3, 8, 12), "b": (40,), "c": ()}
SPECS = {"a": P(None, "fsdp", "tensor"), "b": P("fsdp"), "c": P()}
TINY = float(np.float32(1e-45))  # the smallest subnormal
AWKWARD = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, TINY, -TINY, 3.4e38, -3.4e38, 1.0000001, 0.5]


def best(scores, k, largest=True):
    """A stable sort of all scores, in float64."""
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in scores.values()]) + 0.0
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat if largest else flat, kind="stable")[:k]] = True
    ends = np.cumsum([np.size(x) for x in scores.values()])[:-1]
    parts = np.split(chosen, ends)
    return {p: part.reshape(np.shape(x)) for (p, x), part in zip(scores.items(), parts, strict=True)}


def best_each(score, k, lead, largest=True):
    k = np.broadcast_to(k, score.shape[:lead])
    out = np.zeros(score.shape, bool)
    for i in np.ndindex(*score.shape[:lead]):
        out[i] = best({"": score[i]}, int(k[i]), largest)[""]
    return out


def same(found, expected):
    assert found.keys() == expected.keys()
    for path, mask in expected.items():
        assert found[path].dtype == bool
        np.testing.assert_array_equal(np.asarray(found[path]), mask, err_msg=path)


def draw(seed, ties):
    rng = np.random.default_rng(seed)
    values = (lambda s: rng.integers(-2, 3, size=s)) if ties else (lambda s: rng.normal(size=s))
    return {p: np.asarray(values(s), np.float32) for p, s in SHAPES.items()}


SIZE = sum(int(np.prod(s)) for s in SHAPES.values())


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_top_is_a_stable_sort(ties, largest):
    scores = draw(0, ties)
    for k in [0, 1, 2, 37, 100, 257, SIZE - 1, SIZE]:
        same(top(scores, k, largest), best(scores, k, largest))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(AWKWARD), min_size=60, max_size=60), st.integers(0, 60), st.booleans())
def test_awkward_numbers(values, k, largest):
    """Both zeros are one number, subnormals are numbers of their own, infinities are scores like any other."""
    x = np.asarray(values, np.float32)
    scores = {"first": x[:24].reshape(2, 3, 4), "second": x[24:]}
    same(top(scores, k, largest), best(scores, k, largest))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_dtypes(dtype, largest):
    scores = {p: x.astype(dtype) for p, x in draw(1, False).items() if x.ndim}
    mixed = scores | {"b": np.asarray(scores["b"], np.float32)}
    for k in [1, 60, 200, SIZE - 1]:
        same(top(scores, k, largest), best(scores, k, largest))
        same(top(mixed, k, largest), best(mixed, k, largest))


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, np.inf, -np.inf])
def test_constant_scores_are_taken_in_order(value):
    scores = {p: np.full(s, value, np.float32) for p, s in SHAPES.items()}
    for k in [0, 1, 12, 300, SIZE]:
        same(top(scores, k), best(scores, k))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_the_same_on_any_mesh(axes):
    """Masks are those of one device, and sharded as their scores are."""
    scores = draw(2, True)
    mesh = make_mesh(axes)
    placed = {}
    for p, x in scores.items():
        names = [n if n and x.shape[i] % mesh.shape[n] == 0 else None for i, n in enumerate(SPECS[p])]
        placed[p] = jax.device_put(x, NamedSharding(mesh, P(*names)))
    for k in [1, 57, 200]:
        masks = top(placed, k)
        same(masks, best(scores, k))
        for p, mask in masks.items():
            assert mask.sharding.is_equivalent_to(placed[p].sharding, mask.ndim)
    masks = top_each(placed["a"], 20, 1)
    same({"a": masks}, {"a": best_each(scores["a"], 20, 1)})
    assert masks.sharding.is_equivalent_to(placed["a"].sharding, 3)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("lead", [0, 1, 2, 3])
def test_top_each(lead, largest):
    rng = np.random.default_rng(3)
    score = rng.integers(-3, 4, size=(3, 4, 5)).astype(np.float32)
    size = int(np.prod(score.shape[lead:]))
    for k in sorted({0, 1, size // 2, size}):
        np.testing.assert_array_equal(top_each(score, k, lead, largest), best_each(score, k, lead, largest))
    each = rng.integers(0, size + 1, size=score.shape[:lead])
    np.testing.assert_array_equal(top_each(score, each, lead, largest), best_each(score, each, lead, largest))


def test_several_arrays_share_what_each_index_gets():
    rng = np.random.default_rng(4)
    scores = {"q": rng.integers(0, 4, (3, 4, 5)).astype(np.float32), "b": rng.integers(0, 4, (3, 7)).astype(np.float32)}
    masks = top_together(scores, 9, 1)
    for i in range(3):
        same({p: m[i] for p, m in masks.items()}, best({p: x[i] for p, x in scores.items()}, 9))


def test_under_jit():
    """As outside, k traced too; what is not a number comes last."""
    scores = draw(5, True)
    same(jax.jit(lambda s: top(s, 50))(scores), best(scores, 50))
    score = np.random.default_rng(6).normal(size=(3, 20)).astype(np.float32)
    each = np.asarray([0, 7, 20], np.int32)
    np.testing.assert_array_equal(jax.jit(lambda k: top_each(score, k, 1))(each), best_each(score, each, 1))
    score[:, ::2] = np.nan
    last = np.where(np.isnan(score), -np.inf, score)
    np.testing.assert_array_equal(jax.jit(lambda s: top_each(s, 7, 1))(score), best_each(last, 7, 1))


@pytest.mark.parametrize("largest", [True, False])
def test_threshold(largest):
    scores = draw(7, True)
    flat = np.concatenate([x.ravel() for x in scores.values()]).astype(np.float64)
    for k in [1, 100, SIZE]:
        ordered = -np.partition(-flat, k - 1) if largest else np.partition(flat, k - 1)
        value = ordered[k - 1]
        above = np.sum(flat > value) if largest else np.sum(flat < value)
        assert threshold.threshold(scores, k, largest) == (value, above, np.sum(flat == value))
    narrow = {p: x.astype(ml_dtypes.bfloat16) for p, x in scores.items()}
    assert threshold.threshold(narrow, 100, largest) == threshold.threshold(scores, 100, largest)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: top({"w": x}, 25), "k = 25 is not between 0 and the 24"),
        (lambda x: top({"w": x}, -1), "k = -1"),
        (lambda x: top({"w": x}, 2.0), "k is 2.0; give an integer"),
        (lambda x: top({"w": x, "layers/w": x.at[0, 1].set(jnp.nan)}, 3), "1 scores of layers/w are NaN"),
        (lambda x: top({"w": x.astype(jnp.int32)}, 3), "scores of w are int32"),
        (lambda x: top_each(x, 7, 1), "k = 7 is not between 0 and the 6"),
        (lambda x: top_each(x, np.asarray([1, 2]), 1), r"integers of shape \(4,\)"),
        (lambda x: top_each(x, 1, 3), "3 leading axes"),
        (lambda x: top_together({"a": x, "b": x[1:]}, 1, 1), "do not have the same 1 leading axes"),
        (lambda x: threshold.threshold({"w": x}, 0), "k = 0 is not between 1"),
        (lambda x: jax.jit(lambda y: threshold.threshold({"w": y}, 1))(x), "under jit use top"),
    ],
)
def test_refusals(call, message):
    x = jnp.arange(24.0).reshape(4, 6)
    with pytest.raises(ValueError, match=message):
        call(x)


def test_no_arrays():
    assert top({}, 0) == {}


sum_of = jax.jit(lambda counts: uint64.sum_over(counts, [0]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**60), min_size=1, max_size=6), st.integers(0, 2**60))
def test_wide_counts(numbers, other):
    counts = uint64.of(np.asarray(numbers, np.uint64))
    total = sum_of(counts)
    assert uint64.number(total) == sum(numbers) == uint64.number(counts)
    assert bool(uint64.reaches(total, uint64.of(other))) == (sum(numbers) >= other)
    assert bool(uint64.equal(total, uint64.of(sum(numbers))))
    smaller, larger = sorted([other, sum(numbers)])
    assert uint64.number(uint64.subtract(uint64.of(larger), uint64.of(smaller))) == larger - smaller


@pytest.mark.parametrize("at_once", [5, 12, 100])
def test_more_entries_than_one_count_holds(monkeypatch, at_once):
    """Counts in two limbs, where an axis more would overflow one: as if a uint32 held no more than ``at_once``."""
    monkeypatch.setattr(threshold, "_AT_ONCE", at_once)
    monkeypatch.setattr(threshold, "_KEPT", 0)
    rng = np.random.default_rng(8)
    shapes = {"a": (3, at_once, 5), "b": (2, 3, at_once)}  # of this test alone: nothing compiled before is used
    scores = {p: rng.integers(0, 3, s).astype(np.float32) for p, s in shapes.items()}
    for k in [1, 3 * at_once, 20 * at_once]:
        same(top(scores, k), best(scores, k))


def test_long_vectors(monkeypatch):
    monkeypatch.setattr(threshold, "_LONG", 8)
    scores = {"": np.random.default_rng(9).integers(0, 3, 1001).astype(np.float32)}
    same(top(scores, 432), best(scores, 432))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("shape", "spec", "lead", "dtype"),
    [
        ((4, 1024, 2048), P(None, "fsdp", "tensor"), 0, jnp.float32),
        ((4, 1024, 2048), P(None, "fsdp", "tensor"), 1, jnp.bfloat16),
        ((4096, 2048), P("fsdp", "tensor"), 0, jnp.float32),
        ((1 << 23,), P(("fsdp", "tensor")), 0, jnp.bfloat16),
    ],
)
def test_nothing_like_the_scores_is_kept_or_gathered(shape, spec, lead, dtype):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    k = uint64.of(np.full(shape[:lead], 1000))
    key, shares, _ = jax.eval_shape(lambda x, k: threshold._shares((x,), k, lead, True), x, k)
    local = x.size * x.dtype.itemsize / 8
    for stage in (
        threshold._shares.lower((x,), k, lead, True),
        threshold._mask.lower(x, key, shares[0], lead, True),
    ):
        compiled = stage.compile()
        memory = compiled.memory_analysis()
        assert memory.argument_size_in_bytes < 1.01 * local  # what the figures are per: one device
        assert memory.temp_size_in_bytes < 0.1 * local
        text = compiled.as_text()
        assert " sort(" not in text
        for line in text.splitlines():
            if " all-gather(" in line:
                gathered = line.split("=")[1].split("[")[1].split("]")[0]
                assert np.prod([int(n) for n in gathered.split(",") if n]) < x.size / 100
