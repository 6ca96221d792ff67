"""CLIP against transformers, and the zero-shot head made of prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models import Model
from jft.models.classifier import Classifier
from jft.models.clip import ClipConfig, TextConfig, zero_shot_head
from jft.models.core import Hooks
from jft.models.hf.vision import FAMILIES
from jft.models.vision import VisionConfig
from tests.models import parity

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((3, 8, 8, 3)).astype(np.float32)
EOS = 30
TOKENS = RNG.integers(3, EOS, (3, 7))
TOKENS[[0, 1, 2], [6, 3, 4]] = EOS
TOKENS[1, 4:] = EOS  # CLIP's tokenizer pads with the end-of-text token
TINY = ClipConfig(
    vision=VisionConfig(
        image=8,
        patch=4,
        width=12,
        layers=2,
        heads=3,
        hidden=16,
        patch_bias=False,
        embed_norm=True,
        activation="quick_gelu",
    ),
    text=TextConfig(vocab=33, width=10, layers=2, heads=2, hidden=14, positions=9, eos=EOS),
    projection=6,
)


def torch_model(vision=None, text=None, **options):
    import transformers as t

    vision = dict(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=17, image_size=8, patch_size=4
    ) | (vision or {})
    text = dict(
        vocab_size=33,
        hidden_size=10,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=13,
        max_position_embeddings=9,
        eos_token_id=EOS,
    ) | (text or {})
    return parity.shaken(
        t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, **({"projection_dim": 7} | options)))
    )


@pytest.mark.peers
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 8),
        ({"text": {"eos_token_id": 2, "hidden_act": "gelu"}, "vision": {"patch_size": 2, "layer_norm_eps": 1e-6}}, 8),
        ({"projection_dim": 12}, 12),
    ],
)
def test_outputs_and_gradients_as_transformers(options, size):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peer, family = torch_model(**options), FAMILIES["clip"]
    model = parity.load(peer, family)
    images = np.random.default_rng(1).standard_normal((3, size, size, 3)).astype(np.float32)
    out = peer(
        input_ids=torch.tensor(TOKENS),
        pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
        interpolate_pos_encoding=True,
    )

    def ours(p):
        o = model.apply(p, {"tokens": TOKENS, "images": images})
        return [o["image"], o["text"], jnp.exp(o["logit_scale"]) * o["image"] @ o["text"].T / 10]

    parity.agree(peer, family, model, [out.image_embeds, out.text_embeds, out.logits_per_image / 10], ours)


@pytest.mark.peers
def test_checkpoints_are_read_and_saved_for_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    peer = torch_model()
    loaded, _, _ = parity.round_trip(peer, transformers.AutoModel, tmp_path)
    x = dict(input_ids=torch.tensor(TOKENS), pixel_values=torch.tensor(IMAGES).permute(0, 3, 1, 2))
    assert torch.allclose(loaded(**x).logits_per_image, peer(**x).logits_per_image, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply(params, batch)


@pytest.fixture(scope="module")
def model():
    return Model(TINY)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def test_either_side_alone(model, params):
    both = apply(model, params, {"tokens": TOKENS, "images": IMAGES})
    assert set(apply(model, params, TOKENS)) == {"text", "logit_scale"}
    np.testing.assert_allclose(apply(model, params, {"images": IMAGES})["image"], both["image"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(both["text"], axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="neither 'images' nor 'tokens'"):
        model.apply(params, {"labels": TOKENS})


def test_what_follows_the_end_of_text_changes_nothing(model, params):
    other = TOKENS.copy()
    other[1, 5:] = 4
    np.testing.assert_allclose(apply(model, params, other)["text"], apply(model, params, TOKENS)["text"], atol=1e-6)


def test_zero_shot_head_is_the_scaled_mean_of_prompt_embeddings(model, params):
    prompts = RNG.integers(3, EOS, (4, 5, 6))
    prompts[..., -1] = EOS
    head = zero_shot_head(model, params, prompts)
    embedded = np.asarray(apply(model, params, prompts.reshape(20, 6))["text"], np.float64).reshape(4, 5, 6)
    mean = embedded.mean(1)
    w = np.exp(np.float64(params["logit_scale"])) * (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T
    np.testing.assert_allclose(head["w"], w, rtol=1e-4, atol=1e-4)
    assert head["w"].dtype == jnp.float32
    assert head["b"].shape == (4,)
    classifier = Model(Classifier(TINY, classes=4))
    logits = apply(classifier, {**params, "classifier": head}, {"images": IMAGES})
    image = np.asarray(apply(model, params, {"images": IMAGES})["image"])
    np.testing.assert_allclose(logits, image @ w, rtol=1e-4, atol=1e-4)


def test_zero_shot_head_refuses_other_models_and_shapes(model, params):
    with pytest.raises(ValueError, match="needs a CLIP model, not VisionConfig"):
        zero_shot_head(Model(TINY.vision), params, np.ones((2, 1, 3), int))
    with pytest.raises(ValueError, match=r"\[classes, prompts, T\]; got \(2, 3\)"):
        zero_shot_head(model, params, np.ones((2, 3), int))


@pytest.mark.slow
def test_execution_forward_mode_and_hooks(model, params):
    batch = {"tokens": TOKENS, "images": IMAGES}

    class Joined(Model):
        def apply(self, params, batch, hooks=None):
            out = super().apply(params, batch)
            return jnp.exp(out["logit_scale"]) * out["image"] @ out["text"].T

    joined = Joined(TINY)
    plain, other = (jax.jit(m.apply)(params, batch) for m in (joined, joined.with_(remat="full", unroll=0)))
    np.testing.assert_allclose(plain, other, atol=1e-5)
    parity.forward_matches_reverse(jax.jit(lambda p: joined.apply(p, batch)), params)
    hooks = Hooks(value=lambda name, h, s: (h, jnp.sum(h)))
    reads = jax.eval_shape(lambda p: model.apply(p, batch, hooks=hooks)[1], params)
    sites = {"embed", "layers/in", "layers/attn/out", "layers/mlp/out", "final"}
    features = {"features", "text/features"}
    assert set(reads) == features | {f"{side}/{site}" for side in ("vision", "text") for site in sites}


def test_hook_state_is_sliced_inside_each_tower(model, params):
    state = {"vision/layers/attn/q": np.float32([1, 3]), "text/layers/mlp/up": np.float32([5, 7])}
    seen = lambda name, x, w, s: (x @ w, s)
    batch, hooks = {"tokens": TOKENS, "images": IMAGES}, Hooks(product=seen, state=state)
    reads = jax.jit(lambda p: model.apply(p, batch, hooks=hooks)[1])(params)
    for name, value in state.items():
        np.testing.assert_array_equal(reads[name], value)
