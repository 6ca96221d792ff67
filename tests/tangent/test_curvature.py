"""Curvature as Kronecker factors, against dense Jacobians and explicit Kronecker products in float64 NumPy."""

import jax
import numpy as np
import pytest

from jft.select.grams import jacobian_factors
from jft.tangent.curvature import Curvature, merged
from jft.train.calibration import RunCalibration
from tests.tangent.curved import MATRICES, MODEL, PARAMS, Nothing, curvature, dense, explicit, taus, wide

MUTATIONS = (
    ("jft/tangent/curvature.py", "_weighted([1.0] * len(curvatures), ", "_weighted(shares, "),
    ("jft/tangent/curvature.py", "shares = [c.examples / examples", "shares = [1 / len(curvatures)"),
    (
        "jft/tangent/curvature.py",
        "D = jnp.concatenate([w, b[..., None, :]]",
        "D = jnp.concatenate([w, 0 * b[..., None, :]]",
    ),
    ("jft/select/grams.py", "jnp.concatenate([x, jnp.ones_like(x[..., :1])]", "jnp.concatenate([x, 0 * x[..., :1]]"),
    ("jft/select/grams.py", "outputs / max(examples, 1.0)", "outputs"),
    ("jft/select/grams.py", '_mean(outputs, count) if tokens == "mean"', 'outputs / examples if tokens == "mean"'),
    ("jft/select/grams.py", "outputs.shape) / math.sqrt(self.draws)", "outputs.shape)"),
)


@pytest.fixture(scope="module")
def exact():
    return curvature()


def test_one_linear_layer_is_exact(exact):
    """The head is linear in its weights, with the same Jacobian for all inputs: K-FAC is no approximation."""
    D = taus()["head/w"]
    J = dense(0)["head/w"]
    expected = (np.einsum("ncio,io->nc", J, wide(D)) ** 2).sum(1).mean()
    np.testing.assert_allclose(exact({"head/w": D}), expected, rtol=1e-5)


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
