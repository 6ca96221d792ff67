"""TIES under its four names: against a reference from the paper, against mergekit, peft and FusionBench, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import Dense, Entries, TaskVector
from jft.merge.breadcrumbs import breadcrumbs
from jft.merge.emr import emr
from jft.merge.ties import ties
from tests.merge import peers

MUTATIONS = [
    ("jft/merge/support.py", "- np.searchsorted(tensor, tensor)", ""),
    ("jft/merge/support.py", "2 * math.prod(result.compact) <=", "math.prod(result.compact) >"),
    ("jft/merge/in_memory.py", "if k <= n else 0.0", "if k <= n else math.inf"),
    ("jft/merge/ties.py", "np.minimum(kept + 1, entries)", "np.minimum(kept, entries)"),
    ("jft/merge/ties.py", "jnp.sign(tensor.passes[-1]) if zero", "-jnp.sign(tensor.passes[-1]) if zero"),
    ("jft/merge/ties.py", 'weights if divide == "weights" else 1.0, 0.0', "1.0, 0.0"),
    ("jft/merge/trim.py", "magnitudes >= _expanded", "magnitudes > _expanded"),
]
SHAPES = {"a": (7, 13), "b": (5,), "layers/w": (3, 4, 6), "layers/experts/w": (2, 2, 3, 4)}


def vectors(count=3, seed=0, shapes=SHAPES):
    """Task vectors whose deltas hold zeros and equal magnitudes."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: (rng.integers(-6, 7, shape) / 4).astype(np.float32)
    return [TaskVector({path: Dense(jnp.asarray(draw(shape))) for path, shape in shapes.items()}) for _ in range(count)]


def entries(tau, seed):
    """The vector with no more than a third of its entries, each path stored as entries or blocks."""
    rng = np.random.default_rng(seed)
    out = {}
    for path in tau:
        x = np.array(tau[path].dense()) * (rng.random(tau[path].shape) < 0.15)
        # One tensor of the stack is not changed at all.
        x[0] *= path == "a"
        out[path] = Entries.from_dense(jnp.asarray(x))
    return TaskVector(out)


RULES = [
    # Of the last model more entries are ranked than any model stores.
    (ties, {"density": [0.1, 0.2, 0.9]}),
    (ties, {"density": [0.05, 0.1, 0.9], "preset": "mergekit", "weights": [1.0, -0.5, 0.3]}),
    (breadcrumbs, {"density": 0.08, "gamma": 0.03}),
    (emr, {}),
]
STACKED = {path: SHAPES[path] for path in ("a", "layers/experts/w")}


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_entries_stay_entries(rule, options):
    """What is merged where the models have entries is what is merged of dense deltas, bit for bit, and is no larger."""
    sparse = [entries(tau, i) for i, tau in enumerate(vectors(seed=4, shapes=STACKED))]
    sparse[1] = sparse[1].exclude("^a$")
    dense = [TaskVector({p: Dense(d.dense()) for p, d in tau.items()}, tau.manifest) for tau in sparse]
    several = lambda x: x if isinstance(x, list) else [x]
    for merged, expected in zip(several(rule(sparse, **options)), several(rule(dense, **options)), strict=True):
        for path in STACKED:
            np.testing.assert_array_equal(merged[path].dense(), expected[path].dense(), err_msg=path)
            assert isinstance(merged[path], Entries)
            assert merged[path].values.size == np.count_nonzero(expected[path].dense())


def test_dense_deltas_and_traced_ones_are_merged_whole():
    shapes = {"a": SHAPES["a"]}
    sparse = [entries(tau, i) for i, tau in enumerate(vectors(2, shapes=shapes))]
    rule = functools.partial(ties, density=0.5, scope="tensor", zero="plus")
    assert isinstance(rule([sparse[0], vectors(1, shapes=shapes)[0]])["a"], Dense)
    traced = jax.jit(rule)(sparse)
    assert isinstance(traced["a"], Dense)
    # Weights may be traced: positions are known.
    learned = jax.jit(lambda w: rule(sparse, weights=w))(jnp.ones(2))
    assert isinstance(learned["a"], Entries)
    np.testing.assert_array_equal(traced["a"].dense(), rule(sparse)["a"].dense())
    np.testing.assert_array_equal(learned["a"].dense(), traced["a"].dense())


def flat(tau):
    return np.concatenate([np.asarray(tau[path].dense(), np.float64).ravel() for path in sorted(SHAPES)])


def paper(deltas, density, weights):
    """The paper's three steps on flat vectors, in float64; the count of the released code."""
    trimmed = []
    for delta in deltas:
        kth = np.sort(np.abs(delta))[len(delta) - int(density * len(delta)) - 1]
        trimmed.append(np.where(np.abs(delta) >= kth, delta, 0))
    sign = np.sign(sum(trimmed))
    sign[sign == 0] = np.sign(sign.sum())
    agree = [(np.sign(t) == sign) & (t != 0) for t in trimmed]
    total = sum(w * t * a for w, t, a in zip(weights, trimmed, agree, strict=True))
    return total / np.maximum(sum(a.astype(float) for a in agree), 1)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.75])
def test_paper(density):
    taus = vectors()
    merged = ties(taus, [1.0, 0.5, 2.0], density=density)
    np.testing.assert_allclose(flat(merged), paper([flat(t) for t in taus], density, [1.0, 0.5, 2.0]), atol=5e-7)


def test_defaults_are_the_papers():
    # "keep the top 20%": section 4; lambda = 1 where there is no validation set: section 5.
    assert ties.options["density"] == 0.2
    assert ties.options["divide"] == "count"


def test_layers_and_experts_are_tensors_of_their_own():
    """Trimmed by tensor, a stack gives what its layers and experts give one by one."""
    taus = vectors()
    merged = ties(taus, density=0.3, preset="mergekit")
    for path, stack in (("layers/w", 1), ("layers/experts/w", 2)):
        shape = SHAPES[path]
        for index in np.ndindex(*shape[:stack]):
            alone = [TaskVector({"w": Dense(tau[path].dense()[index])}) for tau in taus]
            one = ties(alone, density=0.3, preset="mergekit")["w"].dense()
            np.testing.assert_array_equal(merged[path].dense()[index], one)


def test_presets_differ():
    taus = vectors()
    of = {preset: flat(ties(taus, [1.0, 0.4, 0.6], density=0.3, preset=preset)) for preset in ties.presets}
    for a in of:
        for b in of:
            if a < b:
                assert np.linalg.norm(of[a] - of[b]) > 0.05 * np.linalg.norm(of[b]), (a, b)


def test_order_does_not_matter():
    taus = vectors()
    np.testing.assert_allclose(flat(ties(taus)), flat(ties(taus[::-1])), atol=1e-6)


def test_equal_models_with_weights():
    """By the sum of its weights a vector is its own mean; by the count it is not."""
    tau, weights = vectors(1)[0], [1.0, 0.5, 2.0]
    np.testing.assert_allclose(flat(ties([tau] * 3, weights, preset="mergekit")), flat(tau), atol=5e-7)
    merged = flat(ties([tau] * 3, weights, preset="mergekit", divide="count"))
    np.testing.assert_allclose(merged, flat(tau) * 3.5 / 3, atol=5e-7)


@pytest.mark.parametrize(
    "options", [{"density": 1.5}, {"preset": "merge-kit"}, {"densty": 0.1}, {"density": [0.1, 0.2]}]
)
def test_wrong_options(options):
    with pytest.raises(ValueError, match=r"density|merge-kit|densty"):
        ties(vectors(), **options)


@pytest.mark.peers
@pytest.mark.parametrize("kind", peers.KINDS)
def test_mergekit(kind, tmp_path):
    base, tuned = peers.models(tmp_path, kind)
    params, taus = peers.vectors(base, tuned)
    for i, (weights, density) in enumerate([([1.0, 1.0, 1.0], [0.3] * 3), ([0.6, -0.4, 0.3], [0.001, 0.5, 1.0])]):
        each = [{"weight": w, "density": d} for w, d in zip(weights, density, strict=True)]
        expected = peers.mergekit("ties", base, tuned, tmp_path / f"out{i}", each=each)
        merged = ties(taus, weights, density=density, preset="mergekit")
        assert peers.largest_difference(params, merged, expected) <= 5e-7


@pytest.mark.peers
def test_peft():
    import torch
    from peft.utils.merge_utils import ties as theirs

    taus, weights = vectors(), [0.6, 0.4, 0.3]
    for path in ("a", "b"):
        x = [torch.tensor(np.asarray(tau[path].dense())) for tau in taus]
        # Of equal magnitudes torch's top-k takes any; 1e-4 of the rank of an entry makes them differ.
        order = [1e-4 * torch.arange(t.numel()).reshape(t.shape) * t.sign() for t in x]
        x = [t + o for t, o in zip(x, order, strict=True)]
        distinct = [TaskVector({path: Dense(jnp.asarray(t.numpy()))}) for t in x]
        merged = ties(distinct, weights, density=0.75, preset="peft")
        expected = theirs(x, torch.tensor(weights), 0.75).numpy()
        np.testing.assert_allclose(merged[path].dense(), expected, atol=5e-7)


@pytest.mark.peers
@pytest.mark.parametrize(("preset", "name"), [("fusionbench", "sum"), ("paper", "dis-mean")])
def test_fusionbench(preset, name):
    import torch

    merging = peers.fusionbench("method.ties_merging.ties_merging_utils")
    taus = vectors()
    x = torch.tensor(np.stack([flat(tau) for tau in taus]), dtype=torch.float32)
    expected = merging.ties_merging(x, 20, name).numpy()
    np.testing.assert_allclose(flat(ties(taus, preset=preset)), expected, atol=5e-7)
