"""The neural tangent kernel, its spectrum and regression with it, against a dense float64 Jacobian in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import delta, tangent, tree
from tests.tangent import dense, models
from tests.tangent.dense import TOLERANCES, close, pick

MUTATIONS = (
    ("jft/tangent/kernel.py", "acp,bdp->acbd", "acp,bdp->adbc"),
    ("jft/tangent/kernel.py", "product / a.shape[1] if trace", "product if trace"),
    ("jft/tangent/kernel.py", "jnp.sqrt(jnp.asarray(y.shape[1], y.dtype))", "jnp.asarray(y.shape[1], y.dtype)"),
    ("jft/tangent/kernel.py", "jnp.mean(K.reshape(M, C, N), axis=1)", "jnp.sum(K.reshape(M, C, N), axis=1)"),
    ("jft/tangent/kernel.py", "part.transpose(2, 3, 0, 1)", "part.transpose(2, 1, 0, 3)"),
    ("jft/tangent/kernel.py", "dy[:, c] if", "dy[:, 0] if"),
    ("jft/tangent/kernel.py", "gradient if total is None else jax.tree.map(jnp.add, total, gradient)", "gradient"),
    ("jft/tangent/spectrum.py", "values[::-1][:count]", "values[:count]"),
    ("jft/tangent/spectrum.py", "vectors[:, ::-1][:, :count]", "vectors[:, :count]"),
    ("jft/tangent/spectrum.py", 'which="LA"', 'which="SA"'),
    ("jft/tangent/spectrum.py", "return weights @ energy", "return weights @ np.sqrt(energy)"),
    ("jft/tangent/spectrum.py", "energy[:, tasks == task].mean(axis=1)", "energy[:, tasks == task].sum(axis=1)"),
)


def linearized(name, dtype="float64", **kw):
    model, params, batch = models.model(name, jnp.dtype(dtype))
    return jft.linearize(model.apply, params, **kw), params, batch


def gram(J, other=None):
    return np.einsum("acp,bdp->acbd", J, J if other is None else other)


@pytest.mark.parametrize(("dtype", "how"), [("float64", "jacobian"), ("float32", "products")])
@pytest.mark.parametrize("name", models.NAMES)
def test_kernel_equals_the_dense_jacobians(name, dtype, how):
    expected = gram(dense.flat(name))
    with jax.enable_x64(True):
        f_lin, _, batch = linearized(name, dtype)
        K = tangent.kernel(f_lin, batch, how=how, select=pick)
        assert K.dtype == dtype and K.shape == expected.shape
        close(K, expected, dtype)
        np.testing.assert_array_equal(K, K.transpose(2, 3, 0, 1))
        size = K.shape[0] * K.shape[1]
        assert np.linalg.eigvalsh(K.reshape(size, size)).min() > -TOLERANCES[dtype] * np.abs(K).max()


@pytest.mark.parametrize("how", ["jacobian", "products"])
def test_kernel_of_what_moves(how):
    """Paths by pattern; parts of weights as a task vector's encodings say."""
    with jax.enable_x64(True):
        f_lin, params, batch = linearized("decoder")
        paths = [p for p in tree.flatten(params) if "attn" in p]
        expected = gram(dense.flat("decoder", paths))
        close(tangent.kernel(f_lin, batch, how=how, select=pick, moving="attn"), expected, "float64")
        # The Jacobian in what a sparse encoding holds has its columns; in b of a b, it is J times a.
        q, o, up = "layers/attn/q/w", "layers/attn/o/w", "layers/mlp/up/w"
        _, J = dense.reference("decoder")
        mask = np.random.default_rng(0).random(J[q].shape[2:]) < 0.2
        at = np.argwhere(mask.reshape(-1, mask.shape[-1])).astype(np.int32)
        a = np.random.default_rng(1).standard_normal((*J[o].shape[2:-1], 2))
        tau = delta.TaskVector(
            {
                q: delta.Entries(*at.T, np.ones(len(at)), mask.shape),
                o: delta.LowRank(a, np.zeros((a.shape[0], 2, J[o].shape[-1]))),
                up: delta.Slices(np.array([1, 9], np.int32), np.ones((2, J[up].shape[-1])), J[up].shape[2:], -2),
            }
        )
        columns = [
            J[q][..., mask],
            np.einsum("nclio,lir->nclro", J[o], a).reshape(*J[o].shape[:2], -1),
            J[up][:, :, [0, 1], [1, 1]].reshape(*J[o].shape[:2], -1),
        ]
        expected = gram(np.concatenate(columns, axis=2))
        close(tangent.kernel(f_lin, batch, how=how, select=pick, moving=tau), expected, "float64")


def test_kernel_in_small_blocks_of_examples_and_leaves():
    """Five examples against three; memory for two of them, and for less than the largest leaf of one."""
    with jax.enable_x64(True):
        f_lin, params, _ = linearized("vision")
        five = {"images": np.random.default_rng(2).standard_normal((5, 8, 8, 1))}
        three = jax.tree.map(lambda x: x[2:], five)
        expected = tangent.kernel(f_lin, five, how="products")
        P = tree.count(params)
        for memory in (5 * 2 * 3 * 4 * P // 2, 1000):
            K = tangent.kernel(f_lin, five, how="jacobian", memory=memory)
            close(K, expected, "float64")
            np.testing.assert_array_equal(K, K.transpose(2, 3, 0, 1))
        for how in ("jacobian", "products"):
            close(tangent.kernel(f_lin, five, three, how=how, memory=9000), expected[:, :, 2:], "float64")


@pytest.mark.parametrize("how", ["jacobian", "products"])
def test_kernels_of_one_number_for_many_outputs(how):
    with jax.enable_x64(True):
        f_lin, _, batch = linearized("vision")
        J = dense.flat("vision")
        full = gram(J)
        C = J.shape[1]
        found = lambda of, **kw: tangent.kernel(f_lin, batch, of=of, how=how, select=pick, **kw)
        close(found("trace"), np.einsum("acbc->ab", full) / C, "float64")
        close(found("sum"), full.sum((1, 3)) / C, "float64")
        one = [found("one", key=jax.random.key(seed)) for seed in range(12)]
        kinds = {min(range(C), key=lambda c: np.abs(K - full[:, c, :, c]).max()) for K in one}
        assert kinds == set(range(C))
        assert all(min(np.abs(K - full[:, c, :, c]).max() for c in range(C)) < 1e-9 * np.abs(full).max() for K in one)


def test_the_cheaper_way_is_taken():
    """Many outputs of a small pass: products; few outputs: contraction."""
    f_lin, _, batch = linearized("decoder", "float32")
    eight = {"tokens": np.tile(batch["tokens"], (4, 1))}
    many = tangent.kernel_cost(f_lin, eight)
    few = tangent.kernel_cost(f_lin, eight, of="sum")
    assert few.cheaper == "jacobian"
    assert many.jacobian / many.products > few.jacobian / few.products
    table = {"w": jnp.ones((50, 40))}
    wide = jft.linearize(lambda p, x: x @ p["w"], table)
    assert tangent.kernel_cost(wide, jnp.ones((8, 50))).cheaper == "products"
    K = tangent.kernel(wide, jnp.ones((3, 50)))
    np.testing.assert_allclose(K, np.einsum("ab,cd->acbd", np.full((3, 3), 50.0), np.eye(40)), atol=1e-4)


def test_product_and_largest_eigenvalues_without_the_matrix():
    with jax.enable_x64(True):
        f_lin, _, _ = linearized("vision")
        images = np.random.default_rng(2).standard_normal((7, 8, 8, 1))
        batches = [{"images": images[:4]}, {"images": images[4:]}]
        K = tangent.kernel(f_lin, {"images": images})
        product = tangent.KernelProduct(f_lin, batches)
        u = np.random.default_rng(0).standard_normal(product.shape)
        close(product(u), np.tensordot(K, u, 2), "float64")
        every = tangent.spectrum(K)
        top = tangent.top_spectrum(f_lin, batches, 3)
        np.testing.assert_allclose(top.values, every.values[:3], rtol=1e-9)
        overlap = np.abs(np.einsum("knc,knc->k", top.functions, every.functions[:3]))
        np.testing.assert_allclose(overlap, 1, atol=1e-8)
        rebuilt = np.einsum("k,knc,kmd->ncmd", every.values, every.functions, every.functions)
        close(rebuilt, K, "float64")
        c = every.coefficients(u)
        np.testing.assert_allclose(np.einsum("k,knc->nc", c, every.functions), u, atol=1e-9)
        with pytest.raises(ValueError, match="between 1 and 20"):
            tangent.top_spectrum(f_lin, batches, 21)


def test_localisation_of_eigenfunctions():
    """A kernel of two blocks has eigenfunctions on one or the other; a uniform one lies on both alike."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 3, 8))
    K = np.zeros((7, 7))
    K[:3, :3] = first @ first.T
    K[3:, 3:] = np.cov(rng.standard_normal((4, 9))) + second[0, 0] ** 2
    tasks = ["a"] * 3 + ["b"] * 4
    found = tangent.spectrum(K)
    shares = tangent.localisation(found.functions, tasks)
    np.testing.assert_allclose(shares["a"] + shares["b"], 1)
    np.testing.assert_allclose(np.minimum(shares["a"], shares["b"]), 0, atol=1e-12)
    assert round(shares["a"].sum()) == 3
    flat = tangent.localisation(np.full((1, 7, 2), 14**-0.5), tasks)
    np.testing.assert_allclose([flat["a"][0], flat["b"][0]], 0.5)
    np.testing.assert_allclose(tangent.local_energy(found.functions), 1)
    target = np.r_[rng.standard_normal(3), np.zeros(4)]
    energy = tangent.local_energy(found.functions, found.coefficients(target) ** 2)
    np.testing.assert_allclose(energy[3:], 0, atol=1e-20)
    assert energy[:3].min() > 0
    for wrong in (lambda: tangent.localisation(found.functions, tasks[:5]), lambda: tangent.spectrum(K[:3])):
        with pytest.raises(ValueError, match=r"examples|\[N, N\]"):
            wrong()
    with pytest.raises(ValueError, match="one for each of 7"):
        tangent.local_energy(found.functions, [1.0])


def test_kernels_that_cannot_be_are_refused():
    f_lin, _, batch = linearized("clip", "float32")
    for wrong, told in (
        (dict(), "select"),
        (dict(select=lambda o, b: o["logit_scale"]), "row for each"),
        (dict(select=pick, of="traces"), "did you mean 'trace'"),
        (dict(select=pick, how="jacobians"), "did you mean 'jacobian'"),
        (dict(select=pick, moving="nothing_there"), "matches no weight"),
    ):
        with pytest.raises(ValueError, match=told):
            tangent.kernel(f_lin, batch, **wrong)
    with pytest.raises(ValueError, match="one row for each example"):
        tangent.kernel(f_lin, {**batch, "scale": np.float32(1)}, select=pick)
    with pytest.raises(ValueError, match="no weight moves"):
        tangent.kernel(f_lin, batch, moving={}, select=pick)
