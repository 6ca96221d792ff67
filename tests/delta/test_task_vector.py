"""Task vectors: forming, arithmetic, the base they belong to, applying and reverting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jft
from jft import tree
from jft.delta import BaseMismatch, Dense, LowRank, Rows, TaskVector, apply, describe, revert
from tests.delta.algebra import KINDS, SHAPE, close, make, reference

PATHS = ("a/w", "b/w", "c")
thorough = settings(max_examples=30, deadline=None, derandomize=True)


def vectors(base=None):
    manifest = {} if base is None else describe(base)
    kinds = st.dictionaries(st.sampled_from(PATHS), st.sampled_from(KINDS), max_size=3)
    return st.builds(
        lambda chosen, seed: TaskVector({p: make(k, seed + i) for i, (p, k) in enumerate(chosen.items())}, manifest),
        kinds,
        st.integers(0, 2**20),
    )


def dense(tau):
    return np.concatenate([(reference(tau[p]) if p in tau else np.zeros(SHAPE)).ravel() for p in PATHS])


def agree(tau, want):
    close(dense(tau), want)


def params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(size=SHAPE), dtype)
    return {"a": {"w": draw()}, "b": {"w": draw()}, "c": draw()}


def tuned_from(base, seed=1, size=1e-2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + size * rng.normal(size=x.shape)).astype(x.dtype), base)


@thorough
@given(vectors(), vectors(), vectors(), st.floats(-3, 3, width=32))
def test_vectors_form_a_vector_space(x, y, z, c):
    a, b, d = dense(x), dense(y), dense(z)
    agree(x + y, a + b)
    agree(y + x, a + b)
    agree(sum([x, y, z]), a + b + d)
    agree(x + (y + z), a + b + d)
    agree(c * (x - y), c * (a - b))
    agree(-x / 2, -a / 2)
    size = 1 + np.linalg.norm(a) * np.linalg.norm(b)
    close(x.dot(y), a @ b, size)
    close(x.norm(), np.linalg.norm(a), size)
    want = a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0
    close(x.cosine(y), want)


@thorough
@given(vectors(), st.floats(-2, 2, width=32))
def test_revert_undoes_apply_within_the_documented_bound(tau, c):
    base = params()
    moved = apply(base, tau, c)
    back = revert(moved, tau, c)
    for path, w in tree.flatten(base).items():
        v = tree.flatten(moved)[path]
        bound = np.spacing(np.abs(v)) / 2 + np.spacing(np.abs(w))
        if path in tau and tau[path].kind in ("low_rank", "sum"):
            bound = bound + 2e-6
        assert (np.abs(np.asarray(tree.flatten(back)[path]) - np.asarray(w)) <= bound).all()
    untouched = [p for p in PATHS if p not in tau]
    for p in untouched:
        np.testing.assert_array_equal(tree.flatten(back)[p], tree.flatten(base)[p])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_between_then_apply_gives_the_tuned_model(dtype):
    base = params(dtype=dtype)
    tuned = tuned_from(base)
    tau = TaskVector.between(base, tuned)
    got = apply(base, tau)
    assert tree.flatten(got)["c"].dtype == dtype
    if dtype == jnp.bfloat16:  # float32 holds the difference of nearby bfloat16 numbers exactly
        jax.tree.map(np.testing.assert_array_equal, got, tuned)
        jax.tree.map(np.testing.assert_array_equal, revert(got, tau, exact=True), base)
    else:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7, atol=2e-7), got, tuned)


def test_difference_is_formed_in_float32():
    base = {"w": jnp.full((4, 4), 1.0, jnp.bfloat16)}
    tuned = {"w": jnp.full((4, 4), 1.001, jnp.float32)}
    np.testing.assert_array_equal(TaskVector.between(base, tuned)["w"].value, np.float32(1.001) - np.float32(1))
    assert TaskVector.between(base, tuned, dtype=jnp.bfloat16)["w"].dtype == jnp.bfloat16


def test_equal_leaves_are_dropped_and_absent_is_zero():
    base = params() | {"steps": jnp.arange(3), "nan": jnp.array([jnp.nan])}
    tuned = base | {"c": base["c"].at[0, 0, 0].add(1.0)}
    tau = TaskVector.between(base, tuned, manifest={"method": "full", "seed": 3})
    assert tau.paths == ["c"]
    assert tau.manifest["method"] == "full"
    assert tau.manifest["base"]["fingerprint"] == tree.fingerprint(base)
    assert tau.parameters == tree.count(base)
    assert tau.density == 1 / tree.count(base)
    assert len(TaskVector.between(base, base)) == 0
    assert float(TaskVector.between(base, base).norm()) == 0
    jax.tree.map(np.testing.assert_array_equal, apply(base, tau), tuned)


def test_containers_and_dtypes_of_the_base_are_kept():
    base = {"layers": [jnp.ones((2, 2), jnp.bfloat16), (jnp.ones(3), jnp.arange(2))]}
    tau = TaskVector({"layers/0": Dense(jnp.ones((2, 2))), "layers/1/0": Dense(jnp.ones(3))})
    got = apply(base, tau, 2.0)
    assert jax.tree.structure(got) == jax.tree.structure(base)
    assert got["layers"][0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["layers"][0], 3 * np.ones((2, 2)))
    np.testing.assert_array_equal(got["layers"][1][1], np.arange(2))


def test_results_say_what_they_came_from():
    base = params()
    a, b = (TaskVector.between(base, tuned_from(base, s), manifest={"data": s}) for s in (1, 2))
    manifest = (0.5 * (a + b) - 2 * a).manifest
    assert [(p["coefficient"], p["manifest"]["data"]) for p in manifest["parents"]] == [(0.5, 1), (0.5, 2), (-2.0, 1)]
    assert manifest["base"] == a.manifest["base"]
    assert "leaves" not in manifest["parents"][0]["manifest"]["base"]
    trimmed = (a + b).map(lambda p, d: None if p == "c" else d.scaled(2.0), "drop", keep=2)
    assert trimmed.paths == ["a/w", "b/w"]
    assert trimmed.manifest["operation"] == "drop"
    assert trimmed.manifest["keep"] == 2
    assert trimmed.manifest["parents"][0]["manifest"]["operation"] == "linear"


def test_vectors_of_different_bases_are_refused_with_both_shown():
    first, second = params(0), params(5)
    a, b = (TaskVector.between(base, tuned_from(base)) for base in (first, second))
    with pytest.raises(BaseMismatch) as error:
        a + b
    assert a.manifest["base"]["fingerprint"] in str(error.value)
    assert b.manifest["base"]["fingerprint"] in str(error.value)
    forced = TaskVector.combine([a, b], [1.0, 1.0], check=False)
    agree(forced, dense(a) + dense(b))
    assert "base" not in forced.manifest


def test_apply_to_another_base_is_refused():
    base = params()
    tau = TaskVector.between(base, tuned_from(base))
    other = base | {"c": base["c"].at[0, 0, 0].add(1e-6 + np.spacing(np.float32(4)))}
    with pytest.raises(BaseMismatch, match="differ in c"):
        apply(other, tau)
    with pytest.raises(BaseMismatch, match=r"of another dtype than the base .*: bfloat16 and float32 in a/w"):
        apply(tree.cast(base, jnp.bfloat16), tau)
    apply(other, tau, check=False)
    with pytest.raises(BaseMismatch, match="reverted parameters"):
        revert(other, tau, exact=True)
    with pytest.raises(ValueError, match="knows its base"):
        revert(base, TaskVector({}), exact=True)


def test_vectors_of_classifiers_share_their_backbone():
    backbone = params()
    heads = [{"classifier": {"w": jnp.full((3, n), float(n))}} for n in (2, 5)]
    a, b = (TaskVector.between(backbone | h, tuned_from(backbone | h, i)) for i, h in enumerate(heads))
    with pytest.raises(BaseMismatch, match="classifier/w"):
        a + b
    a, b = a.exclude("^classifier/"), b.exclude("^classifier/")
    both = a + b
    assert both.manifest["base"]["fingerprint"] == tree.fingerprint(backbone)
    apply(backbone, both)
    merged = apply(backbone | heads[1], both)
    np.testing.assert_array_equal(merged["classifier"]["w"], heads[1]["classifier"]["w"])
    with pytest.raises(BaseMismatch, match="differ in"):
        apply(params(7), both)


def test_select_and_exclude():
    base = params()
    tau = TaskVector.between(base, tuned_from(base))
    assert tau.select("w$").paths == ["a/w", "b/w"]
    assert tau.exclude(["^a/", "^b/"]).paths == ["c"]
    agree(tau.select("w$") + tau.exclude("w$"), dense(tau))
    assert tau.select("^a").manifest["narrowed"] == ["select ^a"]
    with pytest.raises(ValueError, match=r"select 'q/w' matches no weight; nearest paths: .*/w"):
        tau.select("q/w")
    lacking = {k: v for k, v in base.items() if k != "c"}
    with pytest.raises(BaseMismatch, match="they lack c"):
        apply(lacking, TaskVector({"a/w": tau["a/w"]}, tau.manifest))


def test_jit_grad_and_eight_devices():
    base = params()
    tau = TaskVector({"a/w": make("low_rank", 1), "b/w": make("rows", 2), "c": make("dense", 3)}, describe(base))
    want = {p: np.asarray(w, np.float64) + 0.5 * reference(tau[p]) for p, w in tree.flatten(base).items()}
    merged = jax.jit(lambda base, tau, c: apply(base, c * tau))(base, tau, 0.5)
    jax.tree.map(close, tree.flatten(merged), want)
    result = jax.jit(lambda t, c: t + c * t)(tau, 2.0)
    agree(result, 3 * dense(tau))
    assert result.manifest["parents"][1]["coefficient"] is None
    slope = jax.grad(lambda c: sum(jnp.sum(x) for x in jax.tree.leaves(apply(base, tau, c))))(1.0)
    close(slope, dense(tau).sum(), 100)

    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    sharded = jax.device_put(base, sharding)
    assert tree.fingerprint(sharded) == tree.fingerprint(base)
    merged = apply(sharded, tau, 0.5)
    jax.tree.map(close, tree.flatten(merged), want)
    assert all(x.sharding == sharding for x in jax.tree.leaves(merged))
    again = TaskVector.between(sharded, merged)
    agree(again, 0.5 * dense(tau))
    close((again + tau).norm(), 1.5 * np.linalg.norm(dense(tau)), 100)


def test_is_a_pytree_with_paths():
    tau = TaskVector({"a/w": LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))}, {"seed": 1})
    doubled = jax.tree.map(lambda x: 2 * x, tau)
    assert doubled.manifest == {"seed": 1}
    close(doubled["a/w"], 4 * np.ones((3, 2)))
    (keys, _), *_ = jax.tree_util.tree_leaves_with_path(tau)
    assert tree.path_of(keys) == "a/w/a"
    assert "a/w" in tau
    assert "low_rank" in repr(tau)
    assert dict(tau.items()) == tau.deltas


def test_astype_keeps_the_manifest():
    tau = TaskVector({"a/w": make("rows", 1)}, {"seed": 1}).astype(jnp.bfloat16)
    assert tau.nbytes == 2 * 4 + 2 * 24 * 20 * 2
    assert tau.manifest == {"seed": 1}


@pytest.mark.parametrize(
    ("make_error", "message"),
    [
        (lambda b: TaskVector.between(b, {"a": b["a"]}), r"'b/w' \(and 1 more\) is in base but not in tuned"),
        (lambda b: TaskVector.between(b, b | {"d": jnp.ones(2)}), "'d' is in tuned but not in base"),
        (lambda b: TaskVector.between(b, b | {"c": jnp.ones(2)}), r"'c' has shape \(4, 24, 20\) in base but \(2,\)"),
        (
            lambda b: TaskVector.between(b | {"i": jnp.arange(2)}, b | {"i": jnp.arange(2) + 1}),
            "'i' is int32 and changed",
        ),
        (lambda b: TaskVector.between(b, b | {"c": b["c"].at[0].set(jnp.nan)}), "not finite at 'c'"),
        (lambda b: TaskVector({"c": jnp.ones(3)}), "wrap arrays in jft.delta.Dense"),
        (lambda b: TaskVector({}, {"config": object()}), "'config' cannot be written as JSON"),
        (lambda b: TaskVector({}, {"base": "abc"}), "describe_base"),
        (lambda b: apply(b, TaskVector({"q": make("dense", 1)})), "changes 'q', which these parameters do not have"),
        (lambda b: apply(b, TaskVector({"c": Dense(jnp.ones(3))})), r"'c': a delta of shape \(3,\)"),
        (lambda b: TaskVector({"c": make("rows", 1)}) * jnp.ones(3), "one finite number"),
        (lambda b: TaskVector({"c": make("rows", 1)}) * float("nan"), "one finite number"),
        (lambda b: TaskVector({"c": make("rows", 1)}) * "2", "one finite number"),
        (lambda b: TaskVector({"c": make("rows", 1)}) * TaskVector({}), "inner product"),
        (
            lambda b: TaskVector({"c": Dense(jnp.ones(3))}) + TaskVector({"c": Dense(jnp.ones(4))}),
            "'c': .* different shapes",
        ),
        (lambda b: TaskVector({"c": Dense(jnp.ones(3))}).dot(TaskVector({"c": Dense(jnp.ones(4))})), "'c': dot"),
        (lambda b: jax.jit(lambda c: TaskVector({"c": make("dense", 1)}) * c)(jnp.ones(2)), r"shape \(2,\)"),
    ],
)
def test_errors(make_error, message):
    with pytest.raises(ValueError, match=message):
        make_error(params())


def test_type_errors_of_python_operators():
    tau = TaskVector({"c": Rows(jnp.array([0]), jnp.ones((1, 2)), (3, 2))})
    for wrong in (lambda: tau + 1, lambda: 1 + tau, lambda: tau - 1):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(KeyError, match="absent"):
        tau["d"]


def test_public_names():
    assert jft.TaskVector is TaskVector
    assert jft.apply is apply
    assert jft.revert is revert


def test_iterates_over_paths():
    base = {"b": jnp.zeros(2), "a": jnp.zeros(3)}
    tau = jft.TaskVector.between(base, jax.tree.map(lambda x: x + 1, base))
    assert sorted(tau) == ["a", "b"]
    assert all(tau[path].shape == base[path].shape for path in tau)
