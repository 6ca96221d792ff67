"""Every score against its formula in float64 NumPy, on the toy model, a perceptron and a small decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import delta, parallel, tree
from jft.models import DecoderConfig, Model
from jft.models.moe import Experts
from jft.select import scores
from jft.select.low_rank import low_rank
from jft.train.calibration import RunCalibration
from jft.train.objectives import Classification, LanguageModel
from tests.train import tools

PATHS = ("one/w", "one/b", "two/w")


@functools.cache
def calibration(paths=PATHS, train=None, seed=0):
    return RunCalibration(
        tools.apply, tools.parameters(), paths, Classification(), tools.batches(), train=train, seed=seed
    )


DECODER = Model(DecoderConfig(vocab=32, width=16, layers=2, heads=4, kv_heads=2, hidden=24))
MIXTURE = Model(DecoderConfig(vocab=32, width=16, layers=2, heads=4, hidden=16, experts=Experts(4, 2, 16)))


@functools.cache
def tokens_of(model, rows=4):
    r = np.random.default_rng(0)
    tokens = r.integers(0, 32, (3, rows, 9)).astype(np.int32)
    segments = (np.arange(9)[None] < r.integers(4, 10, (3, rows))[..., None]).astype(np.int32)
    return [{"tokens": t, "segments": s} for t, s in zip(tokens, segments, strict=True)]


@functools.cache
def initial(model, seed=1):
    return model.init(jax.random.key(seed))


def language(model, paths, **options):
    params = options.pop("params", None) or initial(model)
    return RunCalibration(model, params, paths, LanguageModel(), tokens_of(model), **options)


def wide(x):
    return np.asarray(x, np.float64)


WEIGHTS = {p: wide(x) for p, x in tree.flatten(tools.parameters()).items()}


def gradients(count):
    return [tools.reference_gradient(tools.parameters(), b)[1] for b in tools.batches()[:count]]


def mean_gradient(path, count):
    return np.mean([g[path] for g in gradients(count)], axis=0)


def shifted(steps):
    r = np.random.default_rng(steps)
    return jax.tree.map(lambda x: x + jnp.asarray(r.normal(size=x.shape), jnp.float32), tools.parameters())


def z(x, axes=None):
    return (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)


CASES = {
    "magnitude": (scores.Magnitude(), lambda p: np.abs(WEIGHTS[p])),
    "gradient": (scores.Gradient(3), lambda p: np.abs(mean_gradient(p, 3))),
    "accumulated": (scores.Accumulated(3), lambda p: np.abs(sum(g[p] for g in gradients(3)))),
    "fisher": (scores.Fisher(2, per="batch"), lambda p: np.mean([g[p] ** 2 for g in gradients(2)], axis=0)),
    "absolute": (scores.Fisher(2, per="batch", power=1), lambda p: np.mean([abs(g[p]) for g in gradients(2)], axis=0)),
    "snip": (scores.Snip(2), lambda p: np.abs(WEIGHTS[p] * mean_gradient(p, 2))),
    "movement": (scores.Movement(7), lambda p: np.abs(wide(tree.flatten(shifted(7))[p]) - WEIGHTS[p])),
    "negated": (scores.Negated(scores.Magnitude()), lambda p: -np.abs(WEIGHTS[p])),
    "sum": (
        scores.Sum((scores.Magnitude(), scores.Gradient(2)), (2.0, -0.5)),
        lambda p: 2 * np.abs(WEIGHTS[p]) - 0.5 * np.abs(mean_gradient(p, 2)),
    ),
    "product": (
        scores.Product((scores.Magnitude(), scores.Gradient(2))),
        lambda p: np.abs(WEIGHTS[p]) * np.abs(mean_gradient(p, 2)),
    ),
    "normalised": (scores.Normalised(scores.Magnitude()), lambda p: z(np.abs(WEIGHTS[p]))),
    "spider": (
        scores.Normalised(scores.Accumulated(3), squash=True),
        lambda p: 1 / (1 + np.exp(-z(np.abs(sum(g[p] for g in gradients(3)))))),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    score, reference = CASES[name]
    found = score(calibration(train=shifted))
    assert set(found) == set(PATHS)
    for path in PATHS:
        assert found[path].dtype == jnp.float32
        np.testing.assert_allclose(found[path], reference(path), rtol=5e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_values(name):
    score = CASES[name][0]
    assert dataclasses.replace(score) == score
    assert hash(dataclasses.replace(score)) == hash(score)
    with pytest.raises(dataclasses.FrozenInstanceError):
        score.other = 1


def test_fisher_per_example():
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in tools.batches()[:2] for i in range(8)][:10]
    each = [tools.reference_gradient(tools.parameters(), r)[1] for r in rows]
    found = scores.Fisher(10)(calibration())
    for path in PATHS:
        np.testing.assert_allclose(found[path], np.mean([g[path] ** 2 for g in each], axis=0), rtol=5e-5, atol=1e-9)


def test_sm3_against_a_loop_over_entries():
    found = scores.SM3(3)(calibration(("one/w", "two/w")))
    for path, score in found.items():
        rows, columns = np.zeros(score.shape[0]), np.zeros(score.shape[1])
        for gradient in gradients(3):
            g = gradient[path]
            nu = np.array(
                [[min(rows[i], columns[j]) + g[i, j] ** 2 for j in range(len(columns))] for i in range(len(rows))]
            )
            rows, columns = nu.max(1), nu.max(0)
        np.testing.assert_allclose(score, np.outer(rows, columns), rtol=1e-4, atol=1e-12)


def test_normalised_goes_matrix_by_matrix():
    model = DECODER
    path = "layers/mlp/up/w"
    found = scores.Normalised(scores.Magnitude())(language(model, (path,)))[path]
    w = np.abs(wide(tree.flatten(initial(model))[path]))
    np.testing.assert_allclose(found, z(w, (1, 2)), rtol=1e-4, atol=1e-5)
    flat = scores.Normalised(scores.Given({path: np.ones(w.shape, np.float32)}))(language(model, (path,)))[path]
    np.testing.assert_array_equal(flat, 0)


def decaying(shape, seed=0):
    """Matrices whose singular values fall as those of trained weights do: slowly at first."""
    r = np.random.default_rng(seed)
    u = np.linalg.qr(r.normal(size=(*shape[:-2], shape[-2], min(shape[-2:]))))[0]
    v = np.linalg.qr(r.normal(size=(*shape[:-2], shape[-1], min(shape[-2:]))))[0]
    s = (1.0 + np.arange(min(shape[-2:]))) ** -0.7
    return (u * s) @ np.swapaxes(v, -1, -2)


def truncated(w, rank):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


@pytest.mark.parametrize("shape", [(40, 64), (3, 64, 40), (2, 3, 24, 32)])
@pytest.mark.parametrize("exact", [True, False])
def test_low_rank_is_the_truncated_svd(shape, exact):
    w = decaying(shape)
    found = low_rank(jnp.asarray(w, jnp.float32), 6, 12, 8, jax.random.key(0), exact)
    error = np.linalg.norm(found - truncated(w, 6)) / np.linalg.norm(truncated(w, 6))
    assert error < (1e-5 if exact else 1e-3), error


def test_low_rank_without_power_iterations_is_near_the_optimum():
    w = decaying((3, 64, 40))
    best = np.linalg.norm(w - truncated(w, 6))
    for iterations, excess in ((0, 1.3), (2, 1.01)):
        found = low_rank(jnp.asarray(w, jnp.float32), 6, 8, iterations, jax.random.key(0))
        assert best * 0.9999 < np.linalg.norm(w - found) < best * excess


@pytest.mark.parametrize(("rank", "oversample"), [(16, 8), (100, 8), (16, None), (15, 8), (8, None)])
def test_low_rank_of_full_rank_is_exact(rank, oversample):
    """From rank 16 on the weight itself; at 15, and 8 with as many more, the subspace is everything."""
    w = decaying((2, 16, 24))
    found = low_rank(jnp.asarray(w, jnp.float32), rank, oversample, 1, jax.random.key(0))
    np.testing.assert_allclose(found, truncated(w, min(rank, 16)), atol=2e-6)


def test_low_rank_scores_and_residuals():
    path = "layers/mlp/up/w"
    w = wide(tree.flatten(initial(DECODER))[path])
    kept = truncated(w, 4)
    for score, expected in (
        (scores.LowRank(4, exact=True), np.abs(kept)),
        (scores.LowRank(4, oversample=12), np.abs(kept)),
        (scores.LowRank(4, exact=True, residual=True), np.abs(w - kept)),
    ):
        np.testing.assert_allclose(score(language(DECODER, (path,)))[path], expected, atol=1e-6)


def test_random_is_uniform_and_differs_by_path_draw_and_seed():
    path = "layers/mlp/up/w"
    one = scores.Random()(language(DECODER, (path, "layers/mlp/gate/w")))
    assert 0.4 < float(jnp.mean(one[path])) < 0.6
    assert float(jnp.min(one[path])) >= 0 and float(jnp.max(one[path])) < 1
    alone = scores.Random()(language(DECODER, (path,)))[path]
    np.testing.assert_array_equal(one[path], alone)
    others = [one["layers/mlp/gate/w"], scores.Random(1)(language(DECODER, (path,)))[path]]
    others.append(scores.Random()(language(DECODER, (path,), seed=1))[path])
    for other in others:
        assert np.mean(np.asarray(other) == np.asarray(alone)) < 0.01


def meshed(mesh=None):
    """A calibration of a decoder whose matrices eight devices share."""
    model = Model(DecoderConfig(vocab=32, width=128, layers=2, heads=4, hidden=256))
    data = [{"tokens": np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32)}]
    paths = ("layers/mlp/up/w", "layers/attn/o/w")
    return RunCalibration(model, initial(model, 0), paths, LanguageModel(), data, mesh=mesh)


TOLERANCES = {
    scores.Random(): 0.0, scores.Magnitude(): 0.0, scores.LowRank(8): 1e-3, scores.Gradient(): 1e-5, scores.SM3(1): 1e-5
}  # fmt: skip


@pytest.fixture(scope="module")
def on_one_device():
    one = meshed()
    return {score: score(one) for score in TOLERANCES}


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}])
def test_meshes_agree_with_one_device(shape, on_one_device):
    many = meshed(parallel.make_mesh(shape))
    for score, tolerance in TOLERANCES.items():
        expected, found = on_one_device[score], score(many)
        for path in many.paths:
            gap = float(np.max(np.abs(wide(found[path]) - wide(expected[path]))) / np.max(wide(expected[path])))
            assert gap <= tolerance, (score, path, gap)
            assert found[path].sharding.is_equivalent_to(many.params[path].sharding, 3), (score, path)


def test_given_is_checked_and_taken():
    r = np.random.default_rng(0)
    given = {p: r.normal(size=WEIGHTS[p].shape) for p in PATHS}
    found = scores.Given(given)(calibration())
    for path in PATHS:
        np.testing.assert_allclose(found[path], given[path], rtol=1e-6)
    nested = scores.Given(tree.unflatten(given))(calibration())
    np.testing.assert_array_equal(nested["one/w"], found["one/w"])


def test_difference_marks_what_training_changed(tmp_path):
    tuned = tree.flatten(tools.parameters())
    w = np.array(tuned["one/w"])
    w[2, 3] += 1e-3
    w[4, 5] -= 1e-3
    w[0, 0] += 1e-6
    tuned["one/w"] = jnp.asarray(w)
    expected = np.zeros_like(w)
    expected[2, 3] = expected[4, 5] = 1
    params = tools.parameters()
    vector = delta.TaskVector.between(params, tree.unflatten(tuned))
    vector.save(tmp_path / "tau.safetensors")
    for source in (tree.unflatten(tuned), tuned, vector, tmp_path / "tau.safetensors"):
        found = scores.Difference(source)(calibration())
        np.testing.assert_array_equal(found["one/w"], expected)
        np.testing.assert_array_equal(found["two/w"], 0)
    assert float(jnp.sum(scores.Difference(vector.select("^one"), 1e-8)(calibration())["one/w"])) == 3


def test_difference_reads_a_tuned_model(tmp_path):
    from jft.models import save

    model = DECODER
    base = initial(model)
    path = "layers/mlp/up/w"
    flat = tree.flatten(base)
    flat[path] = flat[path].at[1, 2, 3].add(0.1)
    save(model, tree.unflatten(flat), tmp_path / "tuned")
    found = scores.Difference(tmp_path / "tuned")(language(model, (path, "head/w"), params=base))
    assert float(jnp.sum(found[path])) == 1
    assert float(found[path][1, 2, 3]) == 1
    assert float(jnp.sum(found["head/w"])) == 0


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: scores.LowRank(4)(calibration()), r"one/b of shape \(16,\) holds no matrices"),
        (lambda: scores.LowRank(0)(calibration(("one/w",))), "rank is 0"),
        (lambda: scores.LowRank(2, oversample=-1)(calibration(("one/w",))), "oversample is -1"),
        (lambda: scores.SM3()(calibration()), r"one/b of shape \(16,\) holds no matrices"),
        (lambda: scores.Given({"one/w": np.ones(3)})(calibration(("one/w",))), r"score of one/w is of shape \(3,\)"),
        (lambda: scores.Given({})(calibration()), "score of one/b is missing"),
        (lambda: scores.Sum(()), "Sum of 0 scores"),
        (lambda: scores.Sum((scores.Magnitude(),), (1.0, 2.0)), "with 2 weights"),
        (lambda: scores.Product(()), "Product of no scores"),
        (lambda: scores.Movement(3)(calibration()), "which this calibration cannot"),
    ],
)
def test_refusals(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
