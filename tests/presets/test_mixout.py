"""Mixout: the mixed weight, its expectation and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.presets.mixout import Mixout
from tests.methods import leaf

KEY = jax.random.key(2)


def drawn(how, key):
    """M of each layer, from the key as the parametrisation splits it."""
    shape = (leaf.I, 1) if how.unit == "neuron" else (leaf.I, leaf.O)
    kept = [jax.random.bernoulli(k, 1 - how.p, shape) for k in jax.random.split(key, leaf.L)]
    return 1 - np.asarray(jnp.stack(kept), np.float64)


def mixed(how, v, key):
    """The paper's formula, and the gradient in v."""
    m = drawn(how, key) if key is not None else np.zeros_like(v)
    p = how.p if key is not None else 0.0
    w = ((1 - m) * v + m * leaf.W - p * leaf.W) / (1 - p)
    return w, leaf.loss_and_grad(w)[1] * (1 - m) / (1 - p)


@pytest.mark.parametrize("how", [Mixout(0.7), Mixout(0.5, unit="weight"), Mixout(0.0)], ids=str)
def test_forward_gradients_and_steps(how):
    kept, trained = how.init(KEY, leaf.w32())
    np.testing.assert_array_equal(how.bind(kept, trained, False, KEY), leaf.w32())
    trained = leaf.moved(trained)
    w, gradient = mixed(how, leaf.wide(trained), KEY)
    leaf.close(how.bind(kept, trained, False, KEY), w)
    leaf.check_gradient(how, kept, trained, gradient, KEY)
    leaf.check_gradient(how, kept, trained, leaf.loss_and_grad(leaf.wide(trained))[1])
    leaf.check_steps(how, kept, trained, lambda v, k: mixed(how, v, k)[1], keys=jax.random.split(KEY, 3))
    leaf.check_transforms(how, kept, trained, KEY)


def test_the_expectation_is_the_trained_weight_and_evaluation_has_no_noise():
    how = Mixout(0.7, unit="weight")
    kept, trained = how.init(KEY, leaf.w32())
    trained = leaf.moved(trained)
    many = jax.vmap(lambda k: how.bind(kept, trained, False, k))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(many.mean(0), trained, atol=0.12)
    np.testing.assert_array_equal(how.bind(kept, trained, True), trained)
    np.testing.assert_allclose(how.encode(leaf.w32(), kept, trained).dense(), trained - leaf.w32())
    np.testing.assert_allclose(leaf.change(how, kept, trained), trained - leaf.w32())


def test_neurons_are_mixed_as_one_and_vectors_not_at_all():
    how = Mixout(0.5).fitted(lead=1)
    kept, trained = how.init(KEY, leaf.w32())
    w = np.asarray(how.bind(kept, trained + 1, False, KEY) - leaf.w32())
    assert all(len(np.unique(row.round(4))) == 1 for row in w.reshape(-1, leaf.O))
    assert set(np.unique(w.round(4))) == {0.0, 2.0}
    vectors = jnp.zeros((3, 20))
    np.testing.assert_array_equal(how.bind(vectors, vectors + 1, False, KEY), vectors + 1)


def test_wrong_uses_are_refused():
    with pytest.raises(ValueError, match="probability of mixing"):
        Mixout(1.0)
    with pytest.raises(ValueError, match="choose neuron or weight"):
        Mixout(unit="layer")
