"""Pruning-aware tuning: operators and one shared mask, and the smaller model that comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jft
from jft import tree
from jft.dot import take, transpose
from jft.methods.width import prune_width
from jft.models import DecoderConfig, Model
from jft.presets.pat import ChannelBudget, Sparsified, open_channels, tie
from tests.methods import leaf

KEY = jax.random.key(5)
HOW = Sparsified(rank=2, identity=0.3)


def model(**options):
    base = {"vocab": 31, "width": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "hidden": 40}
    return Model(DecoderConfig(**base | options))


def by_hand(trained, _=None):
    a, b, m, s = (trained[n] for n in ("a", "b", "mask", "scale"))
    there = (m >= 0).astype(np.float64)
    moved = leaf.W + leaf.W @ a @ b
    w = moved * (there * s)[:, None, :]
    dw = leaf.loss_and_grad(w)[1]
    inner = dw * (there * s)[:, None, :]
    sums = (dw * moved).sum(1)
    gram = np.swapaxes(a, 1, 2) @ a - np.eye(2)
    identity = 0.3 * 2 * 2 * a @ gram / 4
    transposed = lambda x: np.swapaxes(x, 1, 2)
    return w, {
        "a": transposed(leaf.W) @ inner @ transposed(b) + identity,
        "b": transposed(leaf.W @ a) @ inner,
        "mask": sums * s,
        "scale": sums * there,
    }


def test_forward_gradients_and_steps():
    kept, trained = HOW.init(KEY, leaf.w32())
    np.testing.assert_array_equal(HOW.bind(kept, trained, False), leaf.w32())
    trained = leaf.moved(trained, by=0.4)
    assert not bool((trained["mask"] >= 0).all())
    w, gradient = by_hand(leaf.wide(trained))
    leaf.close(HOW.bind(kept, trained, False), w)
    leaf.check_gradient(HOW, kept, trained, gradient)
    leaf.check_steps(HOW, kept, trained, lambda t, _: by_hand(t)[1], rate=1e-3)
    leaf.check_transforms(HOW, kept, trained)
    np.testing.assert_allclose(HOW.encode(leaf.w32(), kept, trained).dense(), w - leaf.W, atol=1e-5)


def test_tables_and_transposes():
    kept, trained = HOW.init(KEY, leaf.w32())
    trained = leaf.moved(trained, by=0.4)
    ids = np.asarray([[7, 0], [3, 3]])

    @jax.jit
    def results(kept, trained):
        one = jax.tree.map(lambda x: x[1], HOW.bind(kept, trained, True))
        return take(one, ids, jnp.float32), transpose(one), HOW.bind(kept, trained, False)[1]

    taken, transposed, flat = (np.asarray(x) for x in results(kept, trained))
    np.testing.assert_allclose(taken, flat[ids], atol=1e-5)
    np.testing.assert_allclose(transposed, flat.T, atol=1e-5)


def test_budget_against_numpy():
    m = np.array([0.3, -0.2, 0.6, 0.1, -0.9, 0.4])
    trained = {"x": {"mask": jnp.asarray([m, m], jnp.float32)}}
    penalty = ChannelBudget(0.5)
    value, gradient = jax.jit(jax.value_and_grad(lambda t: penalty(None, None, t)))(trained)
    on = m >= 0
    expected = 10 * abs(4 / 3 - 1) + ((m[on] - 0.5) ** 2).mean() + ((m[~on] + 0.5) ** 2).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    spread = np.where(on, 2 * (m - 0.5) / 4, 2 * (m + 0.5) / 2)
    np.testing.assert_allclose(gradient["x"]["mask"], [10 / 3 + spread, 0 * m], rtol=1e-5)
    at_count = jax.jit(jax.grad(lambda t: ChannelBudget(4 / 6, spread=0.0)(None, None, t)))(trained)
    np.testing.assert_array_equal(at_count["x"]["mask"], 0)


def test_tied_gradients_are_that_of_one_shared_mask():
    g = {"x": {"mask": jnp.ones((2, 3)), "a": 1}, "y": {"mask": jnp.asarray([1.0, 2.0, 3.0])}, "z": jnp.ones(2)}
    tied = tie(g)
    np.testing.assert_array_equal(tied["x"]["mask"], [[3, 4, 5]] * 2)
    np.testing.assert_array_equal(tied["y"]["mask"], [3, 4, 5])
    assert tied["x"]["a"] == 1 and tied["z"] is g["z"]


@pytest.mark.optimized
@pytest.mark.slow
def test_training_closes_the_channels_asked_for_and_they_come_out_without_a_trace():
    net = model()
    params = net.init(KEY)
    plan = jft.method("pat", fraction=0.75, rank=4).plan(params, net)
    kept, trained = jax.jit(plan.init)(KEY, params)
    tokens = np.random.default_rng(0).integers(0, 31, (4, 12)).astype(np.int32)
    transform = optax.adam(1e-2)

    def loss(t):
        logits = net.apply(plan.bind(kept, t), tokens)
        fit = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()
        return fit + plan.penalty(kept, t)

    @jax.jit
    def step(t, state):
        updates, state = transform.update(tie(jax.grad(loss)(t)), state, t)
        return optax.apply_updates(t, updates), state

    state = jax.jit(transform.init)(trained)
    for _ in range(300):
        trained, state = step(trained, state)
    masks = [np.asarray(t["mask"]).reshape(-1, 24) for t in trained.values()]
    assert all((m == masks[0][0]).all() for m in masks)
    keep = open_channels(trained)
    assert abs(len(keep) - 18) <= 2
    merged = plan.merged(params, kept, trained)
    small, fewer = prune_width(net, merged, keep)
    assert small.config.width == len(keep)
    assert shapes(fewer) == shapes(jax.eval_shape(small.init, KEY))
    assert tree.count(fewer) < 0.85 * tree.count(params)
    found, expected = jax.jit(small.apply)(fewer, tokens), jax.jit(net.apply)(merged, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def shapes(params):
    return jax.tree.map(lambda x: x.shape, params)


def emptied(net, keep):
    """Parameters of ``net`` whose other channels are zero in all that writes to the residual stream."""
    closed = np.setdiff1d(np.arange(net.config.width), keep)
    writes = ("table", "o/w", "down/w", "o/b", "down/b")
    rng = np.random.default_rng(0)

    def moved(path, x):
        x = np.asarray(x) + 0.15 * rng.normal(size=x.shape).astype(np.float32)
        if path.endswith(writes):
            x[..., closed] = 0
        return jnp.asarray(x)

    return tree.map_with_path(moved, net.init(KEY))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True, "embed_scale": True, "norm_offset": 1.0, "norm_place": "both"},
        {"embed_scale": True, "qk_norm": "head", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"norm_place": "post", "parallel": True},
        {"experts": jft.models.moe.Experts(3, 2, 16)},
    ],
    ids=["llama", "gemma", "biases", "post-norm", "experts"],
)
def test_empty_channels_come_out_without_a_trace(options):
    net = model(**options)
    keep = jnp.asarray([1, 2, 5, 7, 8, 11, 13, 14, 20, 23])
    params = emptied(net, keep)
    small, fewer = prune_width(net, params, keep)
    assert shapes(fewer) == shapes(jax.eval_shape(small.init, KEY))
    tokens = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)
    found, expected = jax.jit(small.apply)(fewer, tokens), jax.jit(net.apply)(params, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune_width(model(norm="layer"), {}, [0]), "subtracts the mean"),
        (lambda: prune_width(model(), {}, [0, 0]), "distinct integers in 0..23"),
        (lambda: prune_width(model(), {}, [24]), "distinct integers in 0..23"),
        (lambda: prune_width(Model(jft.models.ClipConfig), {}, [0]), "only decoders"),
        (lambda: ChannelBudget(0.0), "that of the channels that stay"),
        (lambda: Sparsified(0).init(KEY, leaf.w32()), "no operator of rank 0"),
        (lambda: tie({"x": jnp.ones(2)}), "goes with train=Sparsified"),
    ],
)
def test_wrong_uses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
