"""Masked weights: what is masked, the straight-through gradient, the memory it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.dot import PerExpert, grouped_dot, take, transpose
from jft.methods.masks import Masked
from jft.models import core
from jft.presets.mask_finetuning import TopMask
from jft.presets.r_amt import agreement_dropout
from tests.methods import leaf

KEY = jax.random.key(1)


def masked(how):
    kept, trained = how.init(KEY, leaf.w32())
    return kept, leaf.moved(trained, by=0.01)


def by_hand(how, s):
    """Mask and straight-through gradient in float64."""
    if isinstance(how, TopMask):
        keep = round(how.keep * leaf.I * leaf.O)
        mask = np.zeros_like(s)
        for m, x in zip(mask, np.abs(s), strict=True):
            m.flat[np.argsort(-x, axis=None, kind="stable")[:keep]] = 1
        return mask, leaf.loss_and_grad(leaf.W * mask)[1] * leaf.W * np.sign(s)
    mask = (s > how.threshold if how.strict else s >= how.threshold).astype(np.float64)
    gradient = leaf.loss_and_grad(leaf.W * mask)[1] * leaf.W
    norms = np.sqrt((s**2).sum((1, 2), keepdims=True))
    return mask, gradient + how.l2 * s / norms


HOWS = [Masked(sparsity=0.2), Masked(sparsity=0, strict=True, l2=0.1), TopMask(keep=0.6)]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_forward_and_gradients(how):
    kept, trained = masked(how)
    mask, gradient = by_hand(how, leaf.wide(trained))
    np.testing.assert_array_equal(jax.jit(how.mask)(trained), mask)
    np.testing.assert_array_equal(leaf.bound(how, kept, trained), leaf.W32 * mask)
    leaf.check_gradient(how, kept, trained, gradient)
    leaf.check_transforms(how, kept, trained)
    encoded = how.encode(leaf.w32(), kept, trained)
    np.testing.assert_array_equal(jax.jit(lambda change, w: change.add_to(w))(encoded, leaf.W32), leaf.W32 * mask)
    assert encoded.nbytes == leaf.L * leaf.I * 1 + 4


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_three_steps(how):
    kept, trained = masked(how)
    leaf.check_steps(how, kept, trained, lambda s, _: by_hand(how, s)[1], rate=1e-3)


def test_scores_start_from_two_points_and_mask_the_fraction_asked_for():
    w = jnp.ones((4, 50, 50))
    kept, scores = Masked(sparsity=0.05, threshold=0.01, margin=0.002).init(KEY, w)
    assert kept is w
    np.testing.assert_allclose(np.unique(scores), [0.008, 0.012], rtol=1e-6)
    assert abs(1 - Masked(threshold=0.01).mask(scores).mean() - 0.05) < 0.01
    _, scores = TopMask().init(KEY, w)
    assert abs(scores.std() - 0.02) < 1e-3
    _, scores = TopMask(std=None).init(KEY, w)
    assert 0.99 < float(jnp.abs(scores).max()) * 50**0.5 <= 1
    _, scores = Masked(sparsity=0, threshold=5e-3, margin=5e-3).init(KEY, w)
    np.testing.assert_allclose(scores, 1e-2, rtol=1e-6)


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.9, 1.0])
def test_the_number_kept_is_exact_in_every_matrix_also_with_ties(keep):
    how = TopMask(keep=keep)
    ties = jnp.round(3 * jax.random.normal(KEY, (4, 10, 7)))
    count = max(1, round(keep * 70))
    mask = np.asarray(how.mask(ties))
    np.testing.assert_array_equal(mask.sum((1, 2)), count)
    for m, s in zip(mask, np.abs(ties), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(m), np.sort(np.argsort(-s, axis=None, kind="stable")[:count]))
    np.testing.assert_array_equal(mask, jax.jit(jax.vmap(how.mask))(ties))


def test_masks_in_bfloat16_activations_are_those_of_the_float32_scores():
    """A score just below the threshold is the threshold in bfloat16."""
    how = Masked(sparsity=0)
    s = jnp.full((1, 2, 2), how.threshold).at[0, 0].multiply(0.9999)
    w = jax.tree.map(lambda x: x[0], how.bind(jnp.ones((1, 2, 2), jnp.bfloat16), s, True))
    np.testing.assert_array_equal(core.dot(jnp.eye(2, dtype=jnp.bfloat16), w), [[0, 0], [1, 1]])


def test_products_of_experts_and_tables():
    how = Masked(sparsity=0.3)
    w = jax.random.normal(KEY, (2, 3, 4, 5))
    kept, s = how.init(KEY, w)

    @jax.jit
    def results(kept, s):
        layer = jax.tree.map(lambda x: x[1], how.bind(kept, s, True))
        plain, one = how.bind(kept, s, False)[1], jax.tree.map(lambda x: x[0], layer)
        x, sizes, ids = jax.random.normal(KEY, (6, 4)), jnp.asarray([1, 3, 2]), jnp.asarray([3, 1])
        products = [
            (grouped_dot(x, layer, sizes), grouped_dot(x, plain, sizes)),
            (core.dot(x, PerExpert(layer)), core.dot(x, PerExpert(plain))),
        ]
        return products, [(take(one, ids, jnp.float32), plain[0][ids]), (transpose(one), plain[0].T)]

    products, parts = results(kept, s)
    for found, expected in products:
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for found, expected in parts:
        np.testing.assert_allclose(found, expected)


@pytest.mark.optimized
def test_masked_weights_of_all_layers_never_exist_at_once():
    """Backward through a scan of 16 layers saves no masked weight: its memory is that of few layers, not of all."""
    layers, width = 16, 64
    how = Masked(sparsity=0.1)
    kept, s = how.init(KEY, jnp.ones((layers, width, width)))
    x = jnp.ones((2, width))

    def loss(w, structured):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(core.dot(h, w)), None), x, w)[0])

    tapped = leaf.largest_buffer(jax.grad(lambda s, k: loss(how.bind(k, s, True), True)), s, kept)
    plain = leaf.largest_buffer(jax.grad(lambda s, k: loss(how.bind(k, s, False), False)), s, kept)
    whole = layers * width * width * 4
    assert tapped < 0.5 * whole < plain


def test_agreement_dropout_keeps_with_the_probability_of_the_formula():
    a = jnp.asarray([1.0, -1.0, 1.0, -3.0, 2.0, 0.0])
    b = jnp.asarray([2.0, -5.0, -1.0, 1.0, -6.0, 1.0])
    likely = np.array([1, 1, 1 / 2, 3 / 4, 1 / 4, 1 / 2])
    many = jax.vmap(lambda k: agreement_dropout(k, {"s": a}, {"s": b})["s"])(jax.random.split(KEY, 4000))
    np.testing.assert_allclose((many != 0).mean(0)[:5], likely[:5], atol=0.03)
    assert set(np.unique(many[:, 4])) == {0.0, 2.0}
    half = agreement_dropout(KEY, jnp.full(1000, 2.0), jnp.full(1000, -6.0), strength=0.5)
    assert set(np.unique(half)) == {1.0, 2.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Masked(sparsity=1.0), "fraction masked at the start"),
        (lambda: Masked(margin=0.0), "must be above 0"),
        (lambda: TopMask(keep=0.0), "fraction of each matrix that stays"),
        (lambda: leaf.change(Masked(), jnp.ones((2, 2)), jnp.ones((2, 2))), "no base to stay near"),
    ],
)
def test_wrong_uses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
