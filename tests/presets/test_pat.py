"""Pruning-aware tuning: operators and one shared mask, and the smaller model that comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jft
from jft import tree
from jft.dot import take, transpose
from jft.methods import SomeLayers
from jft.methods.width import prune_width
from jft.models import DecoderConfig, Model
from jft.presets.pat import ChannelBudget, Hardening, Sparsified, open_channels, phase
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/presets/pat.py", "jnp.zeros(width, jnp.float32), ", "jnp.full(width, 0.5, jnp.float32), "),
    ("jft/presets/pat.py", 'shares = ("mask", "phase")', 'shares = ("phase",)'),
    ("jft/presets/pat.py", "jnp.maximum(0.5 - made / length, 0.0)", "jnp.maximum(0.5 - made / stop, 0.0)"),
    ("jft/presets/pat.py", "1 / (1 - spent + 1e-6)", "1 / (1 - spent / 2 + 1e-6)"),
    ("jft/presets/pat.py", "stop = jnp.floor(0.8 * length)", "stop = length"),
    ("jft/presets/pat.py", "if key is None else soft", ""),
    ("jft/presets/pat.py", "jnp.where(learns > 0, m, jax.lax.stop_gradient(m))", "m"),
    ("jft/presets/pat.py", "(..., COLUMNS), decays=False, matrices", "(..., COLUMNS), matrices"),
    ("jft/presets/pat.py", "    harden: float = 1 / 3,", "    harden: float = 1.0,"),
    ("jft/presets/pat.py", "above = (m > 0)", "above = (m >= 0)"),
    ("jft/methods/plan.py", "lender=None if p == lender else lender,", "lender=None,"),
)
KEY = jax.random.key(5)
HOW = Sparsified(rank=2, identity=0.3)
QUIET = {"progress": False, "every": 1}
TOKENS = np.random.default_rng(0).integers(0, 31, (4, 12)).astype(np.int32)


def model(**options):
    base = {"vocab": 31, "width": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "hidden": 40}
    return Model(DecoderConfig(**base | options))


def scalar(m, phase, final=False):
    """DimDownMask.scalar of the released code, and its derivative in m; ``final``: that of its inference_only."""
    temperature, bias, learns = phase
    if final and not learns:
        return (m >= 0).astype(np.float64), np.zeros_like(m)
    soft = 1 / (1 + np.exp(np.minimum(-temperature * m, 10)))
    return soft + bias, learns * temperature * soft * (1 - soft) * (-temperature * m < 10)


def by_hand(trained, final=False):
    a, b, m, s = (trained[n] for n in ("a", "b", "mask", "scale"))
    there, slope = scalar(m, trained["phase"], final)
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
        "mask": (sums * s).sum(0) * slope,
        "phase": np.zeros(3),
        "scale": sums * there,
    }


PHASES = {"first": (1.0, 0.5, 1.0), "soft": (3.0, 0.2, 1.0), "last": (40.0, 0.0, 0.0)}


@pytest.mark.parametrize("name", PHASES)
def test_forward_gradients_and_steps(name):
    kept, trained = HOW.init(KEY, leaf.w32())
    np.testing.assert_array_equal(leaf.bound(HOW, kept, trained), leaf.w32())
    trained = leaf.moved(trained, by=0.4) | {"phase": jnp.asarray(PHASES[name])}
    assert not bool((trained["mask"] >= 0).all())
    for key, final in ((KEY, False), (None, True)):
        w, gradient = by_hand(leaf.wide(trained), final)
        leaf.close(leaf.bound(HOW, kept, trained, key), w)
        leaf.check_gradient(HOW, kept, trained, gradient, key)
    np.testing.assert_allclose(jax.jit(HOW.encode)(leaf.w32(), kept, trained).value, w - leaf.W, atol=1e-5)
    if name == "soft":
        assert leaf.rates(HOW, trained)["phase"] == 0
        leaf.check_transforms(HOW, kept, trained, KEY)


def released(step, length):
    """``(temperature, bias, learns)`` of DimDownMask.step in the released code."""
    temperature = lambda at: 1 / (1 - np.log(max(1, at)) / np.log(length) + 1e-6)
    learns = step < int(0.8 * length)
    return temperature(step if learns else int(0.8 * length)), max(0.5 - step / length, 0), float(learns)


def test_the_mask_hardens_as_in_the_released_code():
    steps = np.asarray([0, 1, 2, 500, 4999, 5000, 7999, 8000, 9999, 10000, 30000], np.int32)
    found = jax.jit(jax.vmap(lambda t: phase(t, jnp.float32(10000.3))))(steps)
    np.testing.assert_allclose(found, [released(int(t), 10000) for t in steps], rtol=1e-4, atol=1e-7)
    assert jft.method("pat").rule == Hardening(10000 / 30000)
    rule = Hardening(0.5)
    trained, memory = {"x": {"mask": jnp.zeros(3)}, "y": {}}, rule.start(rule.init(None), 40)
    update = jax.jit(lambda t, m: rule.values(None, None, t, m))
    for step in range(1, 4):
        trained, memory = update(trained, memory)
        np.testing.assert_allclose(trained["x"]["phase"], released(step, 20), rtol=1e-5)


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
    m = np.array([0.3, -0.2, 0.6, 0.0, -0.9, 0.4])
    trained = {"x": {"mask": jnp.asarray(m, jnp.float32)}, "y": {}}
    penalty = ChannelBudget(0.5)
    value, gradient = jax.jit(jax.value_and_grad(lambda t: penalty(None, None, t)))(trained)
    on = m > 0
    expected = 10 * abs(4 / 3 - 1) + ((m[on] - 0.5) ** 2).mean() + ((m[~on] + 0.5) ** 2).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    spread = np.where(on, 2 * (m - 0.5) / 3, 2 * (m + 0.5) / 3)
    np.testing.assert_allclose(gradient["x"]["mask"], 10 / 3 + spread, rtol=1e-5)
    at_count = jax.jit(jax.grad(lambda t: ChannelBudget(4 / 6, spread=0.0)(None, None, t)))(trained)
    np.testing.assert_array_equal(at_count["x"]["mask"], 0)


def test_one_mask_is_counted_once_and_decay_leaves_it_alone():
    """The gradient norm of a step is that of one mask, whose gradient is the sum over the modules that it masks."""
    net = model(layers=1)
    params = net.init(KEY)
    method = jft.method("pat", rank=2)
    plan = method.plan(params, net)
    kept, start = jax.jit(plan.init)(KEY, params)
    assert [p for p, t in start.items() if "mask" in t] == ["embed/table"]

    def loss(t, masks):
        values = {p: plan.values(t, p) | {"mask": m} for p, m in masks.items()}
        bound = {p: plan.leaves[p].bind(kept[p], v, False, KEY) for p, v in values.items()}
        logits = net.apply(tree.unflatten(tree.flatten(params) | bound), TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean() + plan.penalty(
            kept, t
        )

    copies = dict.fromkeys(start, start["embed/table"]["mask"])
    gradient, each = jax.jit(jax.grad(loss, (0, 1)))(start, copies)
    held = gradient["embed/table"]
    gradient["embed/table"] = {**held, "mask": held["mask"] + sum(each.values())}
    run = jft.finetune(
        net,
        params,
        [{"tokens": TOKENS}],
        method=method,
        steps=1,
        optimizer={"weight_decay": 0.5, "lr": 0.1},
        log=QUIET,
        seed=5,
    )
    np.testing.assert_allclose(run.metrics[0]["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)
    np.testing.assert_allclose(run.state.trained["embed/table"]["phase"], (*released(1, 2)[:2], 0.0), rtol=1e-4)
    moved = learning.moved_by_decay(method, params, net)
    other = {"a": True, "b": True, "scale": False}
    assert moved == {p: other | ({"mask": False, "phase": False} if p == "embed/table" else {}) for p in start}


def trained_run(net, params, steps):
    """Adam with the method's rule; what trains after it, and the mean of the mask's channels at each step."""
    method = jft.method("pat", fraction=0.75, rank=4)
    plan, transform, how = method.plan(params, net), optax.adam(1e-2), Sparsified(4, scaled=False)
    kept, trained = jax.jit(plan.init)(KEY, params)

    def loss(t):
        logits = net.apply(plan.bind(kept, t, key=KEY), TOKENS)
        fit = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()
        return fit + plan.penalty(kept, t)

    @jax.jit
    def run(t, memory):
        def step(carry, _):
            t, state, memory = carry
            updates, state = transform.update(jax.grad(loss)(t), state, t)
            t = optax.apply_updates(t, updates)
            t, memory = method.rule.values(plan, kept, t, memory)
            return (t, state, memory), jnp.mean(how.factor(t["embed/table"], KEY))

        (t, _, _), means = jax.lax.scan(step, (t, transform.init(t), memory), length=steps)
        return t, means

    return plan, kept, *run(trained, method.rule.start(method.rule.init(trained), steps))


def test_training_closes_the_channels_wanted_and_they_come_out_without_a_trace():
    net = model(layers=1)
    params = net.init(KEY)
    plan, kept, trained, means = trained_run(net, params, 120)
    assert means.min() > 0.4  # there is no step at which all channels are closed
    keep = open_channels(trained)
    assert abs(len(keep) - 18) <= 2
    merged = jax.jit(lambda k, t: plan.merged(params, k, t))(kept, trained)
    small, fewer = prune_width(net, merged, keep)
    assert small.config.width == len(keep)
    assert shapes(fewer) == shapes(jax.eval_shape(small.init, KEY))
    assert tree.count(fewer) < 0.85 * tree.count(params)
    found, expected = jax.jit(small.apply)(fewer, TOKENS), jax.jit(net.apply)(merged, TOKENS)
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


def planned(*include):
    net = model()
    plan = jft.method("pat", include=include).plan(net.abstract(), net)
    return jax.eval_shape(lambda p: plan.bind(*plan.init(KEY, p)), net.abstract())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune_width(model(norm="layer"), {}, [0]), "subtracts the mean"),
        (lambda: prune_width(model(), {}, [0, 0]), "distinct integers in 0..23"),
        (lambda: prune_width(model(), {}, [24]), "distinct integers in 0..23"),
        (lambda: prune_width(Model(jft.models.ClipConfig), {}, [0]), "only decoders"),
        (lambda: ChannelBudget(0.0), "that of the channels that stay"),
        (lambda: Sparsified(0).init(KEY, leaf.w32()), "no operator of rank 0"),
        (lambda: open_channels({"x": jnp.ones(2)}), "goes with train=Sparsified"),
        (lambda: Hardening(0.0), "harden is 0.0"),
        (lambda: planned(r"up/w$", r"down/w$"), "has 24 channels and a weight here 40"),
        (lambda: SomeLayers(Sparsified(), (1, 1), (True, False)).fitted(lead=1), "shares mask, phase"),
    ],
)
def test_wrong_uses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
