"""ViT against transformers; patches against the convolution; small images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models import Model
from jft.models.core import Hooks
from jft.models.hf.vision import FAMILIES
from jft.models.vision import VisionConfig, bicubic, patches
from tests.models import parity

DIGITS = VisionConfig(image=8, patch=2, channels=1, width=12, layers=2, heads=3, hidden=20)


def images(batch, height, width, channels):
    return np.random.default_rng(0).standard_normal((batch, height, width, channels)).astype(np.float32)


def torch_model(kind, image=8, patch=2, channels=1, **options):
    import transformers as t

    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=17)
    config = t.ViTConfig(image_size=image, patch_size=patch, num_channels=channels, **(sizes | options))
    return parity.shaken(t.ViTForImageClassification(config).vit if kind == "bare" else t.ViTModel(config))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("kind", "options", "size"),
    [
        ("bare", {}, (8, 8)),
        ("pooler", {"image": 9, "patch": 3, "channels": 3, "hidden_act": "relu", "layer_norm_eps": 1e-6}, (9, 9)),
        ("bare", {"qkv_bias": False, "num_hidden_layers": 1, "hidden_act": "gelu_pytorch_tanh"}, (8, 8)),
        ("bare", {}, (12, 10)),
        ("pooler", {"image": 10, "patch": 2}, (4, 16)),
    ],
)
def test_outputs_and_gradients_as_transformers(kind, options, size):
    """At the size of the config, and at others with interpolated positions."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peer, family = torch_model(kind, **options), FAMILIES["vit"]
    model = parity.load(peer, family)
    assert model.config.pooler == (kind == "pooler")
    x = images(2, *size, model.config.channels)
    out = peer(torch.tensor(x).permute(0, 3, 1, 2), interpolate_pos_encoding=True)

    def ours(p):
        h = model.apply(p, {"images": x})
        return [h, jnp.tanh(h[:, 0] @ p["pooler"]["w"] + p["pooler"]["b"])] if model.config.pooler else [h]

    theirs = [out.last_hidden_state, out.pooler_output] if model.config.pooler else [out.last_hidden_state]
    parity.agree(peer, family, model, theirs, ours)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["pooler", "bare"])
def test_checkpoints_are_read_and_saved_for_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    peer = torch_model(kind, channels=3)
    loaded, model, _ = parity.round_trip(peer, transformers.AutoModel, tmp_path)
    assert model.config.pooler == (kind == "pooler")
    x = torch.tensor(images(2, 8, 8, 3)).permute(0, 3, 1, 2)
    assert torch.allclose(loaded(x).last_hidden_state, peer(x).last_hidden_state, atol=1e-6)
    if kind == "pooler":
        assert torch.allclose(loaded(x).pooler_output, peer(x).pooler_output, atol=1e-6)


@pytest.fixture(scope="module")
def model():
    return Model(DIGITS)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


def test_patches_times_w_is_the_strided_convolution():
    x, w = images(2, 6, 9, 2), np.random.default_rng(1).standard_normal((3, 3, 2, 5)).astype(np.float32)
    conv = jax.lax.conv_general_dilated(x, w, (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(patches(x, 3) @ w.reshape(18, 5), conv.reshape(2, 6, 5), atol=1e-5)


def test_bicubic_keeps_constants_and_the_same_size():
    np.testing.assert_allclose(bicubic(5, 5), np.eye(5), atol=1e-12)
    np.testing.assert_allclose(bicubic(7, 4).sum(1), 1, atol=1e-12)


def test_a_small_vit_learns():
    """Two classes of 8x8 images told apart after a few steps from scratch."""
    model = Model(VisionConfig(image=8, patch=2, channels=1, width=64, layers=4, heads=4, hidden=128))
    params = model.init(jax.random.key(0))
    x = images(8, 8, 8, 1) * 0.1
    x[:4, :4], x[4:, 4:] = 1.0, 1.0
    y = jnp.array([1.0] * 4 + [-1.0] * 4)

    @jax.jit
    def step(p):
        loss, g = jax.value_and_grad(lambda p: jnp.mean(jax.nn.softplus(-y * model.apply(p, x)[:, 0, 0])))(p)
        return loss, jax.tree.map(lambda a, b: a - 0.05 * b, p, g)

    losses = []
    for _ in range(20):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.2 < losses[0]


def test_an_array_is_a_batch_of_images(model, params):
    x = images(2, 8, 8, 1)
    out = model.apply(params, x)
    assert out.shape == (2, 17, 12)
    np.testing.assert_array_equal(out, model.apply(params, {"images": x}))
    assert model.with_(dtype=jnp.bfloat16).apply(params, x).dtype == jnp.bfloat16


@pytest.mark.slow
def test_execution_and_forward_mode(model, params):
    x = images(2, 8, 8, 1)
    parity.unchanged_by_execution(model, params, x)
    parity.forward_matches_reverse(lambda p: model.apply(p, x), params)


def test_hooks_reach_products_and_sites(model, params):
    names = []
    product = lambda name, x, w, s: (x @ w, names.append(name))
    hooks = Hooks(product=product, value=lambda name, h, s: (h * (0.0 if name == "embed" else 1.0), jnp.sum(h)))
    _, reads = model.apply(params, images(2, 8, 8, 1), hooks=hooks)
    assert {"patch", "layers/attn/q", "layers/mlp/down"} <= set(names)
    assert set(reads) == {"embed", "layers/in", "layers/attn/out", "layers/mlp/out", "final"}
    assert reads["layers/in"][0] == 0.0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 7, 8, 1), "7x8 pixels cannot be cut into patches of 2"),
        ((1, 8, 8, 3), r"\[B, H, W, 1\]; got \(1, 8, 8, 3\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(model, params, shape, message):
    with pytest.raises(ValueError, match=message):
        model.apply(params, np.zeros(shape, np.float32))


def test_other_bad_input_is_refused(model, params):
    with pytest.raises(ValueError, match="floating point"):
        model.apply(params, np.zeros((1, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="no 'images'"):
        model.apply(params, {"tokens": np.zeros((1, 8), int)})
    with pytest.raises(ValueError, match="image 9 is not a positive multiple of patch 2"):
        VisionConfig(image=9, patch=2)
    with pytest.raises(ValueError, match=r"image_size = \[8, 16\] is not supported"):
        FAMILIES["vit"].from_hf({"image_size": [8, 16]})
