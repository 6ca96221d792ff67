"""RegMean and MaTS against least squares in float64, Gram matrices against the inputs of a decoder, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from jft import tree
from jft.delta import Dense, TaskVector
from jft.dot import dot
from jft.merge import average
from jft.merge.mats import mats
from jft.merge.regmean import regmean, regmean_plus_plus
from jft.models import DecoderConfig, Model
from jft.models.core import Hooks
from jft.models.moe import Experts
from jft.select.grams import factors, grams
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.merge import peers

MUTATIONS = [
    ("jft/merge/regmean.py", "least_norm(jnp.sum(gram, axis=0), target)", "least_norm(jnp.mean(gram, axis=0), target)"),
    ("jft/merge/regmean.py", "bool), 1.0, off_diagonal", "bool), off_diagonal, 1.0"),
    ("jft/merge/regmean.py", "merged[path].at[layer].set(x[0])", "merged[path]"),
    ("jft/merge/mats.py", "init * jnp.sum(deltas, axis=0)", "init * jnp.mean(deltas, axis=0)"),
    (
        "jft/merge/mats.py",
        "return lambda x: product(product(inputs, x), outputs)",
        "return lambda x: product(inputs, x)",
    ),
    ("jft/select/grams.py", "x.astype(jnp.float32) * keep[..., None]", "x.astype(jnp.float32)"),
    ("jft/select/grams.py", "return dy, second_moment(dy.astype(jnp.float32))", "return dy, second_moment(2 * dy)"),
]
DECODER = Model(DecoderConfig(vocab=16, width=8, layers=2, heads=2, hidden=12))
MIXTURE = Model(DecoderConfig(vocab=16, width=8, layers=2, heads=2, hidden=8, experts=Experts(3, 2, 8)))
SHAPES = {"w": (5, 3), "column": (4, 1), "b": (3,), "layers/w": (2, 3, 4), "layers/experts/w": (2, 2, 3, 2)}
MATRICES = [p for p in SHAPES if p != "b"]


def problem(count=3, rows=12, seed=0):
    """Task vectors, and the data ``[..., rows, in]`` that every matrix reads in every model."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    taus = [TaskVector({p: Dense(jnp.asarray(draw(s))) for p, s in SHAPES.items()}) for _ in range(count)]
    data = [{p: draw((*SHAPES[p][:-2], rows, SHAPES[p][-2])) for p in MATRICES} for _ in range(count)]
    return taus, data


def gram(x):
    return np.swapaxes(x, -1, -2) @ x


def lstsq(taus, data, path):
    """Least squares on the data of all models one below the other, in float64, matrix by matrix."""
    out = np.zeros(SHAPES[path])
    for index in np.ndindex(*SHAPES[path][:-2]):
        x = np.concatenate([d[path][index] for d in data]).astype(np.float64)
        y = [
            d[path][index].astype(np.float64) @ np.asarray(t[path].dense(), np.float64)[index]
            for d, t in zip(data, taus, strict=True)
        ]
        out[index] = np.linalg.lstsq(x, np.concatenate(y), rcond=1e-6)[0]
    return out


@pytest.mark.parametrize("rows", [12, 1])
def test_is_least_squares(rows):
    """With all of the Gram matrices; with 3 rows for 5 inputs of the least norm."""
    taus, data = problem(rows=rows)
    merged = regmean(taus, statistics=[{p: gram(x) for p, x in d.items()} for d in data], off_diagonal=1.0)
    for path in MATRICES:
        expected = lstsq(taus, data, path)
        # The condition number of a Gram matrix is that of the data squared.
        np.testing.assert_allclose(merged[path].dense(), expected, atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(merged["b"].dense(), average(taus)["b"].dense(), atol=1e-6)


def test_off_diagonal_and_weights():
    taus, data = problem()
    statistics = [{p: gram(x) for p, x in d.items()} for d in data]
    merged = regmean(taus, [1.0, 0.5, 2.0], statistics=statistics, off_diagonal=0.3, scale=2.0)
    for path in ("w", "column"):
        size = SHAPES[path][0]
        g = [
            w * s[path].astype(np.float64) * np.where(np.eye(size), 1, 0.3)
            for w, s in zip((1, 0.5, 2), statistics, strict=True)
        ]
        b = sum(m @ np.asarray(t[path].dense(), np.float64) for m, t in zip(g, taus, strict=True))
        np.testing.assert_allclose(merged[path].dense(), 2 * np.linalg.solve(sum(g), b), atol=2e-5)


def test_laws():
    """One model is itself, where its data reach; equal data are the average; inputs that are always zero do not change."""
    taus, data = problem()
    statistics = [{p: gram(x) for p, x in d.items()} for d in data]
    one = regmean(taus[:1], statistics=statistics[:1])
    same, mean = regmean(taus, statistics=statistics[:1] * 3), average(taus)
    for path in SHAPES:
        np.testing.assert_allclose(one[path].dense(), taus[0][path].dense(), atol=5e-5)
        np.testing.assert_allclose(same[path].dense(), mean[path].dense(), atol=5e-5)
    for d in data:
        d["w"][:, 2] = 0
    dead = regmean(taus, statistics=[{"w": gram(d["w"])} for d in data])
    # Zero but for the rounding of a solver, which differs between processors.
    assert np.abs(dead["w"].dense()[2]).max() < 1e-6
    assert np.isfinite(dead["w"].dense()).all()


def test_presets_differ():
    taus, data = problem()
    statistics = [{p: gram(x) for p, x in d.items()} for d in data]
    paper, other = (regmean(taus, statistics=statistics, preset=p)["w"].dense() for p in ("paper", "fusionbench"))
    assert np.abs(paper - other).max() > 1e-3


def kronecker(taus, statistics, path, weights=(1, 1, 1)):
    """The solution of the system written out as one matrix, in float64."""
    a = [
        w * np.kron(s[path]["inputs"], s[path]["outputs"]).astype(np.float64)
        for w, s in zip(weights, statistics, strict=True)
    ]
    b = sum(m @ np.asarray(t[path].dense(), np.float64).ravel() for m, t in zip(a, taus, strict=True))
    return np.linalg.solve(sum(a), b).reshape(SHAPES[path])


def test_mats_solves_its_system():
    taus, data = problem()
    rng = np.random.default_rng(5)
    two = {p: rng.normal(size=(3, 9, SHAPES[p][-1])).astype(np.float32) for p in ("w", "column")}
    kfac = [{p: {"inputs": gram(d[p]), "outputs": gram(two[p][i])} for p in two} for i, d in enumerate(data)]
    merged = mats(taus, [1.0, 0.5, 2.0], statistics=kfac, tolerance=1e-7)
    for path in two:
        np.testing.assert_allclose(merged[path].dense(), kronecker(taus, kfac, path, (1, 0.5, 2)), atol=1e-3)
    # The other curvatures: those of RegMean, of Fisher merging (its floor aside), and none.
    statistics = [{p: gram(x) for p, x in d.items()} for d in data]
    by_gram = mats(taus, curvature="gram", statistics=statistics, off_diagonal=0.9, init=0.3, tolerance=1e-7)
    expected = regmean(taus, statistics=statistics, off_diagonal=0.9)
    diagonal = [{p: np.abs(rng.normal(size=s)).astype(np.float32) + 0.1 for p, s in SHAPES.items()} for _ in taus]
    by_fisher = mats(taus, curvature="diagonal", statistics=diagonal, tolerance=1e-7)
    plain, mean = mats(taus, curvature="identity", init=0.7), average(taus)
    for path in SHAPES:
        np.testing.assert_allclose(by_gram[path].dense(), expected[path].dense(), atol=1e-4)
        f, t = (
            np.stack([np.asarray(x, np.float64) for x in z])
            for z in ([d[path] for d in diagonal], [t[path].dense() for t in taus])
        )
        np.testing.assert_allclose(by_fisher[path].dense(), (f * t).sum(0) / f.sum(0), atol=1e-4)
        np.testing.assert_allclose(plain[path].dense(), mean[path].dense(), atol=1e-6)


def test_mats_starts_where_it_is_told():
    taus, data = problem()
    statistics = [{p: gram(x) for p, x in d.items()} for d in data]
    run = functools.partial(mats, taus, curvature="gram", statistics=statistics)
    sums = sum(np.asarray(t["w"].dense()) for t in taus)
    np.testing.assert_allclose(run(init=0.3, iterations=0)["w"].dense(), 0.3 * sums, atol=1e-6)
    np.testing.assert_allclose(run(iterations=0)["w"].dense(), sums / 3, atol=1e-6)
    # The steps are those of SciPy's conjugate gradients, which the released code takes from parameters, not task vectors.
    base = np.random.default_rng(9).normal(size=SHAPES["w"])
    deltas = [np.asarray(t["w"].dense(), np.float64) for t in taus]
    g = [s["w"].astype(np.float64) for s in statistics]
    system = scipy.sparse.linalg.LinearOperator((15, 15), lambda x: (sum(g) @ x.reshape(5, 3)).ravel())
    target = sum(m @ (base + t) for m, t in zip(g, deltas, strict=True)).ravel()
    theirs = scipy.sparse.linalg.cg(system, target, x0=(base + sum(deltas) / 3).ravel(), rtol=0, maxiter=3)[0]
    np.testing.assert_allclose(base + run(iterations=3)["w"].dense(), theirs.reshape(5, 3), atol=1e-5)
    # Each step takes it nearer to the solution.
    exact = regmean(taus, statistics=statistics, off_diagonal=1.0)["w"].dense()
    errors = [np.linalg.norm(run(iterations=n)["w"].dense() - exact) for n in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("rule", "options", "match"),
    [
        (regmean, {"off_diagonal": 1.5}, "off_diagonal"),
        (regmean, {}, "Gram matrix has shape"),
        (mats, {"curvature": "hessian"}, "curvature of mats is 'hessian'"),
        (mats, {"init": "zero"}, "init is 'zero'"),
        (mats, {"iterations": -1}, "iterations"),
        (mats, {}, "'outputs'"),
        (mats, {"curvature": "diagonal"}, "diagonal"),
        (mats, {"curvature": "identity"}, "reads no statistics"),
    ],
)
def test_wrong_uses(rule, options, match):
    taus, data = problem()
    statistics = [{"w": gram(d["w"])[:4, :4] if rule is regmean else gram(d["w"])} for d in data]
    with pytest.raises(ValueError, match=match):
        rule(taus, statistics=statistics, **options)


@functools.cache
def data(seed=0):
    r = np.random.default_rng(seed)
    tokens = r.integers(0, 16, (2, 3, 6)).astype(np.int32)
    segments = (np.arange(6)[None] < r.integers(3, 7, (2, 3))[..., None]).astype(np.int32)
    return [{"tokens": t, "segments": s} for t, s in zip(tokens, segments, strict=True)]


@functools.cache
def weights(model, seed):
    # Larger than at the start, so that layers change what they read.
    return jax.tree.map(lambda x: 20 * x if x.ndim > 2 else x, model.init(jax.random.key(seed)))


@functools.partial(jax.jit, static_argnums=0)
def inputs(model, params, batch):
    def product(name, x, w, state):
        return dot(x, w), x

    return model.apply(params, batch, Hooks(product=product))[1]


def reference_grams(model, params, batches, name, layer):
    """``sum over real tokens of x^T x / tokens`` of one layer, in float64."""
    total, tokens = 0, 0
    for batch in batches:
        x = np.asarray(inputs(model, params, batch)[name], np.float64)[layer]
        keep = batch["segments"].ravel() > 0
        x = x.reshape(-1, keep.size, x.shape[-1])[:, keep]
        total, tokens = total + np.einsum("eni,enj->eij", x, x), tokens + keep.sum()
    return (total / tokens)[0 if len(total) == 1 else slice(None)]


def calibration_of(model, params, seed=0, paths=None):
    return RunCalibration(model, params, paths or model.linear_paths(), LanguageModel(), data(seed))


def test_grams_of_layers_and_experts():
    for model in (DECODER, MIXTURE):
        params = weights(model, 0)
        measured = grams(calibration_of(model, params), 2)
        assert set(measured) == set(model.linear_paths())
        for path in ("layers/attn/o/w", "layers/mlp/experts/down/w" if model is MIXTURE else "layers/mlp/down/w"):
            for layer in range(2):
                expected = reference_grams(model, params, data(), path[:-2], layer)
                np.testing.assert_allclose(measured[path][layer], expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="'embed/table' is no product"):
        grams(calibration_of(DECODER, weights(DECODER, 0), paths=("embed/table",)), 1)


def test_factors():
    """The second moments of gradients in outputs, against gradients in what is added to the outputs."""
    params, (batch, _) = weights(MIXTURE, 0), data()
    names = ("layers/attn/q", "layers/mlp/experts/up")

    def loss(added):
        def product(name, x, w, state):
            return dot(x, w) + (0 if state is None else state), None

        return LanguageModel().loss(MIXTURE.apply(params, batch, Hooks(product=product, state=added))[0], batch)[0]

    shapes = {names[0]: (2, 3, 6, 8), names[1]: (2, 3, 18, 8)}
    gradient = jax.jit(jax.grad(loss))({name: jnp.zeros(shapes[name]) for name in names})
    paths = tuple(f"{name}/w" for name in names)
    measured = factors(calibration_of(MIXTURE, params, paths=paths), 1)
    tokens = batch["segments"].sum()
    for name, path in zip(names, paths, strict=True):
        g = np.asarray(gradient[name], np.float64)
        g = g.reshape(2, -1, 8) if name == names[0] else g
        expected = np.einsum("...ni,...nj->...ij", g, g) / tokens
        np.testing.assert_allclose(measured[path]["outputs"], expected, atol=1e-5 * np.abs(expected).max())
        gram_of_0 = reference_grams(MIXTURE, params, [batch], name, 0)
        np.testing.assert_allclose(measured[path]["inputs"][0], gram_of_0, atol=1e-5 * np.abs(gram_of_0).max())


def decoder_problem(model=DECODER):
    base = weights(model, 0)
    models = [jax.tree.map(lambda b, w: b + 0.3 * w, base, weights(model, seed)) for seed in (1, 2)]
    return base, models, [TaskVector.between(base, m) for m in models]


def distance(base, tau, models):
    """``sum over tasks and layers of |X W - X W_i|^2`` at the inputs X of the models themselves."""
    out = 0.0
    for i, model in enumerate(models):
        for path in DECODER.linear_paths():
            for layer in range(2):
                g = reference_grams(DECODER, model, data(i), path[:-2], layer)
                d = np.asarray(tree.flatten(base)[path] + tau[path].dense() - tree.flatten(model)[path], np.float64)[
                    layer
                ]
                out += float(np.einsum("io,ij,jo->", d, g, d))
    return out


def test_on_a_decoder():
    """RegMean is nearer to the models on their data than the average is."""
    base, models, taus = decoder_problem()
    statistics = [grams(calibration_of(DECODER, m, seed=i), 2) for i, m in enumerate(models)]
    merged = regmean(taus, statistics=statistics, off_diagonal=1.0)
    assert distance(base, merged, models) < 0.7 * distance(base, average(taus), models)


@pytest.mark.parametrize("model", [DECODER, MIXTURE], ids=["dense", "experts"])
def test_regmean_plus_plus(model):
    """Layer after layer, the inputs of each those that the merged layers before it give; the head last."""
    base, models, taus = decoder_problem(model)
    calibrations = [calibration_of(model, base, seed=i, paths=(*model.linear_paths(), "head/w")) for i in range(2)]
    plus = regmean_plus_plus(taus, calibrations, base=base, batches=2, off_diagonal=0.9)
    flat = {p: np.asarray(x, np.float64) for p, x in tree.flatten(base).items()}
    tuned = [{p: np.asarray(x, np.float64) for p, x in tree.flatten(m).items()} for m in models]
    current = {p: (tuned[0][p] + tuned[1][p]) / 2 for p in flat}

    def fit(path, index, gs):
        gs = [np.where(np.eye(g.shape[-1]), g, 0.9 * g) for g in gs]
        return flat[path][index] + np.linalg.pinv(sum(gs), rcond=1e-6) @ sum(
            g @ (t[path] - flat[path])[index] for g, t in zip(gs, tuned, strict=True)
        )

    params = lambda x: tree.unflatten({p: jnp.asarray(y, jnp.float32) for p, y in x.items()})
    for layer in range(2):
        mixed = []
        for t in tuned:
            one = {p: x.copy() for p, x in current.items()}
            for p in one:
                if p.startswith("layers/"):
                    one[p][layer] = t[p][layer]
            mixed.append(params(one))
        for path in model.linear_paths():
            gs = [reference_grams(model, m, data(i), path[:-2], layer) for i, m in enumerate(mixed)]
            current[path][layer] = fit(path, layer, gs)
    current["head/w"] = fit("head/w", (), [head_gram(model, params(current), data(i)) for i in range(2)])
    for path, x in current.items():
        np.testing.assert_allclose(flat[path] + plus[path].dense(), x, atol=2e-3 * np.abs(x).max(), err_msg=path)


def head_gram(model, params, batches):
    total, tokens = 0, 0
    for batch in batches:
        x = np.asarray(inputs(model, params, batch)["head"], np.float64)[batch["segments"] > 0]
        total, tokens = total + x.T @ x, tokens + len(x)
    return total / tokens


def test_wrong_calibrations():
    base, _, taus = decoder_problem()
    with pytest.raises(ValueError, match="1 calibrations for 2"):
        regmean_plus_plus(taus, [calibration_of(DECODER, base)], base=base, batches=1)
    plain, one = {"w": jnp.ones((2, 2))}, TaskVector({"w": Dense(jnp.ones((2, 2)))})
    with pytest.raises(ValueError, match="one stack"):
        regmean_plus_plus([one], [calibration_of(DECODER, base)], base=plain, batches=1)


@pytest.mark.peers
def test_fusionbench():
    import torch

    theirs = peers.fusionbench("method.regmean.regmean")
    taus, data = problem(rows=40)
    statistics = [{"w": gram(d["w"]) / 40} for d in data]
    values = {f"{p}.weight": [torch.tensor(np.asarray(t[p].dense()).T) for t in taus] for p in ("w", "column")}
    given = [{"w": torch.tensor(s["w"])} for s in statistics]
    expected = theirs.merging_with_regmean_weights(values, given, reduce_non_diagonal_ratio=0.95)
    merged = regmean(taus, statistics=statistics, preset="fusionbench")
    for path in ("w", "column"):
        np.testing.assert_allclose(merged[path].dense(), expected[f"{path}.weight"].T, atol=1e-6)
