"""Spectral rules against references from their papers in float64, against FusionBench, and the laws that they keep.

References take matrices as papers write them, [out, in]; jft's are [in, out].
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import Dense, TaskVector
from jft.merge import average, cart, iso_c, iso_cts, task_arithmetic, tsv_compress, tsv_m, wudi
from jft.merge.isotropic import sizes
from tests.merge import peers

MUTATIONS = [
    ("jft/merge/spectral.py", "TOLERANCE = 1e-6", "TOLERANCE = 0.3"),
    ("jft/merge/spectral.py", "(inside - turned) / 2 * _inverse(both)", "(inside - turned) * _inverse(both)"),
    ("jft/merge/spectral.py", "jnp.where(close, 0, 1 / jnp.where(close, 1, gap))", "1 / gap"),
    ("jft/merge/spectral.py", "product(v, together - against)", "product(v, together + against)"),
    ("jft/merge/spectral.py", "product(dx, v) - product(u, inside)", "product(dx, v)"),
    ("jft/merge/spectral.py", '"average": 1 / len(tensor.deltas)', '"average": 1.0'),
    ("jft/merge/spectral.py", 'x if side == "inputs" else', 'x if side == "outputs" else'),
    (
        "jft/merge/singular_vectors.py",
        "left = polar(side_by_side(u[:, :, :rank]))",
        "left = side_by_side(u[:, :, :rank])",
    ),
    ("jft/merge/singular_vectors.py", "min(deltas.shape[1:]) // len(deltas), int", "min(deltas.shape[1:]) // 2, int"),
    (
        "jft/merge/singular_vectors.py",
        "u[..., :rank] * s[..., None, :rank]",
        "u[..., :rank] * s[..., None, :rank] ** 2",
    ),
    ("jft/merge/singular_vectors.py", "else int(size * fraction)", "else 1 + int(size * fraction)"),
    ("jft/merge/isotropic.py", 'svd(combined(tensor, "sum"))', 'svd(combined(tensor, "average"))'),
    ("jft/merge/isotropic.py", "jnp.mean(s) * product(u, vt)", "jnp.max(s) * product(u, vt)"),
    (
        "jft/merge/isotropic.py",
        "deltas - product(u, transposed(u), deltas)",
        "deltas + product(u, transposed(u), deltas)",
    ),
    ("jft/merge/isotropic.py", "_columns(rest, jnp.linalg.norm(deltas, axis=(1, 2)))", "_columns(rest)"),
    ("jft/merge/isotropic.py", "round(rest / count)", "rest // count"),
    ("jft/merge/wudi.py", "adam.update(2 *", "adam.update(-2 *"),
    ("jft/merge/wudi.py", "taus / jnp.sqrt(jnp.where(squares == 0, 1, squares))", "taus"),
    ("jft/merge/wudi.py", "s**2 + ridge)", "s**2 + 2 * ridge)"),
    ("jft/merge/cart.py", "truncated(tensor.deltas - mean,", "truncated(tensor.deltas,"),
    ("jft/merge/cart.py", "math.ceil(min", "math.floor(min"),
]
SHAPES = {
    "a": (12, 7),
    "layers/w": (2, 7, 12),
    "layers/experts/w": (2, 2, 7, 12),
    "b": (5,),
    "s": (),
    "layers/b": (2, 5),
}
WEIGHTS = [1.0, 0.5, -2.0]


def vectors(count=3, seed=0, shapes=SHAPES, scale=0.1):
    """Vectors whose matrices have singular values apart, and leading directions that hardly overlap.

    Directions of close values, and the polar factor of those that nearly coincide, are lost to float32 on either side.
    """
    rng = np.random.default_rng(seed)
    of = {path: (apart if len(shape) > 1 else normal)(rng, count, shape) for path, shape in shapes.items()}
    return [TaskVector({p: Dense(jnp.asarray(x[i] * scale, jnp.float32)) for p, x in of.items()}) for i in range(count)]


def normal(rng, count, shape):
    return rng.normal(size=(count, *shape))


def apart(rng, count, shape):
    *stack, rows, columns = shape
    size = min(rows, columns)
    rank = size // count
    values = np.concatenate([np.linspace(3, 1.2, rank), np.linspace(0.5, 0.1, size - rank)])
    left, right = (np.linalg.qr(rng.normal(size=(*stack, n, n)))[0] for n in (rows, columns))
    turn = lambda x, i: np.roll(x, -i * rank, axis=-1)[..., :size]
    exact = [(turn(left, i) * values) @ np.swapaxes(turn(right, i), -1, -2) for i in range(count)]
    return np.stack(exact) + 0.1 * rng.normal(size=(count, *shape))


def dense(tau, path):
    return np.asarray(tau[path].dense(), np.float64)


def tensors(tau):
    """``(name, tensor)`` of every layer and expert, float64."""
    for path, delta in tau.items():
        stack = 0 if not path.startswith("layers") else 2 if "experts" in path else 1
        for index in np.ndindex(*delta.shape[:stack]):
            yield (path, index), dense(tau, path)[index]


def expected(reference, taus, weights=(1.0, 1.0, 1.0)):
    """The reference on matrices [out, in] and the average of everything else."""
    scaled = [{name: w * x for name, x in tensors(tau)} for w, tau in zip(weights, taus, strict=True)]
    out = {}
    for name, x in scaled[0].items():
        deltas = [s[name] for s in scaled]
        out[name] = reference([d.T for d in deltas]).T if x.ndim == 2 else sum(deltas) / len(deltas)
    return out


def difference(tau, reference):
    """The largest difference of a tensor, by the norm of the reference."""
    merged = dict(tensors(tau))
    assert merged.keys() == reference.keys()
    return max(np.linalg.norm(merged[k] - reference[k]) / max(np.linalg.norm(reference[k]), 1e-30) for k in reference)


def orthogonal(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def tsv_paper(deltas):
    """Algorithm 1: truncate, concatenate, orthogonalise by Procrustes, recompose."""
    kept = min(deltas[0].shape) // len(deltas)
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    u = np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1)
    s = np.concatenate([s[:kept] for _, s, _ in parts])
    vt = np.concatenate([vt[:kept] for _, _, vt in parts])
    return orthogonal(u) @ np.diag(s) @ orthogonal(vt)


def iso_c_paper(deltas):
    u, s, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    return s.mean() * u @ vt


def iso_cts_paper(deltas, fraction=0.8):
    """Algorithm 2, with the number of directions of the released code."""
    count, rank = len(deltas), min(deltas[0].shape)
    common = rank - round((rank - int(rank * fraction)) / count) * count
    u, s, vt = (np.linalg.svd(sum(deltas), full_matrices=False)[i] for i in range(3))
    u, s, v = [u[:, :common]], [s[:common]], [vt[:common].T]
    each = (rank - common) // count
    for delta in deltas:
        rest = delta - u[0] @ u[0].T @ delta
        a, b, c = np.linalg.svd(rest, full_matrices=False)
        u, s, v = [*u, a[:, :each]], [*s, b[:each]], [*v, c[:each].T]
    return np.concatenate(s).mean() * orthogonal(np.concatenate(u, 1)) @ orthogonal(np.concatenate(v, 1)).T


def interference(merged, deltas):
    """The loss of WUDI, equation 10."""
    return sum(np.sum(((merged - d) @ d.T) ** 2) / np.sum(d**2) for d in deltas)


def wudi_paper(deltas, steps, rate):
    x, m, v = sum(deltas), 0.0, 0.0
    for t in range(1, steps + 1):
        gradient = sum(2 * (x - d) @ d.T @ d / np.sum(d**2) for d in deltas)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


def wudi_minimum(deltas, ridge=0.0):
    """Least squares: rows of X D^T = X tau_i^T for X = tau_i / ||tau_i||, all i; a ridge is rows more."""
    rows = np.concatenate([d / np.linalg.norm(d) for d in deltas])
    goals = np.concatenate([d @ d.T / np.linalg.norm(d) for d in deltas])
    more = np.sqrt(ridge) * np.eye(rows.shape[1])
    goals = np.concatenate([goals, np.zeros((len(more), goals.shape[1]))])
    return np.linalg.lstsq(np.concatenate([rows, more]), goals, rcond=1e-9)[0].T


def cart_paper(deltas, ratio=0.08, coefficient=1.0, weights=(1.0, 1.0, 1.0)):
    mean = sum(deltas) / len(deltas)
    total = mean.copy()
    for w, delta in zip(weights, deltas, strict=True):
        u, s, vt = np.linalg.svd(delta - mean, full_matrices=False)
        kept = math.ceil(ratio * len(s))
        total += coefficient * w * (u[:, :kept] * s[:kept]) @ vt[:kept]
    return total


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (tsv_m, tsv_paper),
        (iso_c, iso_c_paper),
        (iso_cts, iso_cts_paper),
        (functools.partial(iso_cts, common_space_fraction=0.5), functools.partial(iso_cts_paper, fraction=0.5)),
        (functools.partial(wudi, steps=40, learning_rate=1e-3), lambda d: wudi_paper(d, 40, 1e-3)),
        (functools.partial(wudi, solver="closed_form", ridge=0.05), lambda d: wudi_minimum(d, 0.05)),
    ],
)
def test_paper(rule, reference):
    taus = vectors()
    assert difference(rule(taus, WEIGHTS), expected(reference, taus, WEIGHTS)) < 1e-5


def test_cart():
    taus = vectors()
    for options in ({}, {"rank_ratio": 0.3, "coefficient": 0.5}):
        reference = lambda d, o=options: cart_paper(d, o.get("rank_ratio", 0.08), o.get("coefficient", 1.0), WEIGHTS)
        assert difference(cart(taus, WEIGHTS, **options), expected(reference, taus)) < 1e-5
    # Of full rank what is centered cancels.
    assert difference(cart(taus, rank_ratio=1.0), dict(tensors(average(taus)))) < 1e-5


def test_tsv_compress():
    taus = vectors()
    for options, kept in (({}, 2), ({"fraction": 0.5}, 3)):
        for tau, result in zip(taus, tsv_compress(taus, **options), strict=True):
            for (path, index), x in tensors(tau):
                u, s, vt = np.linalg.svd(x, full_matrices=False) if x.ndim == 2 else (x, None, None)
                best = x if s is None else (u[:, :kept] * s[:kept]) @ vt[:kept]
                np.testing.assert_allclose(dense(result, path)[index], best, atol=1e-5)


def test_defaults_are_the_papers():
    assert iso_cts.options["common_space_fraction"] == 0.8
    assert (wudi.options["steps"], wudi.options["learning_rate"]) == (300, 1e-5)
    assert cart.options["rank_ratio"] == 0.08
    # 7 directions of 3 models: 5 are common, and 2 do not divide by 3.
    assert [sizes(7, 3, f) for f in (0.8, 0.5, 0.0)] == [(4, 1), (4, 1), (1, 2)]
    assert sizes(5, 8, 0.0) == (5, 0)


def test_closed_form_is_the_minimum():
    taus = vectors()
    closed = dense(wudi(taus, solver="closed_form"), "a").T
    deltas = [dense(tau, "a").T for tau in taus]
    least = interference(closed, deltas)
    assert least <= interference(wudi_minimum(deltas), deltas) * 1.001
    for other in (wudi(taus), task_arithmetic(taus), average(taus)):
        assert least < interference(dense(other, "a").T, deltas)


@pytest.mark.parametrize("rule", [tsv_m, iso_c, cart])
def test_transposes_and_order(rule):
    taus = vectors(shapes={"a": (7, 12)})
    turned = [TaskVector({"a": Dense(tau["a"].dense().T)}) for tau in taus]
    merged = dense(rule(taus), "a")
    np.testing.assert_allclose(dense(rule(turned), "a").T, merged, atol=4e-6)
    np.testing.assert_allclose(dense(rule(taus[::-1]), "a"), merged, atol=4e-6)


@pytest.mark.parametrize("rule", [iso_cts, functools.partial(wudi, solver="closed_form", ridge=0.01)])
def test_transposes_of_one_side(rule):
    taus = vectors(shapes={"a": (7, 12)})
    turned = [TaskVector({"a": Dense(tau["a"].dense().T)}) for tau in taus]
    of = {side: dense(rule(taus, side=side), "a") for side in ("inputs", "outputs")}
    np.testing.assert_allclose(dense(rule(turned, side="inputs"), "a").T, of["outputs"], atol=1e-5)
    assert np.linalg.norm(of["inputs"] - of["outputs"]) > 0.05 * np.linalg.norm(of["inputs"])
    np.testing.assert_allclose(dense(rule(taus[::-1], side="inputs"), "a"), of["inputs"], atol=1e-5)


@pytest.mark.parametrize("rule", [tsv_m, iso_c, iso_cts, cart, functools.partial(wudi, solver="closed_form")])
def test_low_rank(rule):
    """Null directions, which rounding decides, have no part: turned bases turn the result, and the order is free."""
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(9, 2)) @ rng.normal(size=(2, 14)) for _ in range(3)]
    p, q = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (9, 14))
    merge = lambda deltas: dense(rule([TaskVector({"a": Dense(jnp.asarray(d, jnp.float32))}) for d in deltas]), "a")
    merged = merge(x)
    assert np.linalg.matrix_rank(merged, tol=1e-4 * np.linalg.norm(merged)) <= 6
    np.testing.assert_allclose(merge([p @ d @ q for d in x[::-1]]), p @ merged @ q, atol=2e-4)


def test_one_model():
    taus = vectors(1)
    for rule in (tsv_m, cart, functools.partial(wudi, steps=3), functools.partial(wudi, solver="closed_form")):
        assert difference(rule(taus), dict(tensors(taus[0]))) < 1e-4
    assert difference(iso_c(taus), expected(iso_c_paper, taus, [1.0])) < 1e-5


def test_scale_and_weights():
    """Rules of the first degree: a scale of all deltas is one of the result."""
    taus = vectors(shapes={"a": (7, 12)})
    for rule in (tsv_m, iso_c, iso_cts, functools.partial(wudi, solver="closed_form")):
        np.testing.assert_allclose(
            dense(rule(taus, 2.0, scale=0.5), "a"), dense(rule([2.0 * t for t in taus]), "a") / 2, atol=1e-5
        )


RULES = (tsv_m, iso_c, iso_cts, functools.partial(wudi, steps=2), functools.partial(wudi, solver="closed_form"), cart)


@pytest.mark.parametrize("rule", RULES)
def test_odd_shapes(rule):
    """One column, no change at all, the same change twice, a model that lacks a path: finite, and where due zero."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 12)), jnp.float32)
    zero = jnp.zeros((7, 12))
    one = TaskVector({"a": Dense(x), "zero": Dense(zero), "column": Dense(x[:, :1]), "twice": Dense(x)})
    two = TaskVector({"a": Dense(zero), "zero": Dense(zero), "twice": Dense(x)})
    for weights in (None, [1.0, -1.0]):
        merged = rule([one, two], weights)
        assert all(np.isfinite(dense(merged, path)).all() for path in merged)
        assert not np.any(dense(merged, "zero"))
    if rule is tsv_m:
        # Of equal models one is left, and one model's directions do not depend on another's zero.
        np.testing.assert_allclose(
            dense(tsv_m([one, two]), "twice"), dense(tsv_compress([one, two])[0], "twice"), atol=1e-5
        )
        np.testing.assert_allclose(dense(tsv_m([one, two]), "a"), dense(tsv_compress([one, two])[0], "a"), atol=1e-5)


@pytest.mark.parametrize("rule", [iso_c, iso_cts, tsv_m, functools.partial(wudi, solver="closed_form")])
def test_gradients(rule):
    """By the weights, as central differences: of any matrices, of low rank, of none; polar factors have equal values."""
    rng = np.random.default_rng(3)
    low = lambda: jnp.asarray(0.1 * np.outer(rng.normal(size=7), rng.normal(size=12)), jnp.float32)
    more = [{"low": Dense(low()), "zero": Dense(jnp.zeros((7, 12)))} for _ in range(3)]
    taus = [TaskVector({**tau.deltas, **m}) for tau, m in zip(vectors(shapes={"any": (7, 12)}), more, strict=True)]
    direction = jnp.asarray(rng.normal(size=(7, 12)), jnp.float32)

    @jax.jit
    def along(weights):
        merged = rule(taus, weights)
        return jnp.stack([jnp.vdot(direction, merged[path].dense()) for path in ("any", "low", "zero")])

    weights, step = np.array([1.0, 0.5, -0.7], np.float32), np.float32(0.005)
    slopes = [(along(weights + e) - along(weights - e)) / (2 * step) for e in step * np.eye(3, dtype=np.float32)]
    gradient = jax.jit(jax.jacrev(along))(weights)
    np.testing.assert_allclose(gradient, np.stack(slopes, axis=1), atol=5e-3, rtol=1e-2)
    assert not np.any(gradient[2])


def test_what_a_matrix_is():
    taus = vectors(shapes={"a": (7, 12), "layers/w": (2, 7, 12), "b": (5,)})
    inside = tsv_m(taus, matrices="layers", others="sum")
    whole = tsv_m(taus)
    np.testing.assert_array_equal(dense(inside, "layers/w"), dense(whole, "layers/w"))
    for path in ("a", "b"):
        np.testing.assert_allclose(dense(inside, path), sum(dense(t, path) for t in taus), atol=1e-6)
    assert not np.any(dense(tsv_m(taus, others="zero"), "b"))
    few = [TaskVector({"a": Dense(tau["a"].dense()[:2])}) for tau in taus]
    assert not np.any(dense(tsv_m(few), "a"))
    assert np.any(dense(tsv_m(few, at_least_one=True), "a"))


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (tsv_m, {"matrices": "none"}),
        (iso_c, {"others": "mean"}),
        (iso_cts, {"side": "left"}),
        (iso_cts, {"common_space_fraction": 1.2}),
        (wudi, {"solver": "sgd"}),
        (wudi, {"steps": -1}),
        (wudi, {"ridge": -1.0}),
        (cart, {"rank_ratio": 2}),
        (tsv_compress, {"fraction": -1}),
    ],
)
def test_wrong_options(rule, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rule(vectors(shapes={"b": (5,)}), **options)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("rule", "module", "call"),
    [
        (
            tsv_m,
            "task_singular_vector.utils.TSVM_utils",
            lambda m, x: m.compute_and_sum_svd_mem_reduction(x, None, "cpu"),
        ),
        (iso_c, "isotropic_merging.iso_utils", lambda m, x: m.iso_c(x, "cpu")),
        (iso_cts, "isotropic_merging.iso_utils", lambda m, x: m.iso_cts(x, 0.8, "cpu")),
        (functools.partial(wudi, steps=50), "wudi.wudi", lambda m, x: m.wudi_merging(x, "cpu", 50)),
    ],
)
def test_fusionbench(rule, module, call):
    import torch

    theirs = peers.fusionbench(f"method.{module}")
    taus = vectors(shapes={"a": (24, 15), "large": (160, 96), "b": (5,)})
    # In float64, so that what differs is not their rounding.
    x = [{p: torch.tensor(dense(tau, p).T.astype(np.float64)) for p in tau} for tau in taus]
    for path, value in call(theirs, x).items():
        merged, reference = dense(rule(taus, preset="fusionbench"), path), value.detach().numpy().T
        assert np.linalg.norm(merged - reference) < 1e-5 * np.linalg.norm(reference)
