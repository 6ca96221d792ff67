"""R-AMT: masks of the image encoder's attention, their penalty, and gradient dropout in a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import ClipConfig, Model, VisionConfig
from jft.models.clip import TextConfig
from jft.models.core import Execution
from jft.presets.r_amt import agreement_dropout
from tests.methods import decoder, leaf, learning

MUTATIONS = (
    ("jft/presets/r_amt.py", "(jnp.abs(a) + jnp.abs(b) + eps) + 1) / 2", "(jnp.abs(a) + jnp.abs(b) + eps) + 1)"),
    ("jft/presets/r_amt.py", "jnp.sign(a) * (a + b)", "jnp.sign(a) * (a - b)"),
    (
        "jft/presets/r_amt.py",
        "agreement_dropout(key, gradient, anchor, self.strength)",
        "agreement_dropout(key, anchor, gradient, self.strength)",
    ),
    ("jft/presets/r_amt.py", "(?!text/).*", ".*"),
    ("jft/presets/r_amt.py", "0.0, 5e-3,", "0.0, 1e-2,"),
    ("jft/presets/r_amt.py", "strict=True, ", ""),
    ("jft/presets/r_amt.py", "l2: float = 1e-4,", "l2: float = 1e-3,"),
    (
        "jft/methods/masks.py",
        "jnp.sqrt(jnp.sum(jnp.square(trained), axis=axes))",
        "jnp.sum(jnp.square(trained), axis=axes)",
    ),
)
KEY = jax.random.key(1)


def by_hand(s, l2):
    """Mask and gradient with the penalty ``l2 * ||s||_2`` of each matrix, float64."""
    mask = (s > 5e-3).astype(np.float64)
    norms = np.sqrt((s**2).sum((1, 2), keepdims=True))
    return mask, leaf.loss_and_grad(leaf.W * mask)[1] * leaf.W + l2 * s / norms


def test_forward_gradients_and_steps():
    how = jft.method("r_amt", l2=0.1).train
    kept, scores = how.init(KEY, leaf.w32())
    np.testing.assert_array_equal(leaf.bound(how, kept, scores), leaf.W32)
    scores = leaf.moved(scores, by=0.01).at[0, 0, 0].set(5e-3)
    exact = leaf.wide(scores)
    exact[0, 0, 0] = 5e-3
    mask, gradient = by_hand(exact, 0.1)
    np.testing.assert_array_equal(leaf.bound(how, kept, scores), leaf.W32 * mask)
    leaf.check_gradient(how, kept, scores, gradient)
    leaf.check_steps(how, kept, leaf.moved(scores, by=0.01), lambda s, _: by_hand(s, 0.1)[1], rate=1e-3)


def test_defaults_are_those_of_the_released_config():
    """vit_b16.yaml: SCALE 1e-2, THRESHOLD 5e-3 (masked where not above it), LOSS_WEIGHT 1e-4, GDR_LAMBDA 1."""
    method = jft.method("r_amt")
    scores = np.asarray(method.train.init(KEY, np.ones((1, 2, 2), np.float32))[1])
    np.testing.assert_allclose(scores, 1e-2)
    np.testing.assert_array_equal(method.train.mask(np.float32([5e-3, 5.001e-3])), [False, True])
    np.testing.assert_allclose(method.train.penalty(scores, jnp.asarray(scores)), 1e-4 * np.sqrt(4 * 1e-4), rtol=1e-5)
    assert method.rule.strength == 1.0 and jft.method("r_amt", dropout=0).rule is None


def test_the_text_tower_of_a_clip_is_left_alone():
    vision = VisionConfig(image=8, patch=4, channels=1, width=8, layers=1, heads=2, hidden=12)
    clip = Model(ClipConfig(vision, TextConfig(vocab=9, positions=5, width=8, layers=1, heads=2, hidden=12), 6))
    trains = lambda model: set(jft.method("r_amt").plan(model.abstract(), model).leaves)
    assert trains(clip) == {f"vision/layers/attn/{n}/w" for n in "qkvo"}
    assert trains(Model(vision)) == trains(decoder.MODEL) == {f"layers/attn/{n}/w" for n in "qkvo"}


@functools.cache
def _toward_base():
    """d/dw of the mean cross entropy to the base's predictions over the targets of a batch, float64."""
    model = Model(decoder.CONFIG, Execution(dtype=jnp.float64))

    def loss(params, base, tokens):
        predict = lambda p: jax.nn.log_softmax(model.apply(p, {"tokens": tokens})[:, :-1])
        return -jnp.mean(jnp.sum(jnp.exp(predict(base)) * predict(params), axis=-1))

    return jax.jit(jax.grad(loss))


def toward_base(weights, base, tokens):
    with jax.enable_x64(True):
        double = [tree.unflatten({p: jnp.asarray(w) for p, w in x.items()}) for x in (weights, base)]
        return {p: np.asarray(g) for p, g in tree.flatten(_toward_base()(*double, tokens)).items()}


def test_dropout_in_a_step_is_that_of_the_formula():
    """The second step of a run: the score's change over the rate is a, where P > U, else 0 (masktuning.py)."""
    params, data, rate, l2 = decoder.parameters(), decoder.batches(2), 0.3, 0.01
    method = jft.method("r_amt", l2=l2, also="final_norm/")
    sgd = {"name": "sgd", "lr": rate, "momentum": 0.0, "clip": 0.0}
    run = functools.partial(
        jft.finetune, decoder.MODEL, params, data, method=method, optimizer=sgd, log={"progress": False}
    )
    before, after = (run(steps=n).state.trained for n in (1, 2))
    base = decoder.wide(params)
    scores = {p: np.asarray(s, np.float64) for p, s in before.items() if p.endswith("/w")}
    assert 0.02 < np.mean([np.mean(s <= 5e-3) for s in scores.values()]) < 0.9
    now = base | {p: base[p] * (s > 5e-3) for p, s in scores.items()}
    now |= {"final_norm/scale": np.asarray(before["final_norm/scale"], np.float64)}
    task = decoder.gradient(now, data[1])
    anchor = toward_base(now, base, data[1]["tokens"])
    draws = jax.random.split(jax.random.fold_in(jax.random.key(0), jnp.int32(-2)), len(before))
    dropped = total = 0
    for key, path in zip(draws, sorted(before), strict=True):
        a, b = task[path], anchor[path]
        if path in scores:
            s = scores[path]
            a, b = a * base[path] + l2 * s / np.sqrt((s**2).sum((1, 2), keepdims=True)), b * base[path]
        likely = (np.sign(a) * (a + b) / (np.abs(a) + np.abs(b) + 1e-8) + 1) / 2
        uniform = np.asarray(jax.random.uniform(key, a.shape))
        sure = np.abs(likely - uniform) > 1e-3
        change = (np.asarray(before[path], np.float64) - np.asarray(after[path])) / rate
        np.testing.assert_allclose(change[sure], np.where(likely > uniform, a, 0)[sure], atol=2e-6)
        dropped, total = dropped + np.sum(likely <= uniform), total + a.size
    assert 0.03 < dropped / total < 0.5


def test_dropped_entries_keep_what_the_strength_leaves():
    a, b = np.float32([1, -1, 1, -3, 2, 0]), np.float32([2, -5, -1, 1, -6, 1])
    many = jax.vmap(lambda k: agreement_dropout(k, {"s": a}, {"s": b})["s"])(jax.random.split(KEY, 4000))
    np.testing.assert_allclose((many != 0).mean(0)[:5], [1, 1, 1 / 2, 3 / 4, 1 / 4], atol=0.03)
    half = agreement_dropout(KEY, np.full(1000, 2, np.float32), np.full(1000, -6, np.float32), strength=0.5)
    assert set(np.unique(half)) == {1.0, 2.0}


def test_it_learns_and_decay_leaves_the_scores_alone():
    method = jft.method("r_amt", include="up/")
    learning.check(method, 1e-3, {"layers/up/w"})
    assert learning.moved_by_decay(method) == {"layers/up/w": False}
    with pytest.raises(ValueError, match="matches no weight"):
        jft.method("r_amt").plan(learning.MODEL.init(KEY), learning.MODEL)
