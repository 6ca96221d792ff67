"""Rules around other rules (KnOTS, core space, SVC) and ESM: against references in float64 and against FusionBench.

References take matrices as papers write them, [out, in]; jft's are [in, out].
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import Dense, LowRank, TaskVector
from jft.merge import cart, core_space, esm, iso_c, knots, svc, task_arithmetic, ties, tsv_m
from tests.merge import peers

MUTATIONS = [
    ("jft/merge/subspace.py", "results[path].scaled(scale)", "results[path].scaled(1.0)"),
    ("jft/merge/subspace.py", "merged = rule(inside, weights,", "merged = rule(inside, None,"),
    ("jft/merge/knots.py", "(s, jnp.ones_like(s)) if scaled", "(s, s) if scaled"),
    ("jft/merge/knots.py", "(jnp.ones_like(s), s)", "(jnp.ones_like(s), jnp.ones_like(s))"),
    ("jft/merge/knots.py", "max(1, int(jnp.max(jnp.sum(s > 0, axis=-1))))", "s.shape[-1]"),
    ("jft/merge/core_space.py", "LowRank(p, product(core, qt))", "LowRank(p, product(transposed(core), qt))"),
    ("jft/merge/core_space.py", "if len(factors) < len(deltas)", "if len(factors) < 1"),
    ("jft/merge/calibration.py", "jnp.maximum(projections", "jnp.minimum(projections"),
    ("jft/merge/calibration.py", "s * jnp.sum(responses * vt", "jnp.sum(responses * vt"),
    ("jft/merge/calibration.py", "squares > TOLERANCE**2 *", "squares > 0 *"),
    ("jft/merge/calibration.py", "svd(merged)", "svd(deltas[1])"),
    ("jft/merge/essential_subspace.py", "norms = jnp.linalg.norm(deltas", "norms = jnp.linalg.norm(shifts"),
    ("jft/merge/essential_subspace.py", "s[:, :kept] ** 2, _mean", "s[:, :kept], _mean"),
    ("jft/merge/essential_subspace.py", "v = v * _ratio(rows", "v = v / _ratio(rows"),
    (
        "jft/merge/essential_subspace.py",
        "jnp.mean(norms, axis=0, keepdims=True)",
        "jnp.max(norms, axis=0, keepdims=True)",
    ),
]
SHAPES = {"a": (24, 15), "layers/w": (2, 15, 24)}
WEIGHTS = [1.0, 0.5, -2.0]


def low_rank(count=3, rank=2, seed=0, shapes=SHAPES, bias=True):
    """Task vectors with low-rank deltas and one dense vector."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)
    taus = []
    for _ in range(count):
        deltas = {p: LowRank(draw(*s[:-1], rank), draw(*s[:-2], rank, s[-1])) for p, s in shapes.items()}
        taus.append(TaskVector(deltas | ({"b": Dense(draw(5))} if bias else {})))
    return taus


def as_dense(tau):
    return TaskVector({path: Dense(delta.dense()) for path, delta in tau.items()}, tau.manifest)


def dense(tau, path):
    return np.asarray(tau[path].dense(), np.float64)


def assert_close(a, b, tolerance=1e-5):
    assert list(a) == list(b)
    for path in a:
        x, y = dense(a, path), dense(b, path)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), path


def shared_basis(deltas):
    """U, s and V_i of KnOTS, equation 3, with the null directions cut."""
    u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    kept = s > 1e-5
    return u[:, kept], s[kept], np.split(vt[kept], len(deltas), axis=1)


def ties_of(x, density):
    """TIES of the paper on flat vectors."""
    kth = [np.sort(np.abs(d).ravel())[d.size - int(density * d.size) - 1] for d in x]
    trimmed = [np.where(np.abs(d) >= k, d, 0) for d, k in zip(x, kth, strict=True)]
    sign = np.sign(sum(trimmed))
    agree = [(np.sign(t) == sign) & (t != 0) for t in trimmed]
    return sum(t * a for t, a in zip(trimmed, agree, strict=True)) / np.maximum(sum(a.astype(int) for a in agree), 1)


@pytest.mark.parametrize("scaled", [False, True])
def test_knots_ties(scaled):
    taus = low_rank(shapes={"a": (24, 15)}, bias=False)
    u, s, vs = shared_basis([dense(tau, "a").T for tau in taus])
    factor = s[:, None] if scaled else 1.0
    merged = ties_of([factor * v for v in vs], 0.3)
    expected = (u @ (merged if scaled else s[:, None] * merged)).T
    for given in (taus, [as_dense(tau) for tau in taus]):
        result = knots(given, density=0.3, scaled=scaled)
        assert isinstance(result["a"], LowRank) and result["a"].rank == 6
        np.testing.assert_allclose(dense(result, "a"), expected, atol=1e-5)


def test_linear_rules_are_what_they_are_without():
    taus = low_rank()
    plain = task_arithmetic(taus, WEIGHTS, scale=0.5)
    for around in (knots, functools.partial(knots, side="inputs"), core_space):
        for given in (taus, [as_dense(tau) for tau in taus]):
            assert_close(around(given, WEIGHTS, rule=task_arithmetic, scale=0.5), plain)


def test_knots_sides_are_transposes():
    taus = low_rank(shapes={"a": (24, 15)}, bias=False)
    turned = [TaskVector({"a": tau["a"].transposed()}) for tau in taus]
    merged = knots(turned, density=0.3, side="inputs")["a"].transposed()
    np.testing.assert_allclose(merged.dense(), dense(knots(taus, density=0.3), "a"), atol=1e-5)


def test_core_space():
    """A rule in the core is the rule on ``P^T delta Q``, both written out."""
    taus = low_rank()
    merged = core_space(taus, rule=iso_c)
    a = np.concatenate([np.asarray(tau["a"].a, np.float64) for tau in taus], axis=1)
    b = np.concatenate([np.asarray(tau["a"].b, np.float64) for tau in taus], axis=0)
    p, q = np.linalg.svd(a, full_matrices=False)[0], np.linalg.svd(b, full_matrices=False)[2].T
    u, s, vt = np.linalg.svd(sum(p.T @ dense(tau, "a") @ q for tau in taus))
    np.testing.assert_allclose(dense(merged, "a"), p @ (s.mean() * u @ vt) @ q.T, atol=1e-5)
    assert isinstance(merged["a"], LowRank) and merged["a"].rank == 6
    assert isinstance(merged["layers/w"], LowRank)


def test_core_space_of_rules_that_turn():
    """TSV-M and task arithmetic do not see the basis; Iso-C does, by the number of its singular values."""
    taus = low_rank()
    for rule in (tsv_m, functools.partial(cart, rank_ratio=1.0)):
        assert_close(core_space(taus, WEIGHTS, rule=rule), rule(taus, WEIGHTS), 2e-5)
    np.testing.assert_allclose(dense(core_space(taus, rule=iso_c), "a"), 15 / 6 * dense(iso_c(taus), "a"), atol=1e-4)


def test_manifests_name_the_rule_inside():
    taus = low_rank(shapes={"a": (24, 15)})
    for around, inner in ((knots, ties), (core_space, tsv_m), (svc, ties)):
        options = {} if inner is tsv_m else {"density": 0.3}
        manifest = around(taus, rule=inner, **options).manifest
        parent = manifest["parents"][0]["manifest"]
        assert (manifest["rule"], parent["rule"]) == (around.__name__, inner.__name__)
        assert parent.get("density") == options.get("density")


def test_mixed_encodings_and_missing_paths():
    """A path that is dense in one vector is merged whole; one that a vector lacks is a zero."""
    first, second = low_rank(2)
    mixed = [first, TaskVector({"a": Dense(second["a"].dense()), "b": second["b"]})]
    assert_close(core_space(mixed, rule=tsv_m), tsv_m(mixed))
    assert isinstance(core_space(mixed, rule=tsv_m)["layers/w"], LowRank)
    assert_close(knots(mixed, rule=task_arithmetic), task_arithmetic(mixed))
    zero = [0.0 * first, 0.0 * second]
    for around in (knots, core_space):
        assert not np.any(dense(around(zero), "a"))


def calibrated(merged, deltas, alpha):
    """Algorithm 1 of SVC, one direction after the other."""
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    for r in range(len(s)):
        shares = []
        for delta in deltas:
            response = u[:, r] @ delta
            shares.append(max(alpha, (u[:, r] @ merged) @ response / (response @ response)))
        s[r] *= len(deltas) / sum(shares)
    return (u * s) @ vt


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_svc(alpha):
    taus = [as_dense(tau) for tau in low_rank(rank=15)]
    for rule, weights in ((task_arithmetic, [1.0, 1.0, 1.0]), (functools.partial(ties, density=0.5), WEIGHTS)):
        merged = rule(taus, weights)
        result = svc(taus, weights, rule=rule, alpha=alpha, scale=0.5)
        for matrix in (lambda t: dense(t, "a"), lambda t: dense(t, "layers/w")[1]):
            expected = 0.5 * calibrated(matrix(merged).T, [matrix(tau).T for tau in taus], alpha).T
            np.testing.assert_allclose(matrix(result), expected, atol=2e-5 * np.abs(expected).max())
        np.testing.assert_allclose(dense(result, "b"), 0.5 * dense(merged, "b"), rtol=1e-6)


def test_svc_counts_once():
    """The same model twice, added: half of the sum. A model alone: itself. No change: none, and no NaN."""
    tau = low_rank(1, bias=False)[0]
    assert_close(svc([tau, tau]), as_dense(tau))
    assert_close(svc([tau]), as_dense(tau))
    assert not np.any(dense(svc([0.0 * tau, 0.0 * tau]), "a"))
    assert np.isfinite(dense(svc([tau, 0.0 * tau]), "a")).all()
    turned = TaskVector({"a": tau["a"].transposed()})
    other = low_rank(1, seed=1, bias=False)[0]
    result = dense(svc([turned, TaskVector({"a": other["a"].transposed()})], side="inputs"), "a").T
    np.testing.assert_allclose(result, dense(svc([tau, other]), "a"), atol=1e-5)
    with pytest.raises(ValueError, match="alpha"):
        svc([tau], alpha=0.0)


def test_svc_of_orthogonal_models():
    """Models of different inputs and outputs are counted once as they are, whatever rounding leaves of the others."""
    rng = np.random.default_rng(4)
    inputs, outputs = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (24, 15))
    parts = [inputs[:, [i, i + 1]] * [3 + i, 2.5 + i] @ outputs[[i, i + 1]] for i in (0, 2, 4)]
    taus = [TaskVector({"a": Dense(jnp.asarray(x, jnp.float32))}) for x in parts]
    np.testing.assert_allclose(dense(svc(taus), "a"), sum(parts), atol=1e-5)


def esm_released(deltas, inputs, power=2, gain=2):
    """What kiddo127/ESM computes for one weight, from the inputs of the layer in each model."""
    u, v, norms = [], [], []
    kept = len(deltas[0]) // len(deltas)
    for delta, x in zip(deltas, inputs, strict=True):
        _, s, vt = np.linalg.svd(x @ delta.T, full_matrices=False)
        growth = (s[:kept] ** 2 / np.mean(s[:kept] ** 2)) ** 0.15
        growth /= growth.mean()
        norms.append(np.linalg.norm(delta))
        u.append(vt[:kept].T * growth)
        v.append(vt[:kept] @ delta * norms[-1] ** power * growth[:, None])
    u, v = np.concatenate(u, axis=1), np.concatenate(v) / np.mean(norms) ** power
    columns = np.linalg.norm(v, axis=0)
    v = v * (columns / columns.mean()) ** power
    (a, s, b), (c, t, d) = (np.linalg.svd(x, full_matrices=False) for x in (u, v))
    return gain * s.mean() * t.mean() * a @ b @ c @ d


def test_esm():
    rng = np.random.default_rng(3)
    taus = [as_dense(tau) for tau in low_rank(rank=15)]
    taus = [
        TaskVector({**tau.deltas, "other": Dense(jnp.asarray(rng.normal(size=(7, 5)), jnp.float32))}) for tau in taus
    ]
    inputs = [{"a": rng.normal(size=(40, 24)), "layers/w": rng.normal(size=(2, 40, 15))} for _ in taus]
    moments = [{p: np.swapaxes(x, -1, -2) @ x for p, x in of.items()} for of in inputs]
    merged = esm(taus, moments=moments, scale=0.5)
    expected = esm_released([dense(tau, "a").T for tau in taus], [x["a"] for x in inputs]).T
    assert np.linalg.norm(dense(merged, "a") - 0.5 * expected) < 1e-4 * np.linalg.norm(expected)
    plain = dense(esm(taus, moments=moments, power=0, gain=1, layer_power=0), "layers/w")[1]
    roberta = [dense(tau, "layers/w")[1].T for tau in taus], [x["layers/w"][1] for x in inputs]
    np.testing.assert_allclose(plain, esm_released(*roberta, power=0, gain=1).T, atol=1e-5)
    layers = [
        esm_released([dense(tau, "layers/w")[i].T for tau in taus], [x["layers/w"][i] for x in inputs]).T
        for i in (0, 1)
    ]
    norms = np.array([np.linalg.norm(layer) for layer in layers])
    stacked = np.stack([0.5 * x * (n / norms.mean()) ** 2 for x, n in zip(layers, norms, strict=True)])
    assert np.linalg.norm(dense(merged, "layers/w") - stacked) < 1e-4 * np.linalg.norm(stacked)
    np.testing.assert_allclose(dense(merged, "other"), 0.5 * dense(tsv_m(taus), "other"), atol=1e-6)
    np.testing.assert_allclose(dense(merged, "b"), 0.5 * dense(tsv_m(taus), "b"), atol=1e-6)
    named = {"x": taus[0], "y": taus[1], "z": taus[2]}
    again = esm(named, moments=dict(zip("zyx", moments[::-1], strict=True)), scale=0.5)
    np.testing.assert_array_equal(dense(again, "a"), dense(merged, "a"))
    still = esm([0.0 * tau for tau in taus], moments=moments)
    assert all(not np.any(dense(still, path)) for path in still)


@pytest.mark.parametrize(
    "moments",
    [
        [{}],
        [{"a": np.eye(24)}, {}, {"a": np.eye(24)}],
        [{"a": np.eye(15)}] * 3,
        [{"b": np.eye(5)}] * 3,
        {"x": {}},
    ],
)
def test_esm_wrong_moments(moments):
    with pytest.raises(ValueError, match="moment"):
        esm(low_rank(), moments=moments)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["", "_accelerated"])
def test_svc_of_fusionbench(name):
    import torch

    utils = peers.fusionbench("method.singular_value_calibration.utils")
    calibrate = getattr(utils, f"subspace_consistency_spectral_calibration{name}")
    taus = [as_dense(tau) for tau in low_rank(rank=15, shapes={"a": (24, 15)}, bias=False)]
    x = [torch.tensor(dense(tau, "a").T.copy(), dtype=torch.float32) for tau in taus]
    for alpha in (0.3, 1.0):
        expected = calibrate(torch.zeros(15, 24), x, 0.6 * sum(x), alpha).numpy().T
        result = dense(svc(taus, rule=functools.partial(task_arithmetic, scale=0.6), alpha=alpha), "a")
        assert np.linalg.norm(result - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.peers
def test_knots_of_fusionbench():
    import torch

    align = peers.fusionbench("method.knots.knots_utils").subspace_alignment
    taus = low_rank(shapes={"a": (24, 15)}, bias=False)
    u, s, vs = align([torch.tensor(dense(tau, "a").T.copy(), dtype=torch.float32) for tau in taus])
    expected = u.numpy() @ (s.numpy()[:, None] * ties_of([v.numpy() for v in vs], 0.3))
    result = dense(knots(taus, density=0.3), "a").T
    assert np.linalg.norm(result - expected) < 1e-5 * np.linalg.norm(expected)
