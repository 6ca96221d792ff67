"""A model and its two halves: equal outputs, equal gradients behind the cut, none before it."""

import dataclasses
import functools

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
from jft.models.decoder import DecoderConfig
from jft.models.encoder import EncoderConfig
from jft.models.memory import Memory
from jft.models.split import precompute, split
from jft.models.t5 import T5Config
from jft.models.token_merging import TokenSelection
from jft.models.vision import VisionConfig

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((2, 8, 8, 1)).astype(np.float32)
TOKENS = RNG.integers(1, 19, (2, 6)).astype(np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)
VISION = VisionConfig(image=8, patch=2, channels=1, width=8, layers=4, heads=2, hidden=12, eps=1e-6)
DECODER = DecoderConfig(
    vocab=19, width=8, layers=4, heads=2, hidden=12, windows=(None, 2, 3, None), scale_by_layer=True
)
ENCODER = EncoderConfig(vocab=19, width=8, layers=4, heads=2, hidden=12, positions=8)
CLIP = ClipConfig(
    VISION, TextConfig(vocab=19, width=8, layers=3, heads=2, hidden=12, positions=6, eos=18), projection=5
)
WORDS = {"tokens": TOKENS, "segments": SEGMENTS}
CASES = {
    "decoder": (DECODER, WORDS, 1),
    "decoder whole": (DECODER, WORDS, 4),
    "encoder": (ENCODER, WORDS, 3),
    "vision": (VISION, {"images": IMAGES}, 2),
    "clip": (CLIP, {"images": IMAGES, "tokens": TOKENS}, {"vision/layers": 3, "text/layers": 1}),
    "clip images": (CLIP, {"images": IMAGES}, {"vision/layers": 1}),
    "clip texts": (CLIP, {"images": IMAGES, "tokens": TOKENS}, {"text/layers": 2}),
    "image classifier": (Classifier(VISION, 3, "mean"), {"images": IMAGES, "labels": np.array([0, 2])}, 2),
    "text classifier": (Classifier(ENCODER, 3), WORDS, 2),
    "clip classifier": (Classifier(CLIP, 3), {"images": IMAGES}, 2),
}


@functools.cache
def params_of(config):
    rng = np.random.default_rng(1)
    shapes = tree.flatten(Model(config).abstract())
    values = {p: np.float32(rng.standard_normal(x.shape) / 2) for p, x in shapes.items()}
    return jax.device_put(tree.unflatten(values))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply(params, batch)


@pytest.mark.parametrize("case", CASES)
def test_suffix_of_prefix_is_the_model(case):
    config, batch, layers = CASES[case]
    model, params = Model(config), params_of(config)
    prefix, suffix = split(model, layers)
    features = prefix(params, batch)
    assert "images" not in features or case == "clip texts"
    if "labels" in batch:
        np.testing.assert_array_equal(features["labels"], batch["labels"])
    whole, halves = apply(model, params, batch), apply(suffix, params, features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), whole, halves)
    assert jax.tree.structure(whole) == jax.tree.structure(halves)


def test_what_is_kept_is_the_residual_stream_behind_the_prefix():
    params = params_of(VISION)
    prefix, _ = split(Model(VISION), 2)
    hooks = Hooks(value=lambda name, h, s: (h, h))
    reads = jax.jit(lambda p: Model(VISION).apply(p, IMAGES, hooks)[1])(params)
    np.testing.assert_allclose(prefix(params, IMAGES)["features"], reads["layers/in"][2], atol=1e-6)


def test_gradients():
    params = params_of(DECODER)
    prefix, suffix = split(Model(DECODER), 2)
    loss = lambda p, model, batch: jnp.mean(jnp.sin(model.apply(p, batch)))
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    whole = tree.flatten(jax.device_get(gradient(params, Model(DECODER), WORDS)))
    half = tree.flatten(jax.device_get(gradient(params, suffix, prefix(params, WORDS))))
    for path, g in half.items():
        if path.startswith("layers/"):
            np.testing.assert_allclose(g[2:], whole[path][2:], rtol=1e-4, atol=1e-6)
            assert not g[:2].any()
        elif not path.startswith("embed"):
            np.testing.assert_allclose(g, whole[path], rtol=1e-4, atol=1e-6)
    assert not half["embed/table"].any() and np.any(half["layers/mlp/down/w"][3])


@pytest.mark.optimized
def test_the_prefix_costs_nothing_in_the_suffix():
    """Neither its layers nor the embedding of images is computed."""
    prefix, suffix = split(Model(VISION).with_(unroll=0), 3)
    params = params_of(VISION)
    features = prefix(params, IMAGES)
    flops = [
        jax.jit(m.apply).lower(params, b).compile().as_text().count(" dot(")
        for m, b in ((Model(VISION).with_(unroll=0), IMAGES), (suffix, features))
    ]
    assert 0 < flops[1] <= flops[0] / 4


def test_hooks_see_the_layers_that_run():
    params = params_of(VISION)
    hooks = Hooks(
        product=lambda name, x, w, s: (dot(x, w), jnp.mean(x)),
        value=lambda name, h, s: (h if s is None else h + s, h),
        state={
            "layers/mlp/out": np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((4, 1, 1, 8), np.float32)
        },
    )
    prefix, suffix = split(Model(VISION), 3)
    features = prefix(params, IMAGES)
    out, reads = jax.jit(lambda p: suffix.apply(p, features, hooks))(params)
    assert reads["layers/in"].shape == (1, 2, 17, 8) and reads["layers/attn/q"].shape == (1,)
    assert "patch" not in reads and "final" in reads
    last = hooks.state["layers/mlp/out"] * (np.arange(4) == 3)[:, None, None, None]
    pushed = dataclasses.replace(hooks, state={"layers/mlp/out": last})
    expected = jax.jit(lambda p: Model(VISION).apply(p, IMAGES, pushed)[0])(params)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_layers_cut_into_runs_where_the_suffix_starts():
    params = params_of(VISION)
    prefix, suffix = split(Model(VISION), 3)
    features = prefix(params, IMAGES)
    layers = jax.tree.map(lambda x: Runs((x[:3], x[3:]), (3, 1)), jax.device_get(params["layers"]))
    out = apply(suffix, {**params, "layers": layers}, features)
    np.testing.assert_allclose(out, apply(suffix, params, features), atol=1e-6)


def test_precompute_in_the_activation_dtype():
    model = Model(VISION).with_(dtype=jnp.bfloat16)
    prefix, suffix = split(model, 2)
    (batch,) = precompute(prefix, params_of(VISION), [{"images": IMAGES, "labels": np.array([0, 1])}])
    assert all(isinstance(x, np.ndarray) for x in batch.values()) and batch.keys() == {"labels", "features"}
    assert batch["features"].dtype == jnp.bfloat16 and batch["features"].shape == (2, 17, 8)
    whole, half = apply(model, params_of(VISION), IMAGES), apply(suffix, params_of(VISION), batch)
    np.testing.assert_allclose(np.float32(whole), np.float32(half), atol=0.1)


def test_a_suffix_is_hashable_and_speaks_for_its_model():
    _, one = split(Model(Classifier(VISION, 3)), 2)
    _, two = split(Model(Classifier(VISION, 3)), 2)
    assert one == two and hash(one) == hash(two)
    assert one.config.backbone.image == 8 and one.config.width == 8
    assert one.linear_paths() == Model(Classifier(VISION, 3)).linear_paths()


def test_wrong_uses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'layers' has 4; choose 1 to 4"):
        split(Model(VISION), 5)
    with pytest.raises(ValueError, match="no layers 'layers'; its stacks are text/layers, vision/layers"):
        split(Model(CLIP), {"layers": 1})
    with pytest.raises(ValueError, match="'t5' model cannot be split"):
        split(Model(T5Config(vocab=9, width=8, layers=1, heads=1, hidden=8)), 1)
    with pytest.raises(ValueError, match="memory layers"):
        split(Model(dataclasses.replace(DECODER, memory=Memory(4, (1,), 1, 2, 4))), 1)
    with pytest.raises(ValueError, match="selects tokens"):
        split(Model(dataclasses.replace(VISION, selection=TokenSelection((1,)))), 1)
    _, suffix = split(Model(VISION), 2)
    with pytest.raises(ValueError, match="split already"):
        split(suffix, 1)
    with pytest.raises(ValueError, match=r"no 'features', only \['images'\]; make it with the prefix"):
        suffix.apply(params_of(VISION), {"images": IMAGES})
    with pytest.raises(ValueError, match="family 'suffix of vit' has no Hugging Face form"):
        jft.save(suffix, params_of(VISION), tmp_path / "out")
