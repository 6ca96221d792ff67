"""Interpolation on spheres: against float64 from the formulas, against mergekit and FusionBench, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import merge
from jft.delta import Dense, TaskVector
from tests.merge import peers

MUTATIONS = [
    ("jft/merge/spheres.py", "jnp.sin((1 - t) * angle) / jnp.sin(angle)", "jnp.cos((1 - t) * angle) / jnp.sin(angle)"),
    (
        "jft/merge/spheres.py",
        "(tensor.base, points[0]) if len(points) == 1",
        "(points[0], tensor.base) if len(points) == 1",
    ),
    ("jft/merge/spheres.py", "jnp.abs(cosine) > threshold", "jnp.abs(cosine) > 0"),
    ("jft/merge/spheres.py", "weights[1] / jnp.where(none", "weights[0] / jnp.where(none"),
    ("jft/merge/spheres.py", "jnp.maximum(_norm(x, axis), 1e-7)", "jnp.maximum(_norm(x), 1e-7)"),
    ("jft/merge/spheres.py", "jnp.where(none, 0.5,", "jnp.where(none, 0.0,"),
    ("jft/merge/spheres.py", "lengths = jnp.sum(weights * norms, axis=0)", "lengths = jnp.mean(norms, axis=0)"),
    ("jft/merge/spheres.py", "cancel = length < eps", "cancel = length < 0"),
    ("jft/merge/spheres.py", "units = points / (norms + eps)", "units = points"),
    ("jft/merge/spheres.py", "& (carry[2] < steps)", "& (carry[2] < 1)"),
    (
        "jft/merge/spheres.py",
        "_without_gradient(jnp.sum(weights * norms, axis=0) * mean)",
        "_without_gradient(mean)",
    ),
    (
        "jft/merge/spheres.py",
        "start = jnp.where(_norm(start) < tol, first,",
        "start = jnp.where(_norm(start) < tol, 0,",
    ),
    ("jft/merge/spheres.py", "return tensor.base + tensor.deltas", "return tensor.deltas"),
    ("jft/merge/spheres.py", "jnp.maximum(jnp.abs(delta), 1e-6), 0, 1)", "jnp.maximum(jnp.abs(delta), 1e-6), 0, 2)"),
    ("jft/merge/spheres.py", "delta * jnp.clip(tensor", "jnp.clip(tensor"),
    ("jft/merge/spheres.py", "1 + (count - 1) * cosine + eps", "1 + count * cosine + eps"),
    ("jft/merge/spheres.py", "jnp.where(singular, 0, count * cosine", "jnp.where(singular, 1, count * cosine"),
    ("jft/merge/spheres.py", "norms[j] + eps, floor)", "norms[j], 0)"),
    ("jft/merge/spheres.py", 'if mean == "cosine" else', 'if mean != "cosine" else'),
]
# A column, a scalar, a bias, layers and experts.
SHAPES = {"a": (6, 9), "b": (5,), "c": (7, 1), "s": (), "layers/w": (3, 4, 5), "layers/experts/w": (2, 2, 3, 4)}
STACK = {"layers/w": 1, "layers/experts/w": 2}


def models(count=3, seed=0, shapes=SHAPES):
    """A base and task vectors of models near it."""
    rng = np.random.default_rng(seed)
    draw = lambda shape, scale=1.0: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
    base = {path: draw(shape) for path, shape in shapes.items()}
    return base, [TaskVector({path: Dense(draw(shape, 0.5)) for path, shape in shapes.items()}) for _ in range(count)]


def check(reference, merged, base, taus, origin="base", atol=2e-6):
    """Tensor by tensor: ``merged`` is ``reference(deltas)``, or that of whole weights less the base."""
    assert merged.paths == list(base)
    for path, w in base.items():
        w = np.asarray(w, np.float64)
        deltas = [np.asarray(tau[path].dense(), np.float64) for tau in taus]
        for index in np.ndindex(*w.shape[: STACK.get(path, 0)]):
            if origin == "base":
                expected = reference([d[index] for d in deltas])
            else:
                expected = reference([w[index] + d[index] for d in deltas], w[index]) - w[index]
            np.testing.assert_allclose(merged[path].dense()[index], expected, atol=atol, err_msg=path)


def great_circle(a, b, t):
    """From the plane of a and b: turned from the one towards the other by a part of their angle, per vector."""
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    cosine = np.clip(np.sum(a * b) / (na * nb), -1, 1) if na and nb else 0.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arctan2(np.sqrt(1 - cosine**2), cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def test_slerp():
    base, taus = models(2)
    merged = merge.slerp(taus, base=base, t=0.35)
    check(lambda x, w: great_circle(*x, 0.35), merged, base, taus, "zero")
    merged = merge.slerp(taus[:1], base=base, t=0.2)
    check(lambda x, w: great_circle(w, *x, 0.2), merged, base, taus[:1], "zero")


def test_slerp_of_unit_vectors_stays_on_the_sphere_and_moves_evenly():
    base = {"w": jnp.array([1.0, 0.0])}
    tau = TaskVector({"w": Dense(jnp.array([-1.0, 1.0]))})
    for t in (0.0, 0.25, 1.0):
        point = base["w"] + merge.slerp([tau], base=base, t=t)["w"].dense()
        np.testing.assert_allclose(point, [np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)], atol=1e-7)


def test_slerp_of_parallel_and_zero_tensors_is_finite():
    base = {"w": jnp.ones(4), "z": jnp.zeros(4)}
    tau = TaskVector({"w": Dense(jnp.full(4, -2.0)), "z": Dense(jnp.zeros(4))})
    merged = merge.slerp([tau], base=base, t=0.25)
    # Antipodal: linear, 0.75 * 1 + 0.25 * -1.
    np.testing.assert_allclose(merged["w"].dense(), np.full(4, -0.5), atol=1e-7)
    assert not merged["z"].dense().any()


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("origin", ["base", "zero"])
def test_nuslerp(axis, origin):
    base, taus = models(2)
    weights = [0.3, 0.9]

    def reference(x, w=None):
        a, b = x
        if axis is None or a.ndim < 2:
            return great_circle(a, b, 0.75)
        turn = lambda m: m.T if axis == 0 else m
        return turn(np.stack([great_circle(u, v, 0.75) for u, v in zip(turn(a), turn(b), strict=True)]))

    merged = merge.nuslerp(taus, weights, base=base, axis=axis, origin=origin)
    # A column of one entry each, and scalars, are parallel or opposite.
    check(reference, merged, base, taus, origin)


def test_nuslerp_weights_that_sum_to_nothing_count_the_same():
    _, taus = models(2)
    one, other = merge.nuslerp(taus, [1.0, -1.0]), merge.nuslerp(taus)
    np.testing.assert_array_equal(one["a"].dense(), other["a"].dense())


def barycentre(x, weights, normalize):
    """Section by section of the post: unit vectors, their mean direction, the tangent plane there, and back."""
    weights = np.asarray(weights) / (np.sum(weights) if normalize else 1)
    norms = np.array([np.linalg.norm(v) for v in x])
    units = [v / n for v, n in zip(x, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - np.sum(u * mean) * mean) for w, u in zip(weights, units, strict=True))
    length = np.linalg.norm(tangent)
    turned = np.sin(length) * tangent / length if length else 0
    return (np.cos(length) * mean + turned) * np.sum(weights * norms)


@pytest.mark.parametrize(("origin", "normalize"), [("base", True), ("zero", False)])
def test_multislerp(origin, normalize):
    base, taus = models()
    weights = [0.5, 1.0, 0.8]
    merged = merge.multislerp(taus, weights, base=base, origin=origin, normalize=normalize)
    check(lambda x, w=None: barycentre(x, weights, normalize), merged, base, taus, origin, atol=5e-6)


def test_multislerp_of_one_and_of_models_that_cancel():
    tau = TaskVector({"w": Dense(jnp.array([3.0, 4.0])), "z": Dense(jnp.zeros(2))})
    np.testing.assert_array_equal(merge.multislerp([tau])["w"].dense(), [3.0, 4.0])
    merged = merge.multislerp([tau, -tau, tau], [1.0, 2.0, 1.0])
    np.testing.assert_allclose(merged["w"].dense(), np.zeros(2), atol=1e-7)
    merged = merge.multislerp([tau, -2.0 * tau])
    np.testing.assert_allclose(merged["w"].dense(), [-1.5, -2.0], atol=1e-6)
    assert not merged["z"].dense().any()


def frechet(x, weights):
    """The mean on the sphere by a fixed point in float64, until nothing moves."""
    weights = np.asarray(weights) / np.sum(weights)
    norms = np.array([np.linalg.norm(v) for v in x])
    units = [v / n for v, n in zip(x, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(500):
        move = np.zeros_like(mean)
        for w, u in zip(weights, units, strict=True):
            angle = np.arccos(np.clip(np.sum(u * mean), -1, 1))
            if angle > 1e-12:
                move = move + w * angle * (u - np.cos(angle) * mean) / np.sin(angle)
        length = np.linalg.norm(move)
        if length > 1e-14:
            mean = np.cos(length) * mean + np.sin(length) * move / length
    return np.sum(weights * norms) * mean


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 0.5]])
def test_karcher(weights):
    shapes = {path: shape for path, shape in SHAPES.items() if path != "s"}
    base, taus = models(shapes=shapes)
    merged = merge.karcher(taus, weights, base=base)
    check(lambda x, w: frechet(x, weights or [1, 1, 1]), merged, base, taus, "zero", atol=5e-5)


def test_karcher_presets_differ_in_their_steps_and_zeros_stay():
    # Directions far apart: the fixed point takes more than ten steps.
    rng = np.random.default_rng(3)
    points = [jnp.asarray(v, jnp.float32) for v in ([1, 0, 0], [-0.9, 0.43, 0.1], [0.1, -0.8, 0.59])]
    base = {"w": jnp.zeros(3), "z": jnp.asarray(rng.normal(size=3), jnp.float32)}
    taus = [TaskVector({"w": Dense(p), "z": Dense(-base["z"])}) for p in points]
    paper, mergekit = (merge.karcher(taus, base=base, preset=p, tol=1e-7) for p in ("paper", "mergekit"))
    assert np.abs(paper["w"].dense() - mergekit["w"].dense()).max() > 1e-4
    np.testing.assert_allclose(paper["z"].dense(), -base["z"], atol=1e-7)
    # Directions that cancel: from the first of them, which is stationary.
    opposite = [TaskVector({"w": Dense(p)}) for p in (points[0], -points[0])]
    np.testing.assert_allclose(merge.karcher(opposite, base=base)["w"].dense(), points[0], atol=1e-6)


def test_nearswap():
    tau = TaskVector({"w": Dense(jnp.array([[0.5], [-0.2], [0.05], [0.0]])), "s": Dense(jnp.float32(-3.0))})
    merged = merge.nearswap([tau], t=0.1)
    np.testing.assert_allclose(merged["w"].dense()[:, 0], [0.1, -0.1, 0.05, 0.0], atol=1e-8)
    np.testing.assert_allclose(merged["s"].dense(), -0.1, atol=1e-8)


def stock(deltas, axis, angle=False):
    """Section 4 of the paper: the projection of the base's centre on the mean, per tensor or per slice."""
    count, mean = len(deltas), np.mean(deltas, axis=0)
    kw = {"axis": axis, "keepdims": axis is not None} if deltas[0].ndim else {}
    pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    cosines = [np.sum(a * b, **kw) / np.sqrt(np.sum(a * a, **kw) * np.sum(b * b, **kw)) for a, b in pairs]
    cosine = np.cos(np.mean(np.arccos(np.clip(cosines, -1, 1)), axis=0)) if angle else np.mean(cosines, axis=0)
    denominator = 1 + (count - 1) * cosine
    singular = np.abs(denominator) < 1e-6
    return np.where(singular, 0, count * cosine / np.where(singular, 1, denominator)) * mean


@pytest.mark.parametrize(("axis", "angle"), [(None, False), (0, False), (-1, False), (None, True)])
def test_model_stock(axis, angle):
    # Vectors of one entry have a cosine of 1 or -1: at N = 3 a mean of 1/3 with the sign, nothing singular.
    shapes = {path: shape for path, shape in SHAPES.items() if path not in ("s", "c")}
    base, taus = models(shapes=shapes, seed=1)
    # Near each other, as tuned models are; apart, the ratio is ill-conditioned.
    shared = models(1, seed=2, shapes=shapes)[1][0]
    taus = [shared + tau for tau in taus]
    merged = merge.model_stock(taus, axis=axis, mean="angle" if angle else "cosine")
    check(lambda x: stock(x, axis, angle), merged, base, taus, atol=1e-5)


def test_model_stock_of_two_is_the_papers_formula_and_opposites_stay_at_the_base():
    a, b = (TaskVector({"w": Dense(jnp.array(v))}) for v in ([1.0, 0.0], [1.0, 1.0]))
    cosine = 1 / np.sqrt(2)
    expected = 2 * cosine / (1 + cosine) * np.array([1.0, 0.5])
    np.testing.assert_allclose(merge.model_stock([a, b])["w"].dense(), expected, atol=1e-7)
    for preset in merge.model_stock.presets:
        for pair in ([a, -2.0 * a], [0.0 * a, b]):
            np.testing.assert_allclose(merge.model_stock(pair, preset=preset)["w"].dense(), np.zeros(2), atol=1e-6)


def test_model_stock_presets_differ():
    _, taus = models(seed=4)
    paper, mergekit, fusionbench = (
        np.asarray(merge.model_stock(taus, preset=p)["a"].dense()) for p in ("paper", "mergekit", "fusionbench")
    )
    np.testing.assert_allclose(paper, mergekit, atol=1e-6)
    assert np.abs(paper - fusionbench).max() > 1e-5
    # Of tiny changes: mergekit's floor of the product of norms cuts the cosine, FusionBench's term does so less.
    tiny = [1e-5 * tau for tau in taus]
    ratio = lambda preset: np.asarray(merge.model_stock(tiny, preset=preset)["a"].dense()) / 1e-5
    np.testing.assert_allclose(ratio("paper"), paper, rtol=1e-3, atol=1e-6)
    assert np.abs(ratio("mergekit") - paper).max() > 1e-3 * np.abs(paper).max()
    assert np.abs(ratio("fusionbench") - fusionbench).max() > 1e-3 * np.abs(fusionbench).max()


@pytest.mark.parametrize("rule", ["slerp", "nuslerp", "karcher", "multislerp", "model_stock"])
def test_order_does_not_matter(rule):
    base, taus = models(2)
    options = {"axis": 0} if rule == "nuslerp" else {}
    one, other = (getattr(merge, rule)(x, base=base, **options) for x in (taus, taus[::-1]))
    for path in base:
        np.testing.assert_allclose(one[path].dense(), other[path].dense(), atol=1e-5)


def test_karcher_is_compiled_and_has_no_gradient():
    _, taus = models(2)
    merged = lambda w: merge.karcher(taus, w, origin="base")["a"].dense()
    weights = jnp.array([0.5, 1.0])
    np.testing.assert_allclose(jax.jit(merged)(weights), merged([0.5, 1.0]), atol=1e-6)
    with pytest.raises(ValueError, match="karcher has no gradient"):
        jax.grad(lambda w: merged(w).sum())(weights)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: merge.slerp([t]), "base=params"),
        (lambda t: merge.slerp([t, t], [1.0, 2.0]), "slerp has no weights"),
        (lambda t: merge.slerp([t], t=1.5), "t must be between 0 and 1, not 1.5"),
        (lambda t: merge.slerp([t] * 3), "slerp merges 1 to 2 models, not 3"),
        (lambda t: merge.nuslerp([t, t], origin="mean"), "origin of nuslerp is 'mean'; it may be 'base', 'zero'"),
        (lambda t: merge.nuslerp([t, t], axis=1), "axis must be None, 0 or -1, not 1"),
        (lambda t: merge.karcher([t], steps=0), "steps must be at least 1"),
        (lambda t: merge.model_stock([t]), "model_stock merges 2 or more models, not 1"),
        (lambda t: merge.model_stock([t, t], mean="median"), "'cosine', 'angle'"),
        (lambda t: merge.nearswap([t], t=-1.0), "t must be"),
    ],
)
def test_wrong_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(TaskVector({"w": Dense(jnp.ones(3))}))


@pytest.mark.peers
def test_mergekit(tmp_path):
    base, tuned = peers.models(tmp_path, "llama")
    params, taus = peers.vectors(base, tuned)
    weights = [0.6, 0.9, 0.5]
    each = [{"weight": w} for w in weights]
    worst = {}

    def compare(name, merged, *recipe, **options):
        expected = peers.mergekit(name, *recipe, tmp_path / f"out{len(worst)}", **options)
        worst[f"{name} {len(worst)}"] = peers.largest_difference(params, merged, expected)

    compare("slerp", merge.slerp(taus[:1], base=params, t=0.35), base, [base, tuned[0]], parameters={"t": 0.35})
    rows = {"nuslerp_flatten": False}
    for options, axis in (({}, None), (rows, -1), ({**rows, "nuslerp_row_wise": True}, 0)):
        for origin, at in (("base", base), ("zero", None)):
            merged = merge.nuslerp(taus[:2], weights[:2], base=params, axis=axis, origin=origin)
            compare("nuslerp", merged, at, tuned[:2], parameters=options, each=each[:2])
    for origin, at in (("base", base), ("zero", None)):
        merged = merge.multislerp(taus, weights, base=params, origin=origin)
        compare("multislerp", merged, at, tuned, each=each)
    compare("karcher", merge.karcher(taus, base=params, preset="mergekit"), None, tuned)
    compare("nearswap", merge.nearswap(taus[:1], t=0.01), base, [base, tuned[0]], parameters={"t": 0.01})
    compare("model_stock", merge.model_stock(taus, preset="mergekit"), base, tuned)
    merged = merge.model_stock(taus, preset="mergekit", axis=-1)
    compare("model_stock", merged, base, tuned, parameters={"filter_wise": True})
    assert max(worst.values()) <= 5e-7, worst


@pytest.mark.peers
def test_fusionbench():
    import torch

    slerp = peers.fusionbench("method.slerp.slerp_utils").slerp
    stock = peers.fusionbench("method.model_stock.model_stock")
    base, taus = models(3, seed=5)
    whole = [{k: torch.tensor(np.asarray(base[k] + tau[k].dense())) for k in base} for tau in taus]
    origin = {k: torch.tensor(np.asarray(w)) for k, w in base.items()}
    merged = merge.slerp(taus[:2], base=base, t=0.3, preset="fusionbench")
    two, three = (merge.model_stock(taus[:n], preset="fusionbench") for n in (2, 3))
    for path in ("a", "b", "c"):
        expected = slerp(0.3, whole[0][path], whole[1][path]).numpy()
        np.testing.assert_allclose(base[path] + merged[path].dense(), expected, atol=5e-7)
        ratios = stock.compute_ratio(stock.compute_angle(whole[0], whole[1], origin), 2)
        expected = stock.merge_weights(whole[0], whole[1], origin, ratios)[path].numpy()
        np.testing.assert_allclose(base[path] + two[path].dense(), expected, atol=5e-7)
        # Of three: the mean of the angles, and its formula for the ratio.
        angles = [stock.compute_angle(whole[i], whole[j], origin)[path] for i, j in ((0, 1), (0, 2), (1, 2))]
        ratio = stock.compute_ratio({path: float(np.mean(angles))}, 3)[path]
        expected = ratio * np.mean([np.asarray(tau[path].dense(), np.float64) for tau in taus], axis=0)
        np.testing.assert_allclose(three[path].dense(), expected, atol=5e-7)
