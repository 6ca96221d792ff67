"""Classes as texts: CLIP's logits, the same from the suffix, and those of a batch's classes alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import Model
from jft.models.clip import ClipConfig, TextConfig
from jft.models.split import precompute, split
from jft.models.text_classifier import NEVER, PromptClassifier, Texts
from jft.models.vision import VisionConfig

VISION = VisionConfig(image=8, patch=2, channels=1, width=8, layers=3, heads=2, hidden=12, eps=1e-6)
CLIP = ClipConfig(
    VISION, TextConfig(vocab=19, width=8, layers=3, heads=2, hidden=12, positions=6, eos=18), projection=5
)
RNG = np.random.default_rng(0)
BATCH = {"images": RNG.standard_normal((3, 8, 8, 1)).astype(np.float32), "labels": np.array([4, 0, 4])}
TOKENS = np.concatenate([RNG.integers(1, 18, (7, 5)), np.full((7, 1), 18)], axis=1).astype(np.int32)
CLASSES = np.broadcast_to(np.array([1, 0, 1, 0, 1, 0, 0], bool), (3, 7))


@functools.cache
def params():
    rng = np.random.default_rng(1)
    shapes = tree.flatten(Model(CLIP).abstract())
    return tree.unflatten({p: jnp.asarray(rng.standard_normal(x.shape) / 2, jnp.float32) for p, x in shapes.items()})


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, batch):
    return model.apply(params, batch)


def apply(model, batch):
    return _apply(model, params(), batch)


@functools.cache
def whole(count=0):
    return Model(PromptClassifier(CLIP, Texts({"tokens": TOKENS}), count))


@functools.cache
def halves(layers, count=0):
    cut = dict(zip(("vision/layers", "text/layers"), layers, strict=True))
    prefix, suffix = split(Model(CLIP), {name: n for name, n in cut.items() if n})
    texts = Texts(jax.device_get(prefix(params(), {"tokens": TOKENS})) if layers[1] else {"tokens": TOKENS})
    batch = next(precompute(prefix, params(), [BATCH])) if layers[0] else BATCH
    return Model(PromptClassifier(suffix.config, texts, count)), batch


def test_logits_are_those_of_clip():
    image = apply(Model(CLIP), BATCH)
    text = apply(Model(CLIP), {"tokens": TOKENS})
    expected = np.exp(np.float64(image["logit_scale"])) * np.float64(image["image"]) @ np.float64(text["text"]).T
    np.testing.assert_allclose(apply(whole(), BATCH), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [(2, 1), (1, 0), (0, 2)])
def test_a_suffix_gives_the_same(layers):
    model, batch = halves(layers)
    np.testing.assert_allclose(apply(model, batch), apply(whole(), BATCH), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [None, (2, 1)])
def test_the_classes_of_a_batch_alone(layers):
    model, batch = (whole(3), BATCH) if layers is None else halves(layers, 3)
    logits = np.asarray(apply(model, {**batch, "classes": CLASSES}))
    everything = np.asarray(apply(whole(), BATCH))
    np.testing.assert_allclose(logits[CLASSES], everything[CLASSES], rtol=1e-5, atol=1e-5)
    assert (logits[~CLASSES] == np.float32(NEVER)).all()
    np.testing.assert_allclose(apply(model, batch), everything, rtol=1e-5, atol=1e-5)  # evaluation: all classes


def test_gradients_are_finite_and_those_of_the_smaller_problem():
    def loss(p, model, batch, labels):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(model.apply(p, batch)), labels[:, None], axis=1))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    some = grad(params(), whole(3), {**BATCH, "classes": CLASSES}, jnp.array([4, 0, 4]))
    small = Model(PromptClassifier(CLIP, Texts({"tokens": TOKENS[[0, 2, 4]]})))
    expected = grad(params(), small, BATCH, jnp.array([2, 0, 2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), some, expected)


def test_texts_are_equal_by_content():
    one, same = (Texts({"tokens": TOKENS.copy()}) for _ in range(2))
    other = Texts({"tokens": TOKENS + 1})
    assert one == same and hash(one) == hash(same) and one != other and one != "tokens"
    assert whole() == Model(PromptClassifier(CLIP, same)) and hash(whole()) == hash(Model(PromptClassifier(CLIP, same)))


def test_wrong_uses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a VisionConfig reads no images with texts"):
        PromptClassifier(VISION, Texts({"tokens": TOKENS}))
    with pytest.raises(ValueError, match="count is 8 of 7 classes"):
        PromptClassifier(CLIP, Texts({"tokens": TOKENS}), 8)
    with pytest.raises(ValueError, match="family 'prompts of clip' has no Hugging Face form"):
        jft.save(whole(), params(), tmp_path / "out")
    model, _ = halves((2, 1))
    with pytest.raises(ValueError, match="no 'vision/features'; make it with the prefix"):
        model.apply(params(), BATCH)
