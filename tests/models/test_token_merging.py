"""Token selection in a vision transformer against NumPy in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.dot import dot
from jft.models import Model
from jft.models.classifier import Classifier
from jft.models.clip import ClipConfig, TextConfig
from jft.models.core import Hooks, Runs
from jft.models.token_merging import TokenSelection, select, with_selection
from jft.models.vision import VisionConfig
from tests.models import parity

CONFIG = VisionConfig(image=8, patch=2, channels=1, width=12, layers=4, heads=3, hidden=20, eps=1e-6)
SELECTION = TokenSelection(layers=(0, 2), keep=(0.6, 0.4))
PLAIN = Model(CONFIG)
MODEL = with_selection(PLAIN, SELECTION)
IMAGES = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)


@functools.cache
def params():
    rng = np.random.default_rng(1)
    shapes = {path: leaf.shape for path, leaf in CONFIG.leaves()}
    return jax.device_put(tree.unflatten({p: np.float32(rng.standard_normal(s) / 2) for p, s in shapes.items()}))


@functools.cache
def run(model, remat="none"):
    return jax.jit(model.with_(remat=remat).apply)(params(), IMAGES)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.eps) * p["scale"] + p["bias"]


def fewer(h, weights, keep, merge):
    """One image: ``h[1 + n, D]``; a loop over tokens."""
    count = math.ceil(keep * (len(h) - 1))
    best = sorted(range(1, len(h)), key=lambda i: -weights[i])
    kept, rest = sorted(best[:count]), best[count:]
    tokens = [h[0], *(h[i] for i in kept)]
    if merge:
        tokens.append(sum(weights[i] * h[i] for i in rest) / sum(weights[i] for i in rest))
    return np.stack(tokens)


def reference(p, images, selection=SELECTION):
    erf = np.vectorize(math.erf)
    x = images.reshape(2, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(2, 16, 4)
    h = np.concatenate([np.broadcast_to(p["cls"], (2, 1, 12)), x @ p["patch"]["w"] + p["patch"]["b"]], 1)
    h = h + p["positions"]["table"]
    for i in range(4):
        w = jax.tree.map(lambda x, i=i: x[i], p["layers"])
        x = norm(h, w["attn_norm"])
        q, k, v = ((x @ w["attn"][n]["w"] + w["attn"][n]["b"]).reshape(2, -1, 3, 4) for n in "qkv")
        a = softmax(np.einsum("bthk,bshk->bhts", q, k) / 2)
        y = np.einsum("bhts,bshk->bthk", a, v).reshape(h.shape)
        h = h + y @ w["attn"]["o"]["w"] + w["attn"]["o"]["b"]
        x = norm(h, w["mlp_norm"]) @ w["mlp"]["up"]["w"] + w["mlp"]["up"]["b"]
        h = h + (x * (1 + erf(x / math.sqrt(2))) / 2) @ w["mlp"]["down"]["w"] + w["mlp"]["down"]["b"]
        if i in selection.layers:
            keep = selection.keep[selection.layers.index(i)]
            h = np.stack([fewer(*pair, keep, selection.merge) for pair in zip(h, a[:, :, 0].mean(1), strict=True)])
    return norm(h, p["final_norm"])


@pytest.mark.parametrize("merge", [True, False])
def test_a_vision_transformer_with_fewer_tokens(merge):
    selection = dataclasses.replace(SELECTION, merge=merge)
    out = run(with_selection(PLAIN, selection))
    expected = reference(jax.tree.map(lambda x: np.asarray(x, np.float64), params()), IMAGES, selection)
    # 16 patches, 10 of them and one merged, 5 of these 11 and one merged
    assert out.shape == expected.shape == (2, 1 + (6 if merge else 4), 12)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_select_keeps_ties_and_order():
    h = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    attended = np.float32([[0.5, 0.1, 0.2, 0.1, 0.1, 0.0]])
    chosen = jax.jit(select, static_argnums=(2, 3))
    np.testing.assert_array_equal(chosen(h, attended, 0.6, False), h[:, [0, 1, 2, 3]])
    merged = np.asarray(chosen(h, attended, 0.4, True))
    np.testing.assert_array_equal(merged[:, :3], h[:, :3])
    np.testing.assert_allclose(merged[0, 3], (h[0, 3] + h[0, 4]) / 2, rtol=1e-6)
    assert select(h, attended, 0.99, True) is h  # the ceiling keeps all
    assert np.isfinite(chosen(h, np.zeros((1, 6), np.float32), 0.4, True)).all()


def test_it_has_no_parameters_and_can_be_taken_off():
    assert with_selection(MODEL, None) == PLAIN
    assert tree.flatten(MODEL.abstract()).keys() == tree.flatten(PLAIN.abstract()).keys()


@pytest.mark.optimized
def test_fewer_tokens_cost_fewer_products():
    half = with_selection(PLAIN, TokenSelection((0, 1, 2), 0.5)).with_(unroll=0)
    cost = [jax.jit(m.apply).lower(params(), IMAGES).cost_analysis()["flops"] for m in (PLAIN.with_(unroll=0), half)]
    assert cost[1] < 0.65 * cost[0]


def test_remat():
    np.testing.assert_allclose(run(MODEL, "full"), run(MODEL), atol=1e-5)


@pytest.mark.slow
def test_derivatives():
    parity.unchanged_by_execution(MODEL, params(), IMAGES)
    parity.forward_matches_reverse(jax.jit(lambda p: MODEL.apply(p, IMAGES)), params())


def test_hooks():
    """Products of all layers by name; values of pieces with different numbers of tokens stay apart."""
    hooks = Hooks(
        product=lambda name, x, w, s: (dot(x, w), jnp.mean(x, axis=(0, 1))),
        value=lambda name, h, s: (h if s is None else h + s, h),
        state={"layers/mlp/out": jnp.zeros((4, 12))},
    )
    out, reads = jax.jit(lambda p: MODEL.apply(p, IMAGES, hooks))(params())
    np.testing.assert_allclose(out, run(MODEL), atol=1e-5)
    assert reads["layers/attn/q"].shape == (4, 12) and reads["layers/mlp/down"].shape == (4, 20)
    assert [x.shape for x in reads["layers/in"]] == [(1, 2, 17, 12), (1, 2, 12, 12), (1, 2, 12, 12), (1, 2, 7, 12)]


def test_layers_cut_into_runs():
    layers = jax.tree.map(lambda x: Runs((x[:1], x[1:]), (1, 3)), jax.device_get(params()["layers"]))
    out = jax.jit(MODEL.apply)({**params(), "layers": layers}, IMAGES)
    np.testing.assert_allclose(out, run(MODEL), atol=1e-5)


def test_models_around_it():
    classifier = with_selection(Model(Classifier(CONFIG, 3)), SELECTION)
    assert classifier.config.backbone == MODEL.config
    head = {"classifier": {"w": np.ones((12, 3), np.float32), "b": np.zeros(3, np.float32)}}
    logits = np.asarray(jax.jit(classifier.apply)(params() | head, IMAGES))
    np.testing.assert_allclose(logits[:, 0], np.asarray(run(MODEL))[:, 0].sum(-1), atol=1e-4)
    clip = with_selection(Model(ClipConfig(vision=CONFIG, text=TextConfig(vocab=5, width=4, heads=1))), SELECTION)
    assert clip.config.vision == MODEL.config


def test_saving_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot say that tokens are selected"):
        jft.save(MODEL, params(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, "at least one"),
        ({"layers": (2, 1)}, "ascending"),
        ({"layers": (1,), "keep": 1.0}, "keep is 1.0"),
        ({"layers": (1,), "keep": (0.5, 0.5)}, "one for each of 1 layers"),
    ],
)
def test_selections_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenSelection(**options)


def test_models_without_a_place_for_it_are_refused():
    with pytest.raises(ValueError, match="choose from 0 to 2"):
        with_selection(PLAIN, TokenSelection((3,)))
    with pytest.raises(ValueError, match="a TextConfig has none"):
        with_selection(Model(TextConfig()), SELECTION)
