"""Masked weights in products of every kind, and the memory they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.dot import PerExpert, grouped_dot, take, transpose
from jft.methods.masks import Masked
from jft.models import core
from tests.methods import leaf

KEY = jax.random.key(1)


def test_masks_in_bfloat16_activations_are_those_of_the_float32_scores():
    """A score just below the threshold is the threshold in bfloat16."""
    how = Masked(sparsity=0, start="two_point")
    s = jnp.full((1, 2, 2), how.threshold).at[0, 0].multiply(0.9999)
    w = jax.tree.map(lambda x: x[0], how.bind(jnp.ones((1, 2, 2), jnp.bfloat16), s, True))
    np.testing.assert_array_equal(core.dot(jnp.eye(2, dtype=jnp.bfloat16), w), [[0, 0], [1, 1]])


def test_products_of_experts_and_tables():
    how = Masked(sparsity=0.3, start="two_point")
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
    how = Masked(sparsity=0.1, start="two_point")
    kept, s = how.init(KEY, jnp.ones((layers, width, width)))
    x = jnp.ones((2, width))

    def loss(w, structured):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(core.dot(h, w)), None), x, w)[0])

    tapped = leaf.largest_buffer(jax.grad(lambda s, k: loss(how.bind(k, s, True), True)), s, kept)
    plain = leaf.largest_buffer(jax.grad(lambda s, k: loss(how.bind(k, s, False), False)), s, kept)
    whole = layers * width * width * 4
    assert tapped < 0.5 * whole < plain
