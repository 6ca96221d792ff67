"""Ridge regression in tau and least squares over coefficients, against NumPy on a dense float64 Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import delta, tangent, tree
from tests.tangent import dense, models
from tests.tangent.dense import close, pick

RNG = np.random.default_rng(0)
WEIGHTS = np.array([1.0, 0.5])

MUTATIONS = (
    ("jft/tangent/regression.py", "matrix + penalty * np.eye(size)", "matrix - penalty * np.eye(size)"),
    ("jft/tangent/regression.py", "s = np.sqrt(weights)[:, None]", "s = weights[:, None]"),
    ("jft/tangent/regression.py", "(s * b).reshape", "b.reshape"),
    (
        "jft/tangent/regression.py",
        "np.asarray(base, np.float64) + np.tensordot",
        "np.asarray(base, np.float64) - np.tensordot",
    ),
    ("jft/tangent/regression.py", "residual = (y - values)", "residual = (values - y)"),
    ("jft/tangent/regression.py", "snc,n,tnc->st", "snc,m,tnc->st"),
    ("jft/tangent/regression.py", "tnc,n,nc->t", "tnc,m,nc->t"),
    ("jft/tangent/regression.py", "- 2 * alpha @ self.moment", "- alpha @ self.moment"),
    ("jft/tangent/regression.py", "return total / self.weight", "return total"),
    ("jft/tangent/regression.py", "self.gram + penalty * np.eye", "self.gram - penalty * np.eye"),
    ("jft/tangent/regression.py", "penalty * len(self.moment) or 1.0", "penalty or 1.0"),
    ("jft/tangent/regression.py", "(y - spaces.to_float32(f0)) * w", "(y - spaces.to_float32(f0))"),
    ("jft/tangent/regression.py", "a + jnp.asarray(penalty, b.dtype) * b", "a - jnp.asarray(penalty, b.dtype) * b"),
    ("jft/tangent/regression.py", "self.weights[index] * real", "self.weights[index]"),
)


def problem(name, dtype="float64"):
    """``(f_lin, [(batch of one, y, w)], J [N C, P], residual [N C], weights [N C])``."""
    model, params, batch = models.model(name, jnp.dtype(dtype))
    f0, _ = dense.reference(name)
    J = dense.flat(name)
    y = f0 + np.random.default_rng(1).standard_normal(f0.shape)
    one = lambda x, i: x[i : i + 1]
    data = [({k: one(x, i) for k, x in batch.items()}, one(y, i).astype(dtype), one(WEIGHTS, i)) for i in range(2)]
    size = y.size
    return (
        jft.linearize(model.apply, params),
        data,
        J.reshape(size, -1),
        (y - f0).reshape(size),
        np.repeat(WEIGHTS, f0.shape[1]),
    )


def vector(tau, J):
    """A task vector in the order of the reference's Jacobian."""
    return np.concatenate([np.asarray(tau[p].dense(), np.float64).ravel() for p in J])


@pytest.mark.parametrize("name", ["decoder", "encoder", "vision", "clip"])
def test_dual_and_conjugate_gradients_are_the_closed_form(name):
    penalty = 0.3
    with jax.enable_x64(True):
        f_lin, data, J, r, w = problem(name)
        expected = np.linalg.solve(J.T @ (w[:, None] * J) + penalty * np.eye(J.shape[1]), J.T @ (w * r))
        paths = dense.reference(name)[1]
        for how in ("dual", "cg"):
            tau = tangent.ridge(f_lin, data, penalty, how=how, select=pick, tolerance=1e-13)
            assert tau.manifest["solver"] == how and tau.manifest["penalty"] == penalty
            close(vector(tau, paths), expected, "float64")


def test_ridge_in_float32():
    f_lin, data, J, r, w = problem("vision", "float32")
    expected = np.linalg.solve(J.T @ (w[:, None] * J) + 0.5 * np.eye(J.shape[1]), J.T @ (w * r))
    for how in ("dual", "cg"):
        tau = tangent.ridge(f_lin, data, 0.5, how=how, select=pick)
        assert all(x.dtype == jnp.float32 for _, x in tau.items())
        close(vector(tau, dense.reference("vision")[1]), expected, "float32")
    # The task vector is one like any other.
    moved = delta.apply(f_lin.params, tau)
    np.testing.assert_allclose(tree.flatten(moved)["cls"], f_lin.params["cls"] + tau["cls"].value, rtol=1e-6)


def test_ridge_in_selected_parts_changes_nothing_else():
    """Entries, and b of a low-rank change; in blocks of unequal size, the last filled up."""
    with jax.enable_x64(True):
        f_lin, _, _, _, _ = problem("vision")
        q, o = "layers/attn/q/w", "layers/attn/o/w"
        flat = tree.flatten(f_lin.params)
        mask = RNG.random(flat[q].shape) < 0.3
        at = np.argwhere(mask.reshape(-1, mask.shape[-1])).astype(np.int32)
        a = RNG.standard_normal((*flat[o].shape[:-1], 2))
        space = delta.TaskVector(
            {
                q: delta.Entries(*at.T, np.ones(len(at)), mask.shape),
                o: delta.LowRank(a, np.zeros((a.shape[0], 2, flat[o].shape[-1]))),
            }
        )
        images = RNG.standard_normal((5, 8, 8, 1))
        y = RNG.standard_normal((5, 3))
        data = [({"images": images[s]}, y[s]) for s in (slice(0, 2), slice(2, 4), slice(4, 5))]
        dual, cg = (
            tangent.ridge(f_lin, data, 0.1, moving=space, how=how, tolerance=1e-13, memory=10**5)
            for how in ("dual", "cg")
        )
        assert dual.paths == [q, o] and isinstance(dual[q], delta.Entries) and isinstance(dual[o], delta.LowRank)
        assert dual[q].nnz == mask.sum() and not np.asarray(dual[q].dense())[~mask].any()
        for path in (q, o):
            close(np.asarray(cg[path].dense()), np.asarray(dual[path].dense()), "float64")
        # The predictor with the kernel is the model at tau.
        K = tangent.kernel(f_lin, {"images": images}, moving=space)
        function = jax.jit(f_lin.function)
        f0 = np.asarray(function(f_lin.params, {"images": images}))
        coefficients = tangent.kernel_regression(K, y - f0, 0.1)
        new = {"images": images[::2] + 0.1}
        cross = tangent.kernel(f_lin, new, {"images": images}, moving=space)
        base = function(f_lin.params, new)
        close(
            tangent.kernel_predict(base, cross, coefficients),
            np.asarray(jax.jit(f_lin)(f_lin.direction(dual), new)),
            "float64",
        )


def test_without_a_penalty_the_data_are_met_by_the_smallest_change():
    with jax.enable_x64(True):
        f_lin, data, J, r, _ = problem("vision")
        expected = np.linalg.lstsq(J, r, rcond=None)[0]
        paths = dense.reference("vision")[1]
        for how in ("dual", "cg"):
            tau = tangent.ridge(f_lin, data, 0.0, how=how, select=pick, tolerance=1e-13)
            np.testing.assert_allclose(vector(tau, paths), expected, atol=1e-8 * np.abs(expected).max())


def test_kernel_regression_of_one_kernel_for_all_outputs():
    K = np.cov(RNG.standard_normal((6, 9)))
    y, w = RNG.standard_normal((6, 2)), np.array([1, 2, 1, 0, 1, 3.0])
    coefficients = tangent.kernel_regression(K, y, 0.2, w)
    seen = w > 0
    expected = np.zeros((6, 2))
    expected[seen] = np.linalg.solve(K[np.ix_(seen, seen)] + 0.2 * np.diag(1 / w[seen]), y[seen])
    np.testing.assert_allclose(coefficients, expected, atol=1e-10)
    full = np.einsum("ab,cd->acbd", K, np.eye(2))
    np.testing.assert_allclose(tangent.kernel_regression(full, y, 0.2, w), expected, atol=1e-10)
    for cross in (K[:2], full[:2]):
        np.testing.assert_allclose(tangent.kernel_predict(y[:2], cross, coefficients), y[:2] + K[:2] @ expected)
    for wrong in ((K[:3], y, 0.1), (K, y[:, 0], 0.1), (K, y, -0.1)):
        with pytest.raises(ValueError, match=r"residual \[N, C\]|negative"):
            tangent.kernel_regression(*wrong)


@pytest.mark.parametrize("name", ["decoder", "clip"])
def test_least_squares_over_coefficients(name):
    with jax.enable_x64(True):
        f_lin, data, _, r, w = problem(name)
        taus = [tree.flatten(models.draw(f_lin.params, seed)) for seed in range(3)]
        A = np.stack([dense.moved(name, tau).ravel() for tau in taus], axis=1)
        found = tangent.least_squares(f_lin, taus, data, select=pick)
        close(found.gram, A.T @ (w[:, None] * A), "float64")
        close(found.moment, A.T @ (w * r), "float64")
        assert found.weight == WEIGHTS.sum()
        whole = tangent.least_squares(f_lin, taus, [jax.tree.map(lambda *x: np.concatenate(x), *data)], select=pick)
        close(whole.gram, found.gram, "float64")
        close(whole.moment, found.moment, "float64")
        ridged = np.linalg.solve(A.T @ (w[:, None] * A) + 0.7 * np.eye(3), A.T @ (w * r))
        close(found.solve(0.7), ridged, "float64")
        one = A.sum(1)
        close(found.solve(shared=True), np.full(3, one @ (w * r) / (one @ (w * one))), "float64")
        ridged = one @ (w * r) / (one @ (w * one) + 3 * 0.7)
        close(found.solve(0.7, shared=True), np.full(3, ridged), "float64")
        best = found.solve()
        close(best, np.linalg.lstsq(np.sqrt(w)[:, None] * A, np.sqrt(w) * r, rcond=None)[0], "float64")
        grid = np.stack([best, best + 0.1, np.zeros(3)])
        expected = [np.sum(w * (r - A @ alpha) ** 2) / WEIGHTS.sum() for alpha in grid]
        close(found.loss(grid), expected, "float64")
        # The same grid by a sweep.
        table = tangent.sweep(f_lin, taus, [tuple_batch(item) for item in data], squared, grid)
        np.testing.assert_allclose(table["loss"], expected, rtol=1e-9)


def tuple_batch(item):
    batch, y, w = item
    return {**batch, "y": y, "w": w}


def squared(outputs, batch):
    return {
        "weight": jnp.sum(batch["w"]),
        "loss": jnp.sum(batch["w"][:, None] * (batch["y"] - pick(outputs, batch)) ** 2),
    }


def test_conjugate_gradients_that_stop_early_say_so():
    f_lin = jft.linearize(lambda params, x: x @ params["w"], {"w": np.zeros((4, 2), np.float32)})
    data = [(RNG.standard_normal((6, 4)).astype(np.float32), RNG.standard_normal((6, 2)).astype(np.float32))]
    with pytest.warns(UserWarning, match="relative residual"):
        tau = tangent.ridge(f_lin, data, 1e-3, how="cg", steps=1)
    assert tau.manifest["residual"] > 1e-6


def test_problems_that_cannot_be_are_refused():
    f_lin, data, *_ = problem("vision", "float32")
    batch, y, w = data[0]
    for given, how, told in (
        (([], 0.1), {}, "no data"),
        ((data, -0.1), {}, "penalty"),
        ((data, 0.1), {"how": "primal"}, "auto, dual or cg"),
        (([(batch, y[:, :1], w)], 0.1), {"select": pick}, "targets have 1 numbers"),
        (([(batch, y, w[:0])], 0.1), {}, r"weights \[0\]"),
        (([(batch, y.astype(int), w)], 0.1), {}, "floating-point targets"),
        (([(batch, y, -w)], 0.1), {}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=told):
            tangent.ridge(f_lin, *given, **how)
    tau = models.draw(f_lin.params, 0)
    with pytest.raises(ValueError, match="do not fit outputs"):
        tangent.least_squares(f_lin, [tau], [(batch, y[:, :1], w)])
    with pytest.raises(ValueError, match="no data"):
        tangent.least_squares(f_lin, [tau], [])
