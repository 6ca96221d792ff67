"""Curvature as Kronecker factors, TAK's penalty and tau-Jp's, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.delta.manifest import BaseMismatch
from jft.methods import InPlace, Method, Select
from jft.presets.tak import Drift
from jft.presets.tau_jp import JacobianProduct
from jft.select.grams import jacobian_factors
from jft.tangent.curvature import Curvature, merged
from jft.train.calibration import RunCalibration
from jft.train.objectives import Classification
from tests.methods import toy

MUTATIONS = (
    ("jft/tangent/curvature.py", '"...ij,...jo->...io"', '"...ji,...io->...jo"'),
    ("jft/tangent/curvature.py", "shares = [c.examples / examples", "shares = [1 / len(curvatures)"),
    (
        "jft/tangent/curvature.py",
        "D = jnp.concatenate([w, b[..., None, :]]",
        "D = jnp.concatenate([w, 0 * b[..., None, :]]",
    ),
    (
        "jft/select/grams.py",
        "jnp.concatenate([x, jnp.ones_like(x[..., :1])]",
        "jnp.concatenate([x, jnp.zeros_like(x[..., :1])]",
    ),
    ("jft/select/grams.py", "outputs / max(examples, 1.0)", "outputs"),
    ("jft/select/grams.py", '_mean(outputs, count) if tokens == "mean"', 'outputs / examples if tokens == "mean"'),
    ("jft/select/grams.py", "outputs.shape) / math.sqrt(self.draws)", "outputs.shape)"),
    ("jft/presets/tak.py", "c.examples / total * c(changes)", "c(changes)"),
    ("jft/presets/tak.py", "curvature.verify(params)", "pass"),
    ("jft/presets/tau_jp.py", "self.weight / max(len(self.tasks), 1)", "self.weight"),
    ("jft/presets/tau_jp.py", 'squares if self.form == "squared"', 'squares if self.form == "norm"'),
)
MODEL = toy.model(layers=2)
PARAMS = MODEL.init(jax.random.key(0))
MATRICES = ("layers/up/w", "layers/down/w", "head/w")


class Nothing:
    """An objective that nothing looks at."""

    splits = True

    def weight(self, batch, xp=jnp):
        return xp.float32(1)


def wide(x):
    return np.asarray(x, np.float64)


def data(seed, rows=4):
    return [{"x": np.random.default_rng([seed, i]).normal(size=(rows, 8)).astype(np.float32)} for i in range(2)]


def curvature(seed=0, draws=0, rows=4):
    calibration = RunCalibration(MODEL, PARAMS, MATRICES, Nothing(), data(seed, rows))
    return Curvature.of(jacobian_factors(calibration, 2, draws), PARAMS)


def taus(seed=1):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=x.shape).astype(np.float32) / 4 for p, x in tree.flatten(PARAMS).items()}


def dense(seed):
    """``{path: J [N, C, parameters of the path]}``, by reverse mode, examples of both batches."""
    x = np.concatenate([b["x"] for b in data(seed)])
    J = jax.jacrev(lambda p: MODEL.apply(p, {"x": x}))(PARAMS)
    return {p: wide(j) for p, j in tree.flatten(J).items()}


@pytest.fixture(scope="module")
def exact():
    return curvature()


def test_one_linear_layer_is_exact(exact):
    """The head is linear in its weights, with the same Jacobian for all inputs: K-FAC is no approximation."""
    D = taus()["head/w"]
    J = dense(0)["head/w"]
    expected = (np.einsum("ncio,io->nc", J, wide(D)) ** 2).sum(1).mean()
    np.testing.assert_allclose(exact({"head/w": D}), expected, rtol=1e-5)


def explicit(curvature, tau):
    total = 0.0
    for path, factor in curvature.factors.items():
        A, B, w = (wide(x) for x in (factor["inputs"], factor["outputs"], tau[path]))
        b = wide(tau.get(path[:-1] + "b", np.zeros((*w.shape[:-2], w.shape[-1]))))
        I, O = w.shape[-2:]  # noqa: E741
        stacks = A.reshape(-1, I + 1, I + 1), B.reshape(-1, O, O), w.reshape(-1, I, O), b.reshape(-1, 1, O)
        for one_A, one_B, one_w, one_b in zip(*stacks, strict=True):
            d = np.concatenate([one_w, one_b]).ravel()
            total += d @ np.kron(one_A, one_B) @ d
    return total


def test_factors_of_stacked_layers_are_second_moments(exact):
    """B from the dense Jacobian of the biases, whose gradients are those of the outputs; A's last row is the mean input."""
    J = dense(0)["layers/up/b"]
    expected = np.einsum("nclo,nclp->lop", J, J) / len(J)
    np.testing.assert_allclose(exact.factors["layers/up/w"]["outputs"], expected, rtol=2e-4, atol=1e-5)
    A = wide(exact.factors["layers/up/w"]["inputs"])
    np.testing.assert_allclose(A[:, -1, -1], 1, rtol=1e-6)
    # The Jacobian in w is x (outer) g: its trace is the mean of |x|^2 |g|^2, and summed over g's that of x alone.
    w = dense(0)["layers/up/w"]
    x = np.einsum("nclio,nclo->nli", w, J) / np.einsum("nclo,nclo->nl", J, J)[..., None]
    np.testing.assert_allclose(A[:, :-1, :-1], np.einsum("nli,nlj->lij", x, x) / len(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(A[:, -1, :-1], x.mean(0), rtol=1e-3, atol=1e-4)


def test_quadratic_form_is_the_kronecker_product(exact):
    tau = taus()
    np.testing.assert_allclose(exact(tau), explicit(exact, tau), rtol=1e-5)


def test_draws_agree_on_average(exact):
    drawn = curvature(draws=2000)
    for path in MATRICES:
        a, b = (wide(c.factors[path]["outputs"]) for c in (drawn, exact))
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)
    with pytest.raises(ValueError, match="draws is -1"):
        curvature(draws=-1)


def test_tokens_add_up_or_have_a_mean():
    """Three tokens in each example: the sum is three times the mean."""
    batches = [{"x": np.random.default_rng(i).normal(size=(2, 3, 8)).astype(np.float32)} for i in range(2)]
    calibration = RunCalibration(MODEL, PARAMS, ("head/w",), Nothing(), batches)
    (mean, examples), (total, _) = (jacobian_factors(calibration, 2, 0, tokens=t)[:2] for t in ("mean", "sum"))
    assert examples == 4
    np.testing.assert_allclose(total["head/w"]["outputs"], np.eye(5) * 3, atol=1e-6)
    np.testing.assert_allclose(mean["head/w"]["outputs"], np.eye(5), atol=1e-6)
    with pytest.raises(ValueError, match="tokens is 'all'"):
        jacobian_factors(calibration, 1, tokens="all")


def test_runs_take_both_from_files(exact, tmp_path):
    """Two steps of each differ from those without a penalty; of another base the curvature is refused."""
    exact.save(tmp_path / "c.safetensors")
    np.savez(tmp_path / "d.npz", x=np.stack([b["x"] for b in data(5)]))
    methods = (
        jft.method("tak", curvature=str(tmp_path / "c.safetensors"), weight=0.5),
        jft.method("tau_jp", data=str(tmp_path / "d.npz"), weight=0.5, form="norm"),
        jft.method("linearized"),
    )
    batches = [{**b, "labels": np.array([0, 1, 2, 3], np.int32)} for b in data(0)]
    ends = []
    for method in methods:
        run = jft.finetune(
            MODEL,
            PARAMS,
            batches,
            steps=2,
            method=method,
            objective=Classification(),
            optimizer={"lr": 1e-2},
            log={"progress": False},
        )
        ends.append(run.params)
    for other in ends[:2]:
        same = jax.tree.map(np.array_equal, other, ends[2])
        assert not all(jax.tree.leaves(same))
    assert all(np.all(np.isfinite(x)) for e in ends for x in jax.tree.leaves(e))
    with pytest.raises(BaseMismatch):
        jft.finetune(
            MODEL,
            jax.tree.map(lambda x: x + 1, PARAMS),
            batches,
            steps=1,
            method=methods[0],
            objective=Classification(),
        )


def test_merged_and_file(exact, tmp_path):
    other = curvature(5, rows=2)
    both = merged([exact, other])
    for path in MATRICES:
        a, b = (c.factors[path] for c in (exact, other))
        np.testing.assert_allclose(
            both.factors[path]["inputs"], (8 * wide(a["inputs"]) + 4 * wide(b["inputs"])) / 12, rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            both.factors[path]["outputs"], wide(a["outputs"]) + wide(b["outputs"]), rtol=1e-4, atol=1e-6
        )
    assert both.examples == 12
    both.save(tmp_path / "c.safetensors")
    again = Curvature.load(tmp_path / "c.safetensors")
    assert (again.examples, again.base) == (12, both.base)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(again.factors), dict(sorted(both.factors.items()))))
    with pytest.raises(ValueError, match="no curvature to merge"):
        merged([])


def planned(*penalties):
    plan = Method(Select(), InPlace(), penalties=penalties, forward="linearized").plan(PARAMS, MODEL)
    kept, trained = plan.init(jax.random.key(0), PARAMS)
    return plan, kept, {p: jnp.asarray(taus()[p]) for p in trained}


def test_penalty_value_and_gradient(exact, tmp_path):
    other = curvature(5, rows=2)
    plan, kept, tau = planned(Drift(3.0, (exact, other), merge=False))
    expected = lambda t: 3 * (8 * explicit(exact, t) + 4 * explicit(other, t)) / 12
    value, gradient = jax.value_and_grad(lambda t: plan.penalty(kept, t))(tau)
    np.testing.assert_allclose(value, expected(tau), rtol=1e-5)
    for path in ("layers/up/w", "layers/up/b", "head/w"):
        step = np.random.default_rng(3).normal(size=tau[path].shape)
        moved = [{**tau, path: wide(tau[path]) + s * step} for s in (0.5, -0.5)]
        np.testing.assert_allclose(
            (wide(gradient[path]) * step).sum(), expected(moved[0]) - expected(moved[1]), rtol=1e-3
        )
    plan, kept, tau = planned(Drift(3.0, (exact, other)))
    np.testing.assert_allclose(plan.penalty(kept, tau), 3 * explicit(merged([exact, other]), tau), rtol=1e-5)
    with pytest.raises(BaseMismatch):
        Drift(1.0, (exact,)).fitted(jax.tree.map(lambda x: x + 1, PARAMS), MODEL)


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_jacobian_product(form):
    stacks = tuple({"x": data(s)[0]["x"][None]} for s in (0, 5))
    plan, kept, tau = planned(JacobianProduct(2.0, stacks, form))
    parts = []
    for s in (0, 5):
        J = {p: j[:4] for p, j in dense(s).items()}
        moved = sum(np.einsum("nck,k->nc", j.reshape(*j.shape[:2], -1), wide(tau[p]).ravel()) for p, j in J.items())
        squares = (moved**2).sum(1)
        parts.append((squares if form == "squared" else np.sqrt(squares)).mean())
    run = jax.value_and_grad(lambda t: plan.penalty(kept, t, jax.random.key(1)))
    value, gradient = run(tau)
    np.testing.assert_allclose(value, 2 * np.mean(parts), rtol=1e-4)
    # Homogeneous of degree 2 or 1: Euler's identity.
    along = sum((wide(gradient[p]) * wide(tau[p])).sum() for p in tau)
    np.testing.assert_allclose(along, (2 if form == "squared" else 1) * value, rtol=1e-4)
    still = run(jax.tree.map(jnp.zeros_like, tau))[1]
    assert not any(np.any(x) for x in jax.tree.leaves(still))
