"""Mask fine-tuning: the largest scores of each matrix, and the straight-through gradient of their size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.presets.mask_finetuning import TopMask
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/presets/mask_finetuning.py", "return jnp.abs(s)\n", "return s\n"),
    ("jft/presets/mask_finetuning.py", "top_each(jnp.abs(trained),", "top_each(trained,"),
    ("jft/presets/mask_finetuning.py", "    keep: float = 0.9,\n    layers", "    keep: float = 0.8,\n    layers"),
    ("jft/presets/mask_finetuning.py", "self.std * jax.random.normal", "jax.random.normal"),
    ("jft/presets/mask_finetuning.py", "math.sqrt(w.shape[-2])", "math.sqrt(w.shape[-1])"),
)
KEY = jax.random.key(1)
HOW = TopMask(keep=0.6)


def by_hand(s):
    """Mask and gradient of the paper, float64: of ties the earlier weight stays."""
    keep, mask = round(0.6 * leaf.I * leaf.O), np.zeros_like(s)
    for m, x in zip(mask, np.abs(s), strict=True):
        m.flat[np.argsort(-x, axis=None, kind="stable")[:keep]] = 1
    return mask, leaf.loss_and_grad(leaf.W * mask)[1] * leaf.W * np.sign(s)


def test_forward_gradients_and_steps():
    kept, scores = HOW.init(KEY, leaf.w32())
    scores = leaf.moved(scores, by=0.01)
    mask, gradient = by_hand(leaf.wide(scores))
    np.testing.assert_array_equal(leaf.bound(HOW, kept, scores), leaf.W32 * mask)
    leaf.check_gradient(HOW, kept, scores, gradient)
    leaf.check_steps(HOW, kept, scores, lambda s, _: by_hand(s)[1], rate=1e-3)
    leaf.check_transforms(HOW, kept, scores)
    encoded = HOW.encode(leaf.w32(), kept, scores)
    np.testing.assert_array_equal(encoded.mask, mask)
    assert encoded.nbytes == leaf.L * leaf.I * 1 + 4


def test_defaults_and_where_scores_start():
    """90 % of each matrix stay (Zhang et al. 2025); scores are drawn by the model's initialisation, N(0, 0.02^2)."""
    how = jft.method("mask_finetuning").train
    assert how.keep == 0.9
    w = np.ones((4, 50, 20), np.float32)
    assert abs(np.std(how.init(KEY, w)[1]) - 0.02) < 1e-3
    assert 0.99 < np.abs(TopMask(std=None).init(KEY, w)[1]).max() * 50**0.5 <= 1


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.9, 1.0])
def test_the_number_kept_is_exact_in_every_matrix_also_with_ties(keep):
    how = TopMask(keep=keep)
    ties = np.round(3 * np.random.default_rng(0).normal(size=(4, 10, 7))).astype(np.float32)
    count = max(1, round(keep * 70))
    mask = np.asarray(jax.jit(jax.vmap(how.mask))(ties))
    np.testing.assert_array_equal(mask, how.mask(jnp.asarray(ties)))
    for m, s in zip(mask, np.abs(ties), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(m), np.sort(np.argsort(-s, axis=None, kind="stable")[:count]))


def test_it_learns_in_the_layers_named_and_decay_leaves_the_scores_alone():
    learning.check(jft.method("mask_finetuning", keep=0.75), 1e-2, learning.LINEAR, at_base=False)
    some = jft.method("mask_finetuning", layers=[1])
    assert learning.moved_by_decay(some) == dict.fromkeys(learning.LINEAR, (False,))
    shapes = jax.eval_shape(lambda p: some.plan(p, learning.MODEL).init(KEY, p)[1], learning.MODEL.init(KEY))
    assert shapes["layers/up/w"][0].shape == (1, 8, 16)


def test_a_fraction_of_nothing_is_refused():
    with pytest.raises(ValueError, match="fraction of each matrix that stays"):
        TopMask(keep=0.0)
