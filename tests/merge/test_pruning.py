"""Rules that prune deltas first: magnitude, DARE, DELLA, breadcrumbs; references in NumPy, then mergekit, peft, FusionBench."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import Dense, TaskVector
from jft.merge import RULES, task_arithmetic
from jft.merge.breadcrumbs import breadcrumbs, breadcrumbs_ties
from jft.merge.dare import dare, dare_ties
from jft.merge.della import della, della_linear
from jft.merge.magnitude import magnitude
from jft.merge.ties import ties
from tests.merge import peers
from tests.merge.draws import ODD, assert_close, assert_equal, each_tensor, flat, split, uniforms, vectors

MUTATIONS = [
    (
        "jft/merge/magnitude.py",
        "return weighted_sum(tensor, kept, normalize)",
        "return weighted_sum(tensor, kept, True)",
    ),
    ("jft/merge/magnitude.py", "least=int(at_least_one)", "least=0"),
    ("jft/merge/trim.py", "before / jnp.where(small, 1, after)", "after / jnp.where(small, 1, before)"),
    ("jft/merge/trim.py", "kept / jnp.where(probability > 0, probability, 1)", "kept * probability"),
    ("jft/merge/trim.py", "jax.random.fold_in(tensor.key, i)", "tensor.key"),
    ("jft/merge/trim.py", "jnp.moveaxis(magnitudes, axis, -1)", "jnp.moveaxis(magnitudes, axis, axis)"),
    ("jft/merge/dare.py", "uniform(tensor) < probability", "uniform(tensor) > probability"),
    ("jft/merge/dare.py", "Pass(_magnitudes, _ranks)", "Pass(lambda tensor, **_: jnp.abs(tensor.deltas), _ranks)"),
    ("jft/merge/dare.py", '{"density": parameters["trim"]}', "parameters"),
    ("jft/merge/della.py", "* 2 * epsilon", "* epsilon"),
    ("jft/merge/della.py", "(ranks / (n - 1))", "(ranks / n)"),
    ("jft/merge/della.py", "return jnp.full_like(magnitudes, 0.5)", "return jnp.full_like(magnitudes, jnp.nan)"),
    ("jft/merge/breadcrumbs.py", "outliers + kept, entries", "kept, entries"),
    ("jft/merge/breadcrumbs.py", "np.minimum(outliers, entries - kept)", "outliers"),
    ("jft/merge/breadcrumbs.py", "tensor.deltas.ndim == 1", "tensor.deltas.ndim == 0"),
    ("jft/merge/ties.py", "jnp.argmax(jnp.abs(terms), axis=0)", "jnp.argmax(terms, axis=0)"),
    (
        "jft/merge/ties.py",
        "l1_matched(tensor.deltas, mask) if rescale",
        "l1_matched(tensor.deltas, mask) if not rescale",
    ),
]
WEIGHTS = [1.0, 0.5, -0.7]


# --- references, from the papers, in float64


def top(x, k):
    """The k entries of the largest magnitude, the first of equal ones, in row-major order."""
    mask = np.zeros(x.size, bool)
    mask[np.argsort(-np.abs(x).ravel(), kind="stable")[:k]] = True
    return mask.reshape(x.shape)


def l1(x, kept):
    return kept * np.abs(x).sum() / np.abs(kept).sum() if np.abs(kept).sum() > 1e-7 else kept


def keep_largest(xs, density, least=0, rescale=False):
    kept = [x * top(x, max(int(density * x.size), least)) for x in xs]
    kept = [l1(x, k) for x, k in zip(xs, kept, strict=True)] if rescale else kept
    return sum(w * k for w, k in zip(WEIGHTS, kept, strict=True))


def elect(xs, weights, divide, majority=None):
    """TIES after trimming: signs of plain sums where ``majority`` is the sign of zeros, else of weighted sums, zero plus."""
    weighted = [w * x for w, x in zip(weights, xs, strict=True)]
    sign = np.sign(sum(xs if majority is not None else weighted))
    sign[sign == 0] = 1 if majority is None else majority
    agree = [np.sign(x if majority is not None else v) == sign for x, v in zip(xs, weighted, strict=True)]
    total = sum(v * a for v, a in zip(weighted, agree, strict=True))
    if divide == "none":
        return total
    share = sum((1.0 if divide == "count" else w) * a for w, a in zip(weights, agree, strict=True))
    return total / np.where(share == 0, 1, share)


def draw(x, u, p, rescale):
    kept = np.where(u < p, x, 0)
    if rescale == "l1":
        return l1(x, kept)
    return kept / p if rescale == "probability" else kept


def magprune_probability(x, density, epsilon, axis):
    if axis is None or x.ndim < 2:
        ranks, n = np.argsort(np.argsort(np.abs(x).ravel(), kind="stable")).reshape(x.shape), x.size
    else:
        ranks, n = np.argsort(np.argsort(np.abs(x), axis, kind="stable"), axis), x.shape[axis]
    return np.full(x.shape, density) if n == 1 else density - epsilon + 2 * epsilon * ranks / (n - 1)


def middle(x, density, gamma, exact):
    outliers, kept = int(gamma * x.size), int(density * x.size)
    outliers = min(outliers, x.size - kept) if exact else outliers
    return x * (top(x, min(outliers + kept, x.size)) & ~top(x, outliers))


# --- against the references


@pytest.mark.parametrize("density", [0.0, 0.05, 0.4])
def test_magnitude(density):
    taus = vectors()
    assert_equal(magnitude(taus, WEIGHTS, density=density), each_tensor(keep_largest, taus, density=density))
    if density:
        expected = each_tensor(keep_largest, taus, density=density, least=1, rescale=True)
        assert_equal(magnitude(taus, WEIGHTS, density=density, rescale=True, preset="mergekit"), expected)


def test_magnitude_of_the_whole_model():
    tau = vectors(1, distinct=True)
    x = flat(tau[0])
    expected = np.where(np.abs(x) >= np.sort(np.abs(x))[len(x) - int(0.3 * len(x)) - 1], x, 0)
    np.testing.assert_allclose(flat(magnitude(tau, density=0.3, scope="model")), expected, atol=5e-7)


def test_normalize():
    taus = vectors()
    assert_close(magnitude(taus, WEIGHTS, normalize=True), magnitude(taus, WEIGHTS) / 0.8)
    # Weights that sum to zero, up to rounding, are no divisor.
    weights = [0.1, 0.2, -0.3]
    assert_close(dare(taus, weights, normalize=True), dare(taus, weights))


@pytest.mark.parametrize("rescale", ["probability", "l1", "none"])
def test_dare(rescale):
    taus, density, u = vectors(), [0.3, 0.6, 0.9], uniforms(vectors())
    expected = {}
    for name, x in split(taus[0]).items():
        xs = [x, split(taus[1])[name], split(taus[2])[name]]
        expected[name] = sum(WEIGHTS[i] * draw(xs[i], u[name][i], density[i], rescale) for i in range(3))
    assert_equal(dare(taus, WEIGHTS, density=density, rescale=rescale), expected)


def test_dare_is_unbiased():
    """Each entry stays with its probability; models, layers and seeds have masks of their own."""
    shapes = {"layers/w": (2, 3000)}
    ones = [TaskVector({path: Dense(jnp.ones(shape)) for path, shape in shapes.items()}) for _ in range(2)]
    draws = [
        np.asarray(dare(ones, w, density=0.3, seed=s)["layers/w"].dense()) for w in ([1, 0], [0, 1]) for s in (0, 1)
    ]
    rows = np.concatenate(draws)
    assert np.all(np.abs(rows.mean(1) - 1) < 5 * np.sqrt(0.7 / 0.3 / 3000))
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.1


def test_masks_are_the_same_on_eight_devices():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("x",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    one = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    result = []
    for x in (jnp.asarray(one), jax.device_put(one, spread)):
        tau = TaskVector({"a": Dense(x)})
        result.append([rule([tau], density=0.5, rescale="none")["a"].dense() for rule in (dare, della_linear)])
    assert result[1][0].sharding.is_equivalent_to(spread, 2)
    np.testing.assert_array_equal(result[0], result[1])


def test_dare_ties_trims_the_whole_model():
    taus, u = vectors(), uniforms(vectors())
    dropped = [{n: draw(x, u[n][i], 0.5, "probability") for n, x in split(t).items()} for i, t in enumerate(taus)]
    whole = [np.concatenate([x.ravel() for x in d.values()]) for d in dropped]
    trimmed = [np.where(np.abs(x) >= np.sort(np.abs(x))[len(x) - int(0.2 * len(x)) - 1], x, 0) for x in whole]
    signs = np.sign(sum(trimmed)).sum()
    for preset, divide in (("paper", "count"), ("fusionbench", "none")):
        expected = elect(trimmed, WEIGHTS, divide, majority=np.sign(signs))
        result = flat(dare_ties(taus, WEIGHTS, density=0.5, preset=preset))
        np.testing.assert_allclose(result, expected, atol=2e-6)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_magprune(axis):
    shapes = {"a": (6, 9), "column": (6, 1), "b": (5,)}
    taus = vectors(shapes=shapes, distinct=True)
    u = uniforms(taus)
    pruned = []
    for i, tau in enumerate(taus):
        p = {n: magprune_probability(x, 0.6, 0.3, axis) for n, x in split(tau).items()}
        pruned.append({n: draw(x, u[n][i], p[n], "probability") for n, x in split(tau).items()})
    options = {"density": 0.6, "epsilon": 0.3, "axis": axis}
    expected = {n: sum(w * p[n] for w, p in zip(WEIGHTS, pruned, strict=True)) for n in shapes}
    assert_equal(della_linear(taus, WEIGHTS, **options), expected, atol=2e-6)
    if axis == 0:
        expected = {n: elect([p[n] for p in pruned], [1] * 3, "count") for n in shapes}
        assert_equal(della(taus, **options), expected, atol=2e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_breadcrumbs(exact):
    taus = vectors()
    for density, gamma in ((0.3, 0.1), (0.9, 0.25)):
        options = {"density": density, "gamma": gamma, "exact_density": exact}
        add = lambda xs, d=density, g=gamma: sum(w * middle(x, d, g, exact) for w, x in zip(WEIGHTS, xs, strict=True))
        assert_equal(breadcrumbs(taus, WEIGHTS, **options), each_tensor(add, taus))
        vote = lambda xs, d=density, g=gamma: elect([middle(x, d, g, exact) for x in xs], WEIGHTS, "none")
        assert_equal(breadcrumbs_ties(taus, WEIGHTS, **options), each_tensor(vote, taus))


@pytest.mark.parametrize("axis", [0, -1])
def test_breadcrumbs_by_row(axis):
    """The released code's: a top-k along one axis; vectors are one row, scalars stay."""
    tau = vectors(1, shapes={"a": (6, 9), "b": (5,), "scalar": ()})

    def rows(xs):
        one = lambda x: middle(x, 0.35, 0.2, False)
        return xs[0] if xs[0].ndim == 0 else np.apply_along_axis(one, axis if xs[0].ndim > 1 else 0, xs[0])

    assert_equal(breadcrumbs(tau, density=0.35, gamma=0.2, axis=axis), each_tensor(rows, tau))


def test_breadcrumbs_of_the_whole_model():
    tau = vectors(1, distinct=True)
    expected = middle(flat(tau[0]), 0.3, 0.1, False)
    np.testing.assert_allclose(flat(breadcrumbs(tau, density=0.3, gamma=0.1, axis="model")), expected, atol=5e-7)


def test_ties_rescaled():
    def merged(xs):
        kept = [l1(x, x * top(x, max(int(0.3 * x.size), 1))) for x in xs]
        return elect(kept, WEIGHTS, "weights")

    taus = vectors()
    assert_equal(
        ties(taus, WEIGHTS, density=0.3, rescale=True, preset="mergekit"), each_tensor(merged, taus), atol=2e-6
    )


def test_ties_of_the_largest():
    taus = vectors(distinct=True)
    x = np.stack([flat(t) for t in taus])
    agree = np.sign(x) == np.sign(x.sum(0))
    expected = np.take_along_axis(x, np.argmax(np.abs(x) * agree, axis=0)[None], 0)[0]
    np.testing.assert_allclose(flat(ties(taus, density=1.0, divide="max")), expected, atol=5e-7)


# --- laws

UNTRIMMED = {
    "magnitude": {},
    "dare": {},
    "della_linear": {},
    "breadcrumbs": {"preset": "mergekit"},
}


@pytest.mark.parametrize("name", UNTRIMMED)
def test_density_one_is_task_arithmetic(name):
    taus = vectors()
    merged = RULES[name](taus, WEIGHTS, density=1.0, **UNTRIMMED[name])
    assert_close(merged, task_arithmetic(taus, WEIGHTS))


@pytest.mark.parametrize("rule", [magnitude, dare, della_linear, breadcrumbs])
def test_linear_in_the_weights(rule):
    """Without signs to elect, a merge is the weighted sum of what is left of each vector."""
    taus = vectors()
    alone = [rule(taus, list(one), density=0.5) for one in np.eye(3)]
    assert_close(rule(taus, WEIGHTS, density=0.5), task_arithmetic(alone, WEIGHTS), atol=5e-6)


def test_trimming_twice_is_trimming_once():
    tau = vectors(1)[0]
    nothing = 0.0 * tau
    once = magnitude([tau, nothing, nothing], density=0.4)
    assert_close(magnitude([once, nothing, nothing], density=0.4), once, atol=0)
    # Where no outlier is removed, breadcrumbs are the largest entries.
    assert_close(breadcrumbs([tau, nothing, nothing], density=0.4, gamma=0.0), once, atol=0)


@pytest.mark.parametrize("rule", [magnitude, breadcrumbs, breadcrumbs_ties])
def test_order_does_not_matter(rule):
    taus = vectors()
    options = {"density": 0.4}
    assert_close(rule(taus, WEIGHTS, **options), rule(taus[::-1], WEIGHTS[::-1], **options))


@pytest.mark.parametrize("rule", [magnitude, dare, dare_ties, della, della_linear, breadcrumbs])
def test_scale_of_the_deltas(rule):
    # Without sums of exactly zero, whose sign some presets take for plus.
    taus = vectors(distinct=True)
    assert_close(rule([-2 * tau for tau in taus], density=0.5), -2 * rule(taus, density=0.5), atol=5e-6)


@pytest.mark.parametrize("rule", [magnitude, dare, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties])
def test_odd_shapes(rule):
    """Scalars, columns, and a model that changes nothing: finite, and zero where all deltas are."""
    taus = vectors(2, shapes=ODD)
    nothing = 0.0 * taus[0]
    assert np.all(np.isfinite(flat(rule([taus[0], nothing], density=0.5))))
    assert not np.any(flat(rule([nothing, nothing], density=0.5)))


@pytest.mark.parametrize("name", ["magnitude", "dare", "dare_ties", "della", "della_linear", "breadcrumbs"])
def test_presets_differ(name):
    rule, taus = RULES[name], vectors(distinct=True)
    same = {("dare", "paper", "peft"), ("dare", "paper", "fusionbench"), ("dare", "peft", "fusionbench")}
    shared = {"density": 0.6} | ({"epsilon": 0.2} if name.startswith("della") else {})
    if name == "magnitude":
        # peft keeps nothing of a tensor where mergekit keeps one entry.
        shared = {"density": 0.05}
    of = {preset: flat(rule(taus, WEIGHTS, preset=preset, **shared)) for preset in rule.presets}
    for a in of:
        for b in list(of)[list(of).index(a) + 1 :]:
            difference = np.linalg.norm(of[a] - of[b]) / np.linalg.norm(of[a])
            assert difference == 0 if (name, a, b) in same else difference > 0.01, (a, b)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (dare, {"density": -0.1}),
        (dare, {"rescale": "L1"}),
        (dare_ties, {"trim": 2.0}),
        (della, {"density": 0.9, "epsilon": 0.2}),
        (breadcrumbs, {"axis": "row"}),
        (breadcrumbs, {"axis": 2}),
        (breadcrumbs, {"gamma": 1.5}),
        (della, {"axis": 2}),
        (ties, {"divide": "mean"}),
    ],
)
def test_wrong_options(rule, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rule(vectors(), **options)


# --- against other libraries


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mergekit(kind, tmp_path, monkeypatch):
    """All of mergekit's generalized task arithmetic, with our random numbers in the place of its own."""
    base, tuned = peers.models(tmp_path, kind)
    params, taus = peers.vectors(base, tuned)
    peers.known_masks(monkeypatch, taus)
    weights = [0.6, -0.4, 0.3]
    cases = [
        ("dare_linear", dare, {"density": [0.1, 0.5, 1.0]}, {}, {}),
        ("dare_ties", dare_ties, {"density": [0.3, 0.5, 0.9]}, {"normalize": True}, {"divide": "weights"}),
        ("della_linear", della_linear, {"density": [0.4, 0.5, 1.0], "epsilon": [0.1, 0.4, 0.3]}, {}, {}),
        ("della", della, {"density": [0.4, 0.5, 0.7], "epsilon": [0.1, 0.4, 0.25]}, {}, {}),
        ("breadcrumbs", breadcrumbs, {"density": [0.4, 0.9, 1.0], "gamma": [0.01, 0.2, 0.1]}, {}, {}),
        ("breadcrumbs_ties", breadcrumbs_ties, {"density": [0.4, 0.9, 1.0], "gamma": [0.01, 0.2, 0.1]}, {}, {}),
        ("ties", ties, {"density": [0.3, 0.001, 1.0]}, {"normalize": False}, {"divide": "none"}),
        ("ties", ties, {"density": [0.3, 0.2, 1.0]}, {"rescale": True}, {"rescale": True}),
    ]
    for i, (name, rule, options, parameters, ours) in enumerate(cases):
        each = [{"weight": w} | {k: v[j] for k, v in options.items()} for j, w in enumerate(weights)]
        expected = peers.mergekit(name, base, tuned, tmp_path / f"out{i}", parameters, each)
        merged = rule(taus, weights, preset="mergekit", **options, **ours)
        assert peers.largest_difference(params, merged, expected) <= 5e-7, name


@pytest.mark.peers
def test_peft(monkeypatch):
    import torch
    from peft.utils import merge_utils as theirs

    taus, weights = vectors(shapes={"a": (7, 13)}, distinct=True), [0.6, 0.4, 0.3]
    x = [torch.tensor(np.asarray(tau["a"].dense())) for tau in taus]
    u = uniforms(taus)["a"]
    for rule, function in (
        (magnitude, theirs.magnitude_prune),
        (dare, theirs.dare_linear),
        (dare_ties, theirs.dare_ties),
    ):
        left = [torch.tensor(one) for one in u]
        monkeypatch.setattr(torch, "bernoulli", lambda p, left=left: (left.pop(0) < p).to(p.dtype))
        expected = function(x, torch.tensor(weights), 0.6).numpy()
        merged = rule(taus, weights, density=0.6, preset="peft")
        np.testing.assert_allclose(merged["a"].dense(), expected, atol=5e-7)


@pytest.mark.peers
def test_fusionbench(monkeypatch):
    import torch

    drop = peers.fusionbench("method.dare.utils").module_random_drop_
    merging = peers.fusionbench("method.ties_merging.ties_merging_utils").ties_merging
    taus = vectors(distinct=True)
    numbers = uniforms(taus)
    dropped = []
    for i, tau in enumerate(taus):
        left = [torch.tensor(numbers[name][i]) for name in split(tau)]
        # They keep what is above the fraction to be dropped, we what is below the fraction to be kept.
        monkeypatch.setattr(torch, "rand_like", lambda _, left=left: 1 - left.pop(0))
        tensors = {name: torch.tensor(x, dtype=torch.float32) for name, x in split(tau).items()}
        drop(tensors, 0.5, True)
        dropped.append(torch.cat([x.reshape(-1) for x in tensors.values()]))
    result = dare(taus, preset="fusionbench")
    np.testing.assert_allclose(flat(result), torch.stack(dropped).sum(0).numpy(), atol=5e-7)
    expected = merging(torch.stack(dropped), 20, "sum").numpy()
    np.testing.assert_allclose(flat(dare_ties(taus, preset="fusionbench")), expected, atol=5e-7)
    x = torch.tensor(np.stack([flat(tau) for tau in taus]), dtype=torch.float32)
    np.testing.assert_allclose(flat(ties(taus, divide="max")), merging(x, 20, "max").numpy(), atol=5e-7)
