"""Diff pruning: gates of entries and of matrices against their formulas, and the projection to a budget."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import delta, tree
from jft.methods import InPlace, Method, Select
from jft.models import core
from jft.presets.diff_pruning import HardConcrete, Projection, project, projected
from tests.methods import leaf, learning, toy

MUTATIONS = (
    ("jft/presets/diff_pruning.py", "math.log(-self.lower / self.upper)", "math.log(-self.upper / self.lower)"),
    (
        "jft/presets/diff_pruning.py",
        "self.weight * jnp.sum(likely * append_axes(shared, likely.ndim))",
        "self.weight * jnp.sum(likely)",
    ),
    ("jft/presets/diff_pruning.py", "delta.Leaf(decays=False, origin=None, rate", "delta.Leaf(origin=None, rate"),
    ("jft/presets/diff_pruning.py", "alpha_rate: float = 1e4,\n", "alpha_rate: float = 1e3,\n"),
    ("jft/presets/diff_pruning.py", "top({p: jnp.abs(x) for", "top({p: x for"),
    (
        "jft/presets/diff_pruning.py",
        "    density: float = 0.005,\n    project_at",
        "    density: float = 0.01,\n    project_at",
    ),
)
KEY = jax.random.key(4)
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def uniforms(how, key):
    """u of entries and of groups, layer by layer, as drawn."""
    if key is None:
        return np.full((leaf.L, leaf.I, leaf.O), 0.5), np.full(leaf.L, 0.5)
    return leaf.wide(_drawn(key))


@jax.jit
def _drawn(key):
    pairs = [jax.random.split(k) for k in jax.random.split(key, leaf.L)]
    own = jnp.stack([jax.random.uniform(a, (leaf.I, leaf.O)) for a, _ in pairs])
    shared = jnp.stack([jax.random.uniform(b, ()) for _, b in pairs])
    return jnp.clip(own, 1e-4, 1 - 1e-4), jnp.clip(shared, 1e-4, 1 - 1e-4)


def concrete(how, alpha, u):
    """z and its derivative in alpha."""
    s = sigmoid(np.log(u) - np.log(1 - u) + alpha)
    stretched = s * (how.upper - how.lower) + how.lower
    inside = (stretched > 0) & (stretched < 1)
    return np.clip(stretched, 0, 1), inside * (how.upper - how.lower) * s * (1 - s)


def hard_concrete(how, trained, key):
    """The weight and the gradient of loss and penalty, as in the paper's appendix."""
    own, shared = uniforms(how, key)
    z, dz = concrete(how, trained["alpha"], own)
    g, dg = concrete(how, trained["group"], shared) if how.group else (np.ones(leaf.L), np.zeros(leaf.L))
    g, dg = g[:, None, None], dg[:, None, None]
    w = leaf.W + z * g * trained["delta"]
    dw = leaf.loss_and_grad(w)[1]
    shift = math.log(-how.lower / how.upper)
    open_own = sigmoid(trained["alpha"] - shift)
    open_group = sigmoid(trained["group"] - shift)[:, None, None] if how.group else 1.0
    factor, count = (open_group, open_own.sum((1, 2))) if how.counted == "product" else (1.0, np.ones(leaf.L))
    gradient = {
        "delta": dw * z * g,
        "alpha": dw * trained["delta"] * g * dz + how.weight * open_own * (1 - open_own) * factor,
    }
    if how.group:
        closing = how.weight * (open_group * (1 - open_group))[:, 0, 0] * count
        gradient["group"] = (dw * trained["delta"] * z * dg).sum((1, 2)) + closing
    penalty = how.weight * (
        (open_own * open_group).sum() if how.counted == "product" else open_own.sum() + np.sum(open_group)
    )
    return w, gradient, penalty


PRUNING = [
    HardConcrete(weight=0.1, init_alpha=0.3, alpha_rate=3.0),
    HardConcrete(weight=0.1, init_alpha=0.3, counted="sum", lower=-0.5, upper=1.2, alpha_rate=1.0),
    HardConcrete(weight=0.1, init_alpha=0.3, group=False, alpha_rate=1.0),
]


@pytest.mark.parametrize("how", PRUNING, ids=["product", "sum", "no group"])
def test_hard_concrete(how):
    kept, trained = how.init(KEY, leaf.w32())
    np.testing.assert_array_equal(leaf.bound(how, kept, trained, KEY), leaf.W32)
    trained = leaf.moved(trained)
    for key in (KEY, None):
        w, gradient, penalty = hard_concrete(how, leaf.wide(trained), key)
        leaf.close(leaf.bound(how, kept, trained, key), w)
        leaf.check_gradient(how, kept, trained, gradient, key)
    np.testing.assert_allclose(jax.jit(how.penalty)(kept, trained), penalty, rtol=1e-5)
    np.testing.assert_allclose(leaf.W + how.encode(leaf.w32(), kept, trained).dense(), w, atol=1e-6)
    few = trained | {"alpha": jnp.full_like(trained["alpha"], -20.0).at[1, 2, 3].set(20.0)}
    few |= {"group": jnp.full(leaf.L, 20.0)} if how.group else {}
    encoded = how.encode(leaf.w32(), kept, few)
    assert isinstance(encoded, delta.Entries) and encoded.nnz == 1


def test_hard_concrete_steps_and_transformations():
    how = PRUNING[0]
    kept, trained = how.init(KEY, leaf.w32())
    trained = leaf.moved(trained)
    leaf.check_steps(
        how, kept, trained, lambda t, k: hard_concrete(how, t, k)[1], keys=jax.random.split(KEY, 3), rate=1e-3
    )
    leaf.check_transforms(how, kept, trained, KEY)


@pytest.mark.optimized
def test_noise_of_all_layers_never_exists_at_once():
    how, layers, width = HardConcrete(), 48, 64
    kept, trained = how.init(KEY, jnp.ones((layers, width, width)))

    def loss(t, k, structured):
        body = lambda h, w: (jnp.tanh(core.dot(h, w)), None)
        return jnp.sum(jax.lax.scan(body, jnp.ones((2, width)), how.bind(k, t, structured, KEY))[0])

    tapped = leaf.largest_buffer(jax.grad(lambda t, k: loss(t, k, True)), trained, kept)
    plain = leaf.largest_buffer(jax.grad(lambda t, k: loss(t, k, False)), trained, kept)
    assert tapped < 0.5 * layers * width * width * 4 < plain


def test_groups_follow_the_leading_axes():
    vectors = jnp.zeros((3, 7))
    assert HardConcrete().init(KEY, vectors)[1]["group"].shape == ()
    assert HardConcrete().fitted(lead=1).init(KEY, vectors)[1]["group"].shape == (3,)
    kept, trained = HardConcrete().fitted(lead=1).init(KEY, vectors)
    assert HardConcrete().fitted(lead=1).bind(kept, trained, False, KEY).shape == (3, 7)


def planned(train, **select):
    model = toy.model(layers=3)
    params = model.init(KEY)
    plan = Method(Select(**select), train).plan(params, model)
    return params, plan, *plan.init(KEY, params)


def test_projection_keeps_exactly_the_budget_over_all_weights():
    params, plan, kept, trained = planned(HardConcrete(), include=("up/w", "down/w"))
    trained = leaf.moved(trained, by=2.0)
    support = project(plan, kept, trained, 0.1)
    gate = lambda alpha: np.clip(sigmoid(alpha) * 3.0 - 1.5, 0, 1)
    moved = {p: gate(t["alpha"]) * gate(t["group"])[:, None, None] * t["delta"] for p, t in leaf.wide(trained).items()}
    flat = np.concatenate([np.abs(x).ravel() for x in moved.values()])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[: round(0.1 * flat.size)]] = True
    np.testing.assert_array_equal(np.concatenate([np.asarray(x).ravel() for x in support.values()]), chosen)
    base = tree.flatten(params)
    for path, w in projected(plan, base, trained, support).items():
        np.testing.assert_allclose(w - base[path], np.where(support[path], moved[path], 0), atol=1e-6)


def test_defaults_are_those_of_the_paper_and_its_code():
    """Guo et al. 2021: 0.5 %; their script: lower -1.5, upper 1.5, penalty 1.25e-7, alpha from 5, rates 0.1 and 1e-5."""
    method = jft.method("diff_pruning")
    assert method.schedule == Projection(0.005, 0.5)
    expected = HardConcrete(1.25e-7, -1.5, 1.5, 5.0, True, "product", 0.1 / 1e-5)
    assert dataclasses.asdict(method.train) == pytest.approx(dataclasses.asdict(expected))


def test_it_learns_and_decay_leaves_the_gates_alone():
    learning.check(jft.method("diff_pruning", alpha_rate=10.0), 1e-2, learning.ALL)
    moved = learning.moved_by_decay(jft.method("diff_pruning"))["layers/up/w"]
    assert moved == {"delta": True, "alpha": False, "group": False}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardConcrete(lower=0.1), "lower < 0 and upper > 1"),
        (lambda: HardConcrete(counted="mean"), "product or sum"),
        (lambda: project(*planned(InPlace())[1:], 0.1), "no weight here has a gated change"),
        (lambda: project(*planned(HardConcrete())[1:], 0.0), "fraction of entries that stay"),
        (lambda: Projection(at=1.0), "after a share 1.0 of the steps"),
    ],
)
def test_wrong_uses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
