"""Decoders by themselves: padding, packing, hooks, remat, forward mode, experts against NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import tree
from jft.delta import Changed, LowRank
from jft.models import Model, core
from jft.models.core import Execution, Hooks, Scope
from jft.models.decoder import DecoderConfig
from jft.models.moe import Experts, moe
from jft.models.rope import Rope

BASE = DecoderConfig(vocab=31, width=24, layers=3, heads=4, kv_heads=2, hidden=40, init_std=0.3)
VARIANTS = {
    "llama": BASE,
    "gpt2": dataclasses.replace(
        BASE, norm="layer", rope=None, gated=False, mlp_bias=True, qkv_bias=True, tied=True, scale_by_layer=True
    ),
    "gemma": dataclasses.replace(
        BASE,
        windows=(3, None, 5),
        local_rope=Rope(theta=100.0),
        norm_place="both",
        norm_offset=1.0,
        embed_scale=True,
        qk_norm="head",
        attention_softcap=5.0,
        logit_softcap=4.0,
        tied=True,
    ),
    "moe": dataclasses.replace(BASE, experts=Experts(5, 2, 16), qk_norm="full", norm_place="post", clip_qkv=1.0),
    "dynamic": dataclasses.replace(BASE, max_positions=4, rope=Rope(kind="dynamic", factor=2.0), parallel=True),
    "longrope": dataclasses.replace(
        BASE, rope=Rope(kind="longrope", original_positions=4, factor=4.0, short=(1.0, 1.2, 1.4), long=(3.0, 4.0, 5.0))
    ),
}
TOKENS = np.random.default_rng(0).integers(1, 31, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return Model(VARIANTS[request.param])


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch=TOKENS):
    return model.apply(params, batch)


def loss(model, params, batch=TOKENS):
    return jnp.mean(jnp.square(model.apply(params, batch)))


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_init(model, params):
    shapes = model.abstract()
    assert {p: x.shape for p, x in tree.flatten(shapes).items()} == model.config.shapes()
    jitted = jax.jit(lambda key: model.init(key, jnp.bfloat16))(jax.random.key(0))
    close(jax.tree.map(lambda x: np.asarray(x, np.float32), jitted), params, 1e-2)
    table = np.asarray(params["embed"]["table"])
    assert abs(table.std() / 0.3 - 1) < 0.1
    norm = params["layers"]["attn_post_norm" if model.config.norm_place == "post" else "attn_norm"]
    assert np.all(np.asarray(norm["scale"]) == 1 - model.config.norm_offset)


def test_defaults():
    model = Model(DecoderConfig(vocab=50, width=64, layers=2, heads=4))
    params = model.init(jax.random.key(0))
    assert params["layers"]["mlp"]["gate"]["w"].shape == (2, 64, 192)
    assert apply(model, params, jnp.ones((2, 5), jnp.int32)).shape == (2, 5, 50)
    assert hash(model) == hash(Model(DecoderConfig(vocab=50, width=64, layers=2, heads=4)))


def test_causal(model, params):
    changed = TOKENS.copy()
    changed[:, 6:] = 1
    before, after = (np.asarray(apply(model, params, tokens)) for tokens in (TOKENS, changed))
    close(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, params, side):
    pad, real = 3, slice(3, None) if side == "left" else slice(0, 9)
    wide = [(0, 0), (pad, 0) if side == "left" else (0, pad)]
    batch = {"tokens": np.pad(TOKENS, wide), "segments": np.pad(np.ones_like(TOKENS), wide)}
    found, expected = np.asarray(apply(model, params, batch)), apply(model, params, TOKENS)
    close(found[:, real], expected)
    other = {**batch, "tokens": np.pad(TOKENS, wide, constant_values=7)}
    close(np.asarray(apply(model, params, other))[:, real], expected)
    assert np.all(np.isfinite(found))


def test_packing_changes_nothing(model, params):
    tokens = TOKENS[:, :8]
    segments = np.broadcast_to(np.array([1] * 4 + [2] * 4, np.int32), tokens.shape)
    positions = np.broadcast_to(np.array([0, 1, 2, 3] * 2, np.int32), tokens.shape)
    alone = np.concatenate([apply(model, params, tokens[:, :4]), apply(model, params, tokens[:, 4:])], axis=1)
    for extra in ({"segments": segments}, {"positions": positions}, {"segments": segments, "positions": positions}):
        close(apply(model, params, {"tokens": tokens, **extra}), alone)


def test_positions_are_used(model, params):
    shifted = {"tokens": TOKENS, "positions": np.broadcast_to(3 * np.arange(9, dtype=np.int32), TOKENS.shape)}
    assert np.abs(np.asarray(apply(model, params, shifted)) - apply(model, params, TOKENS)).max() > 1e-3


def test_windows():
    """Token t of a layer with window w is reached by w tokens, itself included, per layer."""
    for windows, reach in (((3, 3, 3), 6), ((None, 1, 1), 8), ((3, None, 1), 8), ((2, 2, 3), 4)):
        model = Model(dataclasses.replace(BASE, windows=windows))
        params = model.init(jax.random.key(0))
        embeddings = np.asarray(params["embed"]["table"])[TOKENS[:1]]

        def last(h, params=params, model=model):
            hooks = Hooks(value=lambda name, x, state: (h if name == "embed" else x, None))
            return model.apply(params, TOKENS[:1], hooks=hooks)[0][0, -1]

        sensitivity = np.abs(jax.jit(jax.jacobian(last))(embeddings)).sum((0, 1, 3))
        np.testing.assert_array_equal(sensitivity > 0, np.arange(9) >= 8 - reach)


@pytest.mark.parametrize("name", ["gpt2", "gemma", "moe"])
def test_execution_changes_nothing(name):
    model = Model(VARIANTS[name])
    params = model.init(jax.random.key(0))
    expected = jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(params)
    for execution in ({"remat": "dots"}, {"unroll": 0}, {"unroll": 2, "remat": "full"}):
        other = model.with_(**execution)
        close(jax.jit(jax.value_and_grad(lambda p, other=other: loss(other, p)))(params), expected)


def test_bfloat16(model, params):
    low = apply(model.with_(dtype=jnp.bfloat16), params, TOKENS)
    assert low.dtype == jnp.bfloat16
    high = np.asarray(apply(model, params, TOKENS))
    assert np.abs(np.asarray(low, np.float32) - high).mean() < 0.1 * np.abs(high).mean()


def test_hooks_read_and_edit(model, params):
    def value(name, h, state):
        return h, h

    def product(name, x, w, state):
        return core.dot(x, w), jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))

    expected = apply(model, params, TOKENS)
    hooks = Hooks(product=product, value=value)
    logits, reads = jax.device_get(jax.jit(lambda p: model.apply(p, TOKENS, hooks=hooks))(params))
    close(logits, expected)
    for site in ("layers/in", "layers/attn/out", "layers/mlp/out"):
        assert reads[site].shape == (3, 2, 9, 24)
    close(reads["layers/in"][0], reads["embed"])
    assert reads["final"].shape == (2, 9, 24)
    named = {p.removesuffix("/w") for p in model.config.shapes() if p.endswith("/w")} | {"head"}
    assert {n for n in reads if n not in ("embed", "final", "layers/in", "layers/attn/out", "layers/mlp/out")} == named
    parts = reads["layers/in"][1] - reads["layers/in"][0]
    close(parts, reads["layers/attn/out"][0] + reads["layers/mlp/out"][0])


def test_hooks_edit(model, params):
    def double(name, x, w, state):
        y = core.dot(x, w)
        return (y * (1 + state) if state is not None else y), None

    @jax.jit
    def edited(params, state):
        return model.apply(params, TOKENS, hooks=Hooks(product=double, state=state))[0]

    close(edited(params, {"layers/attn/o": np.zeros(3, np.float32)}), apply(model, params, TOKENS))
    doubled = jax.tree_util.tree_map_with_path(
        lambda k, x: 2 * x if tree.path_of(k) == "layers/attn/o/w" else x, params
    )
    close(edited(params, {"layers/attn/o": np.ones(3, np.float32)}), apply(model, doubled, TOKENS))


@pytest.mark.parametrize("name", ["gemma", "moe"])
def test_forward_mode(name):
    """jvp and linearize agree with the gradient; the gradient has a jvp of its own."""
    model = Model(VARIANTS[name])
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    tangent = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params)
    f = lambda p: loss(model, p)

    @jax.jit
    def both(params, tangent):
        slope = jax.jvp(f, (params,), (tangent,))[1]
        _, linear = jax.linearize(f, params)
        gradient, curve = jax.jvp(jax.grad(f), (params,), (tangent,))
        return slope, linear(tangent), gradient, curve

    slope, linear, gradient, curve = both(params, tangent)
    inner = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, tangent)), strict=True))
    np.testing.assert_allclose(slope, inner, rtol=1e-3)
    np.testing.assert_allclose(linear, slope, rtol=1e-4)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(curve))


def expert_reference(h, params, experts):
    """Each token through its experts, one at a time, in float64."""
    h, params = jax.tree.map(lambda x: np.asarray(x, np.float64), (h, params))
    out = np.zeros_like(h)
    for token in np.ndindex(h.shape[:2]):
        logits = h[token] @ params["router"]["w"]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        best = np.argsort(-p)[: experts.per_token]
        total = p[best].sum() if experts.normalise else 1.0
        for e in best:
            gate, up, down = (params["experts"][n]["w"][e] for n in ("gate", "up", "down"))
            g = h[token] @ gate
            out[token] += p[e] / total * ((g / (1 + np.exp(-g)) * (h[token] @ up)) @ down)
    return out


@pytest.fixture(scope="module")
def expert_case():
    rng = np.random.default_rng(3)
    draw = lambda *shape: {"w": np.float32(rng.normal(size=shape) / 3)}
    params = {"router": draw(12, 6), "experts": {"gate": draw(6, 12, 8), "up": draw(6, 12, 8), "down": draw(6, 8, 12)}}
    return jax.device_put((params, np.float32(rng.normal(size=(2, 7, 12)))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def expert_layer(experts, way, params, h):
    """Its value, the gradient of its square, and its tangent along the point itself."""
    run = lambda p, h: moe(Scope(Execution(experts=way)), "mlp", h, p, experts, jax.nn.silu)
    gradients = jax.grad(lambda p, h: jnp.sum(jnp.square(run(p, h))), (0, 1))(params, h)
    return run(params, h), gradients, jax.jvp(run, (params, h), (params, h))[1]


@pytest.mark.parametrize("way", ["dense", "ragged"])
@pytest.mark.parametrize("experts", [Experts(6, 2, 8), Experts(6, 3, 8, normalise=False), Experts(6, 6, 8)])
def test_experts(expert_case, experts, way):
    params, h = expert_case
    value, gradients, tangent = expert_layer(experts, way, params, h)
    np.testing.assert_allclose(value, expert_reference(h, params, experts), atol=1e-5)
    _, dense_gradients, dense_tangent = expert_layer(experts, "dense", params, h)
    close(gradients, dense_gradients, 1e-4)
    close(tangent, dense_tangent, 1e-4)


@pytest.mark.parametrize("way", ["dense", "ragged"])
def test_low_rank_experts(expert_case, way):
    """LoRA on every expert, structured, is the merged weight; with hooks as well."""
    params, h = expert_case
    rng = np.random.default_rng(4)
    thin = lambda w: [np.float32(rng.normal(size=s)) for s in ((*w.shape[:2], 2), (w.shape[0], 2, w.shape[2]))]
    adapted = {k: {"w": Changed(p["w"], LowRank(*thin(p["w"])))} for k, p in params["experts"].items()}
    merged = {k: {"w": p["w"].w + p["w"].delta.a @ p["w"].delta.b} for k, p in jax.device_get(adapted).items()}
    hooks = Hooks(product=lambda name, x, w, state: (core.dot(x, w), None))

    def run(experts, way="dense", hooks=None):
        scope = Scope(Execution(experts=way), hooks)
        return jax.jit(lambda p: moe(scope, "mlp", h, p, Experts(6, 2, 8), jax.nn.silu))({**params, "experts": experts})

    expected = run(merged)
    for use in (None, hooks):
        close(run(adapted, way, use), expected, 1e-4)


def test_expert_hooks_see_their_own_tokens(expert_case):
    """Rows of tokens that went elsewhere are zero, so Gram matrices per expert are exact."""
    params, h = expert_case
    experts = Experts(6, 2, 8)
    hooks = Hooks(product=lambda name, x, w, state: (core.dot(x, w), jnp.einsum("...ni,...nj->...ij", x, x)))

    @jax.jit
    def reads(params, h):
        scope = Scope(Execution(), hooks)
        moe(scope, "mlp", h, params, experts, jax.nn.silu)
        return scope.reads

    grams = reads(params, h)["mlp/experts/gate"]
    flat = np.asarray(h).reshape(-1, 12)
    chosen = np.argsort(-(flat @ np.asarray(params["router"]["w"])))[:, :2]
    for e in range(6):
        own = flat[(chosen == e).any(1)]
        np.testing.assert_allclose(grams[e], own.T @ own, atol=1e-4)


def test_rope_frequencies():
    """llama3 and yarn by their published formulas, one frequency at a time."""
    positions = jnp.ones((1, 1), jnp.int32)
    angle = lambda rope: np.asarray(jnp.arctan2(*rope.tables(positions, positions, 16, 64)[::-1]))[0, 0]
    llama3 = Rope(kind="llama3", factor=8.0, low_frequency=1.0, high_frequency=4.0, original_positions=32)
    expected = []
    for i in range(8):
        f = 10_000.0 ** (-i / 8)
        wavelength = 2 * math.pi / f
        smooth = (32 / wavelength - 1.0) / 3.0
        expected.append(f if wavelength < 8 else f / 8 if wavelength > 32 else (1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(angle(llama3), expected, rtol=1e-5)
    np.testing.assert_allclose(angle(Rope(kind="linear", factor=4.0)), 10_000.0 ** (-np.arange(8) / 8) / 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=5), "width 24 is no multiple of heads 5"),
        (dict(kv_heads=3), "heads 4 is no multiple of kv_heads 3"),
        (dict(activation="swiglu"), "activation 'swiglu' is unknown"),
        (dict(windows=(1, 2)), "windows has 2 entries for 3 layers"),
        (dict(layers=0), "layers must be at least 1"),
        (dict(experts=Experts(4, 2, 8), gated=False), "experts are gated"),
    ],
)
def test_config_refusals(options, message):
    fields = dict(vocab=31, width=24, layers=3, heads=4)
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**fields, **options})


def test_other_refusals():
    with pytest.raises(ValueError, match="per_token is 5"):
        Experts(4, 5, 8)
    with pytest.raises(ValueError, match="rope kind 'ntk' is unknown"):
        Rope(kind="ntk")
    with pytest.raises(ValueError, match="needs factor"):
        Rope(kind="linear")
    with pytest.raises(ValueError, match="experts 'fast' is unknown"):
        Execution(experts="fast")
    model = Model(VARIANTS["gpt2"]).config
    short = Model(dataclasses.replace(model, max_positions=8))
    with pytest.raises(ValueError, match="9 tokens, but the model has 8 learned positions"):
        jax.eval_shape(short.apply, short.abstract(), TOKENS)
    with pytest.raises(ValueError, match="tokens must be integers"):
        Model(BASE).apply(Model(BASE).abstract(), TOKENS.astype(np.float32))
    with pytest.raises(ValueError, match="no 'tokens'"):
        Model(BASE).apply(Model(BASE).abstract(), {"images": TOKENS})
