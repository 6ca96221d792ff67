"""Rules that weigh entries one by one: MagMax, RAM, SCE, PCB, Arcee Fusion; NumPy, then mergekit and FusionBench."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import Dense, TaskVector
from jft.merge import RULES, task_arithmetic
from jft.merge.arcee_fusion import arcee_fusion
from jft.merge.magmax import magmax
from jft.merge.pcb import pcb
from jft.merge.ram import ram, ramplus
from jft.merge.sce import sce
from tests.merge import peers
from tests.merge.draws import ODD, assert_close, assert_equal, each_tensor, flat, split, vectors

MUTATIONS = [
    ("jft/merge/magmax.py", "len(terms) - 1 - jnp.argmax(jnp.abs(terms)[::-1]", "jnp.argmax(jnp.abs(terms)"),
    ("jft/merge/magmax.py", "tensor.weighted() * tensor.deltas", "tensor.deltas"),
    ("jft/merge/ram.py", "return over_models(deltas) / jnp.maximum(models, 1)", "return jnp.mean(deltas, axis=0)"),
    ("jft/merge/ram.py", "jnp.abs(deltas) > epsilon", "jnp.abs(deltas) >= epsilon"),
    ("jft/merge/ram.py", "rho = shared / jnp.maximum(unique, 1)", "rho = unique / jnp.maximum(shared, 1)"),
    ("jft/merge/ram.py", "jnp.minimum(rho, tensor", "jnp.maximum(rho, tensor"),
    ("jft/merge/sce.py", "over_models(deltas) >= 0, 1.0", "over_models(deltas) > 0, 1.0"),
    ("jft/merge/sce.py", "jnp.sum(variance != 0) * density", "variance.size * density"),
    ("jft/merge/sce.py", "small = total <= least_energy", "small = total < 0"),
    ("jft/merge/pcb.py", "jnp.diagonal(negative), count)", "jnp.diagonal(negative), 1)"),
    ("jft/merge/pcb.py", "power(deltas * deltas[j], span[j]", "power(deltas + deltas[j], span[j]"),
    ("jft/merge/pcb.py", "beta >= limit, beta", "beta > limit, beta"),
    ("jft/merge/pcb.py", 'Pass(_extremes, reduce="max")', "Pass(_extremes)"),
    ("jft/merge/pcb.py", "jnp.sign(_weighted(tensor)) * _clip(tensor)", "_weighted(tensor)"),
    ("jft/merge/arcee_fusion.py", "median + 1.5 * (q3 - q1)", "median + 1.5 * q3"),
    ("jft/merge/arcee_fusion.py", "_divergence(base + deltas, base, rows)", "_divergence(base, base + deltas, rows)"),
]
WEIGHTS = [1.0, 0.5, -0.7]


def weighed(xs):
    return np.stack([w * x for w, x in zip(WEIGHTS, xs, strict=True)])


# --- references, in float64


def magmax_reference(xs):
    best = xs[0]
    for x in xs[1:]:
        best = np.where(np.abs(x) >= np.abs(best), x, best)
    return best


def ram_reference(xs, epsilon):
    changed = np.abs(xs) > epsilon
    return (xs * changed).sum(0) / np.maximum(changed.sum(0), 1)


def ramplus_factors(xs, r, alpha, epsilon):
    changed = (np.abs(xs) > epsilon).reshape(len(xs), -1)
    unique, shared = changed & (changed.sum(0) == 1), changed & (changed.sum(0) > 1)
    return 1 + r * np.clip(shared.sum(1) / np.maximum(unique.sum(1), 1e-5), 0, alpha)


def sce_reference(xs, density, floor):
    if density < 1:
        variance = xs.var(0).astype(np.float32)
        keep = np.zeros(variance.size, bool)
        keep[np.argsort(-variance.ravel(), kind="stable")[: int(np.count_nonzero(variance) * density)]] = True
        xs = xs * keep.reshape(variance.shape)
    energy = (xs**2).reshape(len(xs), -1).mean(1)
    share = energy / energy.sum() if energy.sum() > floor else np.ones(len(xs)) / len(xs)
    agree = np.sign(xs) == np.where(xs.sum(0) >= 0, 1, -1)
    shares = agree * share.reshape(-1, *(1,) * (xs.ndim - 1))
    total = np.maximum(shares.sum(0), floor)
    return (shares * xs).sum(0) / np.where(total == 0, 1, total)


def normed(x):
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    return (x - low) / np.where(high == low, 1, high - low)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def pcb_reference(xs, density, balance):
    shape, (n, d) = xs.shape[1:], (len(xs), xs[0].size)
    xs = xs.reshape(n, d)
    at = lambda x, i: np.sort(x, axis=1)[:, int(i), None]
    if balance == "softmax":
        beta = softmax(n * normed(xs * xs)) * sum(softmax(normed(xs * x)) for x in xs)
        beta = beta * (beta >= at(beta, (1 - density) * d))
    else:
        size = np.abs(xs)
        size = np.clip(size, at(size, d * 0.0001), at(size, d * (1 - 0.0001) - 1))
        beta = np.exp(n * normed(size) ** 2) * np.tanh(xs * xs.sum(0))
        beta = normed(np.maximum(beta, at(beta, d * (1 - density))))
        xs = np.sign(xs) * size
    return ((beta * xs).sum(0) / np.maximum(beta.sum(0), 1e-12)).reshape(shape)


def fusion_reference(base, delta, axis=-1):
    soft = lambda x: np.exp(x) / np.exp(x).sum(axis, keepdims=True) + 1e-8
    p, q = soft(base + delta), soft(base)
    importance = np.abs(delta) * (p * np.log(p / q)).sum(axis, keepdims=True)
    q1, median, q3 = (np.sort(importance.ravel())[int(f * (importance.size - 1))] for f in (0.25, 0.5, 0.75))
    return delta * (importance >= median + 1.5 * (q3 - q1))


# --- against the references


def test_magmax():
    taus = vectors()
    assert_equal(magmax(taus, WEIGHTS), each_tensor(lambda xs: magmax_reference(weighed(xs)), taus))
    # Of equal magnitudes the last.
    assert_close(magmax([taus[0], -taus[0]]), -taus[0], atol=0)


def test_ram():
    taus = vectors()
    # Deltas are quarters, so that some are exactly epsilon.
    expected = each_tensor(lambda xs: ram_reference(np.stack(xs), 0.25), taus)
    assert_equal(ram(taus, epsilon=0.25), expected)
    r, alpha, epsilon = 0.3, np.array([1.0, 2.0, 9.0]), 1.0

    def merged(xs, factors):
        xs = np.stack(xs)
        changed = np.abs(xs) > epsilon
        factors = np.where(changed.sum(0) == 1, factors.reshape(-1, *(1,) * (xs.ndim - 1)), 1)
        return (xs * factors * changed).sum(0) / np.maximum(changed.sum(0), 1)

    whole = ramplus_factors(np.stack([flat(tau) for tau in taus]), r, alpha, epsilon)
    options = {"r": r, "alpha": alpha, "epsilon": epsilon}
    assert_equal(ramplus(taus, **options), each_tensor(lambda xs: merged(xs, whole), taus))
    local = each_tensor(lambda xs: merged(xs, ramplus_factors(np.stack(xs), r, alpha, epsilon)), taus)
    assert_equal(ramplus(taus, preset="mergekit", **options), local)


def sparse(taus):
    """The same, zero in two of three entries, the same ones in all models: nothing varies there."""
    rng = np.random.default_rng(7)
    masks = {path: rng.random(taus[0][path].shape) < 1 / 3 for path in taus[0]}
    return [TaskVector({path: Dense(jnp.where(masks[path], tau[path].dense(), 0)) for path in tau}) for tau in taus]


def test_sce():
    for taus in (vectors(), sparse(vectors(distinct=True))):
        for density in (0.5, 1.0):
            expected = each_tensor(lambda xs, d=density: sce_reference(weighed(xs), d, 0.0), taus)
            assert_equal(sce(taus, WEIGHTS, density=density), expected)
    # Small deltas have too little energy for mergekit: they are averaged.
    small = [3e-4 * tau for tau in vectors(distinct=True)]
    for preset, floor in (("paper", 0.0), ("mergekit", 1e-6)):
        expected = each_tensor(lambda xs, f=floor: sce_reference(np.stack(xs), 0.5, f), small)
        assert_equal(sce(small, density=0.5, preset=preset), expected, atol=1e-9)


@pytest.mark.parametrize("balance", ["softmax", "tanh"])
def test_pcb(balance):
    for seed in range(3):
        taus = vectors(distinct=True, seed=seed)
        options = {"density": 0.3, "balance": balance}
        expected = each_tensor(lambda xs: pcb_reference(weighed(xs), 0.3, balance), taus)
        assert_equal(pcb(taus, WEIGHTS, scope="tensor", **options), expected, atol=2e-6)
        # The paper's, and its code's: one vector for each task.
        whole = pcb_reference(weighed([flat(tau) for tau in taus]), 0.3, balance)
        np.testing.assert_allclose(flat(pcb(taus, WEIGHTS, **options)), whole, atol=2e-6)


def test_traced_weights_are_not_ranked():
    taus = vectors()
    merged = jax.jit(lambda w: pcb(taus, w, scope="tensor"))(jnp.asarray(WEIGHTS))
    assert_close(merged, pcb(taus, WEIGHTS, scope="tensor"))
    for balance in ("softmax", "tanh"):
        with pytest.raises(ValueError, match=r"'weight', which is traced here.*scope='tensor'"):
            jax.jit(lambda w, b=balance: pcb(taus, w, balance=b))(jnp.asarray(WEIGHTS))


@pytest.mark.parametrize("axis", [-1, 0])
def test_arcee_fusion(axis):
    base, tau = vectors(2, distinct=True)
    arrays = {path: base[path].dense() for path in base}
    before, delta = split(base), split(tau)
    expected = {n: fusion_reference(before[n], 0.5 * x, axis if x.ndim > 1 else 0) for n, x in delta.items()}
    assert any(np.any(x) for x in expected.values())
    assert_equal(arcee_fusion([tau], 0.5, base=arrays, axis=axis), expected)


# --- laws


@pytest.mark.parametrize("rule", [magmax, ram, ramplus, sce, pcb])
def test_of_one_model(rule):
    tau = vectors(1)
    options = {"density": 1.0} if "density" in rule.options else {}
    assert_close(rule(tau, **options), tau[0])


@pytest.mark.parametrize("name", ["magmax", "ram", "ramplus", "sce", "pcb"])
def test_order_does_not_matter(name):
    taus = vectors(distinct=True)
    assert_close(RULES[name](taus, WEIGHTS), RULES[name](taus[::-1], WEIGHTS[::-1]))


@pytest.mark.parametrize("rule", [magmax, sce, pcb])
def test_scale_of_the_deltas(rule):
    taus = vectors(distinct=True)
    assert_close(rule([1e-3 * tau for tau in taus]), 1e-3 * rule(taus), atol=1e-8)


def test_disjoint_changes_are_added():
    """RAM of models that change different entries is their sum."""
    tau = vectors(1, distinct=True)[0]
    parts = [tau.select("^a$"), tau.exclude("^a$")]
    assert_close(ram(parts), task_arithmetic(parts))


@pytest.mark.parametrize("rule", [magmax, ram, ramplus, sce, pcb])
def test_odd_shapes(rule):
    taus = vectors(2, shapes=ODD)
    assert np.all(np.isfinite(flat(rule([taus[0], 0.0 * taus[0]]))))


def test_arcee_fusion_of_odd_shapes():
    base, tau = vectors(2, shapes=ODD)
    merged = arcee_fusion([tau], base={path: base[path].dense() for path in base})
    assert np.all(np.isfinite(flat(merged)))


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (sce, {"density": [0.1, 0.2, 0.3]}, "density"),
        (pcb, {"density": 2.0}, "density"),
        (pcb, {"balance": "relu"}, "balance"),
        (ramplus, {"scope": "layer"}, "scope"),
        (ram, {"epsilon": -1.0}, "epsilon"),
        (arcee_fusion, {}, "merges 1 models, not 3"),
    ],
)
def test_wrong_options(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(vectors(), **options)


def test_presets_differ():
    for name, options in (("sce", {"density": 0.5}), ("ramplus", {"alpha": 9.0})):
        rule, taus = RULES[name], [3e-4 * tau for tau in vectors(distinct=True)]
        options |= {"epsilon": 2e-4} if name == "ramplus" else {}
        paper, theirs = (flat(rule(taus, preset=preset, **options)) for preset in ("paper", "mergekit"))
        assert np.linalg.norm(paper - theirs) > 0.01 * np.linalg.norm(paper)


# --- against other libraries


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mergekit(kind, tmp_path):
    base, tuned = peers.models(tmp_path, kind)
    params, taus = peers.vectors(base, tuned)
    cases = [
        ("ram", ram, {}, {}),
        ("ramplus_tl", ramplus, {"r": 0.5, "alpha": 1.0}, {"r": 0.5, "alpha": 1.0}),
        ("sce", sce, {"select_topk": 0.3}, {"density": 0.3}),
        ("sce", sce, {}, {}),
    ]
    for i, (name, rule, parameters, options) in enumerate(cases):
        expected = peers.mergekit(name, base, tuned, tmp_path / f"out{i}", parameters)
        merged = rule(taus, preset="mergekit", **options)
        assert peers.largest_difference(params, merged, expected) <= 5e-7, name


@pytest.mark.peers
def test_mergekit_arcee_fusion(tmp_path):
    # Changes large enough for the divergence of rows not to be rounding in mergekit.
    base, tuned = peers.models(tmp_path, "llama", count=1, spread=1.0)
    params, taus = peers.vectors(base, tuned)
    expected = peers.mergekit("arcee_fusion", base, tuned, tmp_path / "out")
    merged = arcee_fusion(taus, base=params)
    assert peers.largest_difference(params, merged, expected) <= 5e-7


@pytest.mark.peers
def test_fusionbench():
    import torch

    theirs = peers.fusionbench("method.magmax.magmax")._magmax_select
    taus = vectors()
    tensors = [{n: torch.tensor(x, dtype=torch.float32) for n, x in split(tau).items()} for tau in taus]
    expected = {name: x.numpy() for name, x in theirs(tensors).items()}
    merged = magmax(taus, preset="fusionbench")
    assert isinstance(merged, TaskVector)
    assert_equal(merged, expected, atol=0)
