"""Measures of the tangent space against NumPy in float64, on a model whose functions can be written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.analysis import arithmetic
from jft.analysis.disentangle import Member, disentanglement
from jft.analysis.interpolation import Forward, scores
from jft.analysis.linearity import linearity
from jft.analysis.ntk import task_kernel
from jft.train.objectives import Classification, LanguageModel, objective

MUTATIONS = (
    ("jft/analysis/disentangle.py", "self.each.sum(axis=0)", "self.each.mean(axis=0)"),
    ("jft/analysis/disentangle.py", "self.each.sum(axis=0)", "self.each.sum(axis=1)"),
    ("jft/analysis/disentangle.py", "(self.grid >= 0)", "(self.grid > 0)"),
    ("jft/analysis/disentangle.py", "in_range)].mean()", "in_range)].max()"),
    ("jft/analysis/disentangle.py", "(one != other)", "(one == other)"),
    ("jft/analysis/disentangle.py", "np.arange(2) == t", "np.arange(2) != t"),
    ("jft/analysis/disentangle.py", 'indexing="ij"', 'indexing="xy"'),
    ("jft/analysis/disentangle.py", "values[G * G :], 1 - t)", "values[G * G :], t)"),
    ("jft/analysis/disentangle.py", "distances * weights", "distances"),
    ("jft/analysis/disentangle.py", "jnp.argmax(outputs", "jnp.argmin(outputs"),
    ("jft/analysis/linearity.py", "jnp.square(change - linear_change)", "jnp.square(change + linear_change)"),
    ("jft/analysis/linearity.py", 'total["apart"] / total["change"]', 'total["apart"] / total["straight"]'),
    ("jft/analysis/linearity.py", "(weights > 0)", "(weights >= 0)"),
    ("jft/analysis/linearity.py", "jnp.sum(weights * agree)", "jnp.sum(agree)"),
    ("jft/analysis/linearity.py", "a[None]", "-a[None]"),
    ("jft/analysis/ntk.py", "np.square(spectrum.functions", "np.abs(spectrum.functions"),
    ("jft/analysis/ntk.py", "astype(np.float64) @ g).sum(axis=1)", "astype(np.float64) @ g).max(axis=1)"),
    ("jft/analysis/ntk.py", "float(energy[tasks == task].mean())", "float(energy[tasks == task].sum())"),
    (
        "jft/analysis/ntk.py",
        "tangent.local_energy(spectrum.functions, weights[name])",
        "tangent.local_energy(spectrum.functions)",
    ),
    ("jft/analysis/ntk.py", "if select is not None:", "if False:"),
    ("jft/analysis/ntk.py", "np.exp(-np.sum", "np.exp(np.sum"),
    ("jft/analysis/ntk.py", "np.log(p)", "np.log2(p)"),
    ("jft/analysis/ntk.py", "p[p > 0] / p.sum()", "p[p > 0] / p.max()"),
    ("jft/analysis/arithmetic.py", "(nonlinear - linear)", "(linear - nonlinear)"),
    ("jft/analysis/arithmetic.py", "* classes / (classes - 1)", "* (classes - 1) / classes"),
)


def apply(params, batch):
    """Logits ``[B, 3]``, of second order in the weights."""
    return jnp.tanh(batch["x"] @ params["a"]) @ params["b"]


def by_hand(a, b, x):
    return np.tanh(x @ a) @ b


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    base = {"a": rng.normal(size=(4, 5)), "b": rng.normal(size=(5, 3))}
    moved = [{k: w + 0.7 * rng.normal(size=w.shape) for k, w in base.items()} for _ in range(2)]
    base, *moved = ({k: jnp.asarray(w, jnp.float32) for k, w in p.items()} for p in (base, *moved))
    taus = [jft.TaskVector.between(base, p) for p in moved]
    batches = [
        [
            {
                "x": rng.normal(size=(8, 4)).astype(np.float32),
                "labels": rng.integers(0, 3, 8),
                "valid": np.arange(8) < valid,
            }
            for valid in (8, 5)
        ]
        for _ in range(2)
    ]
    return base, taus, batches


def outputs(base, taus, alpha, x, forward="standard"):
    """Float64 outputs at a point, the linearized ones by central differences of the whole step."""
    a, b = (np.asarray(base[k], np.float64) for k in "ab")
    da, db = (sum(c * np.asarray(t[k].dense(), np.float64) for c, t in zip(alpha, taus, strict=True)) for k in "ab")
    if forward == "standard":
        return by_hand(a + da, b + db, x)
    h = np.tanh(x @ a)
    return h @ b + ((1 - h**2) * (x @ da)) @ b + h @ db


@pytest.mark.parametrize("forward", ["standard", "linearized"])
def test_disentanglement_is_how_often_predictions_differ(case, forward):
    base, taus, batches = case
    grid = (-1.5, 0.0, 0.5, 1.0)
    members = [Member(apply, base, data, Classification(), taus) for data in batches]
    found = disentanglement(*members, grid, Forward(forward))
    for t in range(2):
        x = np.concatenate([b["x"][b["valid"]] for b in batches[t]]).astype(np.float64)
        for i, a1 in enumerate(grid):
            for j, a2 in enumerate(grid):
                alone = [a1, 0.0] if t == 0 else [0.0, a2]
                both, own = (outputs(base, taus, alpha, x, forward).argmax(1) for alpha in ([a1, a2], alone))
                assert found.each[t, i, j] == pytest.approx(np.mean(both != own)), (t, a1, a2)
    np.testing.assert_allclose(found.xi, found.each.sum(0))
    assert found.xi[1, 1] == 0, "no vector, no error"
    assert np.all(found.each[0][:, 1] == 0), "nothing is added to the first"
    assert np.all(found.each[1][1] == 0)
    assert found.xi.max() > 0
    assert found.within() == pytest.approx(found.xi[1:, 1:].mean())


def test_disentanglement_with_another_distance(case):
    base, taus, batches = case
    members = [Member(apply, base, data, Classification(), taus) for data in batches]
    square = lambda one, other: np.square(one - other).sum(-1)
    found = disentanglement(*members, (0.0, 1.0), read=lambda y: y, distance=square)
    x = np.concatenate([b["x"][b["valid"]] for b in batches[0]]).astype(np.float64)
    both, own = (outputs(base, taus, alpha, x) for alpha in ([1.0, 1.0], [1.0, 0.0]))
    assert found.each[0, 1, 1] == pytest.approx(np.square(both - own).sum(1).mean(), rel=1e-5)


def test_vectors_of_different_weights_are_disentangled():
    """Two tasks, each with features of its own: neither vector moves what the other reads."""
    x = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)
    x[0, :, 2:], x[1, :, :2] = 0, 0
    base = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)}
    step = np.random.default_rng(2).normal(size=(2, 4, 3)).astype(np.float32)
    step[0, 2:], step[1, :2] = 0, 0
    taus = [jft.TaskVector.between(base, {"w": base["w"] + s}) for s in step]
    linear = lambda params, batch: batch["x"] @ params["w"]
    data = [[{"x": rows, "labels": np.zeros(16, int)}] for rows in x]
    members = [Member(linear, base, d, Classification(), taus) for d in data]
    assert disentanglement(*members, (-1.0, 0.0, 2.0)).xi.max() == 0
    swapped = [Member(linear, base, d, Classification(), taus) for d in data[::-1]]
    assert disentanglement(*swapped, (-1.0, 0.0, 2.0)).xi.max() > 0


def test_disentanglement_of_tokens():
    """Predictions are compared where a token is predicted, and nowhere else."""
    base = {"w": jnp.zeros((6, 6))}
    step = np.zeros((6, 6), np.float32)
    step[1, 2] = 1.0  # after token 1 comes 2
    taus = [
        jft.TaskVector.between(base, {"w": jnp.asarray(step)}),
        jft.TaskVector.between(base, {"w": -2 * jnp.asarray(step)}),
    ]
    model = lambda params, batch: params["w"][batch["tokens"]]
    batch = {"tokens": np.array([[1, 1, 3, 3]]), "loss_mask": np.array([[1, 1, 0, 1]])}
    members = [Member(model, base, [batch], LanguageModel(), taus)] * 2
    found = disentanglement(*members, (0.0, 1.0))
    assert found.each[0, 1, 1] == pytest.approx(1 / 2), "of the first and third position; the second is masked"


def test_what_has_no_predictions_is_refused(case):
    base, taus, batches = case
    members = [Member(apply, base, data, objective("contrastive"), taus) for data in batches]
    with pytest.raises(ValueError, match="Contrastive gives no prediction of each example"):
        disentanglement(*members)
    with pytest.raises(ValueError, match="Contrastive gives no prediction of each example"):
        linearity(apply, base, taus[0], batches[0], objective("contrastive"))


@pytest.mark.parametrize("forward", ["standard", "linearized"])
def test_scores_are_those_of_evaluation(case, forward):
    base, taus, batches = case
    points = np.array([[0.0, 0.0], [0.5, -1.0], [1.0, 1.0]])
    found = scores(apply, base, taus, points, batches[0], Classification(), Forward(forward))
    f_lin = jft.linearize(apply, base)
    for alpha, row in zip(points, found, strict=True):
        tau = jft.TaskVector.combine(taus, alpha)
        want = (
            jft.train.evaluate(f_lin, f_lin.direction(tau), batches[0], "classification")
            if forward == "linearized"
            else jft.train.evaluate(apply, jft.apply(base, tau), batches[0], "classification")
        )
        assert row == pytest.approx(want, rel=1e-5)
    summed = scores(apply, base, taus, [1.0], batches[0], Classification(), Forward(forward))
    assert summed[0] == pytest.approx(found[2], rel=1e-5), "one coefficient for all"


@pytest.mark.parametrize("forward", ["standard", "linearized"])
def test_scores_refuse_what_evaluation_refuses(case, forward):
    base, taus, batches = case
    unlabelled = [{**batches[0][0], "labels": np.full(8, -1)}]
    with pytest.raises(ValueError, match="label -1 is no class"):
        scores(apply, base, taus, [1.0], unlabelled, Classification(), Forward(forward))


def test_linearity(case):
    base, taus, batches = case
    rows = linearity(apply, base, taus[0], batches[0], Classification(), [0.0, 0.25, 1.0])
    x = np.concatenate([b["x"][b["valid"]] for b in batches[0]]).astype(np.float64)
    f0 = outputs(base, taus[:1], [0.0], x)
    for row in rows:
        a = row["coefficient"]
        y, linear = (outputs(base, taus[:1], [a], x, forward) for forward in ("standard", "linearized"))
        assert row["agreement"] == pytest.approx(np.mean(y.argmax(1) == linear.argmax(1)))
        if a:
            assert row["error"] == pytest.approx(np.linalg.norm(y - linear) / np.linalg.norm(y - f0), rel=1e-4)
            cosine = np.sum((y - f0) * (linear - f0)) / np.linalg.norm(y - f0) / np.linalg.norm(linear - f0)
            assert row["cosine"] == pytest.approx(cosine, rel=1e-4)
    assert rows[0]["error"] is None, "nothing has moved"
    assert rows[1]["error"] < rows[2]["error"], "a smaller step is more linear"
    both = rows[2]["standard"], rows[2]["linearized"]
    for forward, told in zip(("standard", "linearized"), both, strict=True):
        assert told == pytest.approx(
            scores(apply, base, taus[:1], [1.0], batches[0], Classification(), Forward(forward))[0]
        )


def test_kernel_of_tasks_that_share_nothing():
    """Of a linear model the kernel is ``x x'``, block by block; each vector lives on its own task."""
    rng = np.random.default_rng(0)
    x = {"one": np.zeros((5, 4), np.float32), "two": np.zeros((6, 4), np.float32)}
    x["one"][:, :2], x["two"][:, 2:] = rng.normal(size=(5, 2)), rng.normal(size=(6, 2))
    base = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    step = {"one": np.zeros((4, 3), np.float32), "two": np.zeros((4, 3), np.float32)}
    step["one"][:2], step["two"][2:] = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    f_lin = jft.linearize(lambda params, batch: batch["x"] @ params["w"], base)
    found = task_kernel(f_lin, {t: {"x": v} for t, v in x.items()}, {t: {"w": jnp.asarray(s)} for t, s in step.items()})
    every = np.concatenate(list(x.values())).astype(np.float64)
    np.testing.assert_allclose(found.spectrum.values, np.linalg.eigvalsh(every @ every.T)[::-1], atol=1e-4)
    assert found.tasks.tolist() == ["one"] * 5 + ["two"] * 6
    p = np.linalg.eigvalsh(every @ every.T)[-4:]
    assert found.effective_rank == pytest.approx(np.exp(-np.sum(p / p.sum() * np.log(p / p.sum()))), rel=1e-3)
    for tau in x:
        assert found.located[tau][tau] == pytest.approx(1, abs=1e-5)
        assert sum(found.located[tau].values()) == pytest.approx(1)
        np.testing.assert_allclose(found.weights[tau].sum(), 1)


@pytest.mark.parametrize("outputs_of", [None, lambda y, batch: y[:, :2] ** 2])
def test_kernel_of_tasks_that_overlap(outputs_of):
    """Against the Jacobian of the model by hand: every eigenfunction lies on both tasks, by how much is what is measured."""
    rng = np.random.default_rng(3)
    a, b, x = rng.normal(size=(4, 5)), rng.normal(size=(5, 3)), rng.normal(size=(7, 4))
    tau = {"a": rng.normal(size=a.shape), "b": rng.normal(size=b.shape)}
    tasks = np.array(["one"] * 2 + ["two"] * 5)
    h = np.tanh(x @ a)
    of_a = np.einsum("ni,nh,hc->ncih", x, 1 - h**2, b).reshape(7, 3, -1)
    of_b = np.einsum("nh,cd->nchd", h, np.eye(3)).reshape(7, 3, -1)
    J = np.concatenate([of_a, of_b], axis=2)
    if outputs_of is not None:
        J = 2 * (h @ b)[:, :2, None] * J[:, :2]
    g = J @ np.concatenate([tau["a"].ravel(), tau["b"].ravel()])
    values, vectors = np.linalg.eigh(np.einsum("acp,bcp->ab", J, J) / J.shape[1])
    parts = np.array([sum((phi @ g[:, c]) ** 2 for c in range(g.shape[1])) for phi in vectors.T])
    energy = sum(c * phi**2 for c, phi in zip(parts, vectors.T, strict=True))
    mean = {task: energy[tasks == task].mean() for task in ("one", "two")}
    p = values / values.sum()
    with jax.enable_x64(True):
        f_lin = jft.linearize(apply, {"a": jnp.asarray(a), "b": jnp.asarray(b)})
        batches = {task: {"x": x[tasks == task]} for task in ("one", "two")}
        found = task_kernel(f_lin, batches, {"tau": {k: jnp.asarray(v) for k, v in tau.items()}}, select=outputs_of)
    np.testing.assert_allclose(found.spectrum.values, values[::-1], rtol=1e-9)
    np.testing.assert_allclose(found.weights["tau"], parts[::-1] / parts.sum(), rtol=1e-7)
    share = mean["one"] / (mean["one"] + mean["two"])
    assert 0.1 < share < 0.9
    assert found.located["tau"] == pytest.approx({"one": share, "two": 1 - share}, rel=1e-7)
    assert found.effective_rank == pytest.approx(np.prod(p**-p), rel=1e-7)


def test_kernels_of_unlike_data_are_refused():
    f_lin = jft.linearize(lambda params, batch: batch["x"] @ params["w"], {"w": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"the tasks' x have different shapes"):
        task_kernel(f_lin, {"a": {"x": np.ones((2, 4))}, "b": {"x": np.ones((2, 3))}}, {})
    with pytest.raises(ValueError, match="of='all'"):
        task_kernel(f_lin, {"a": {"x": np.ones((2, 4))}}, {}, of="all")


def test_nonlinear_advantage():
    assert arithmetic.nonlinear_advantage(linear=0.1, nonlinear=1.0, classes=10) == pytest.approx(1)
    assert arithmetic.nonlinear_advantage(0.9, 0.8, 2) == pytest.approx(-0.2)


def test_forward_passes_have_names():
    with pytest.raises(ValueError, match="forward 'linear' is unknown"):
        Forward("linear")
    with pytest.raises(ValueError, match="until='features' is of linearized"):
        Forward("standard", "features")
