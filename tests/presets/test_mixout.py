"""Mixout: the mixed weight, its expectation and its gradient, and which weights are mixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import ClipConfig, DecoderConfig, Model, VisionConfig
from jft.models.clip import TextConfig
from jft.presets.mixout import Mixout
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/presets/mixout.py", "(v - base) / (1 - self.p)", "(v - base)"),
    ("jft/presets/mixout.py", "shape = (v.shape[0], 1) if", "shape = (1, v.shape[1]) if"),
    ("jft/presets/mixout.py", "if key is None or not self.linear:", "if key is None:"),
    ("jft/presets/mixout.py", "    p: float = 0.9,\n", "    p: float = 0.8,\n"),
    ("jft/methods/plan.py", 'and "patch" not in p.split("/")', ""),
)
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


DECODER = Model(DecoderConfig(vocab=9, width=8, layers=2, heads=2, head_size=4, hidden=12, tied=True))


def mixed_paths(model):
    """Where a training step sees another weight than the trained one, by path."""
    params = model.init(KEY)
    plan = jft.method("mixout").plan(params, model)
    kept, trained = plan.init(KEY, params)
    moved = jax.tree.map(lambda x: x + 1, trained)
    seen = jax.jit(lambda k, t: plan.bind(k, t, key=KEY))(kept, moved)
    found = tree.flatten(seen, is_leaf=lambda x: hasattr(x, "how"))
    return {p for p, x in found.items() if p in moved and (hasattr(x, "how") or not np.array_equal(x, moved[p]))}


def test_matrices_of_linear_layers_alone_are_mixed():
    """The released MixLinear takes the place of nn.Linear: no embedding table, position table or patch convolution."""
    products = {f"layers/attn/{n}/w" for n in "qkvo"} | {f"layers/mlp/{n}/w" for n in ("gate", "up", "down")}
    assert mixed_paths(DECODER) == products
    towers = Model(
        ClipConfig(
            VisionConfig(image=8, patch=4, channels=1, width=8, layers=1, heads=2, hidden=12),
            TextConfig(vocab=9, positions=5, width=8, layers=1, heads=2, hidden=12),
            6,
        )
    )
    inside = {f"layers/attn/{n}/w" for n in "qkvo"} | {f"layers/mlp/{n}/w" for n in ("up", "down")}
    outside = {"vision_projection/w", "text_projection/w"}
    assert mixed_paths(towers) == {f"{tower}/{p}" for tower in ("vision", "text") for p in inside} | outside


def test_it_learns_at_the_paper_s_probability_by_default():
    """Lee et al. 2020 use 0.7 to 0.9; one draw for all weights that leave an input, as in their code."""
    assert jft.method("mixout").train == Mixout(0.9, "neuron")
    learning.check(jft.method("mixout", p=0.5), 1e-2, learning.ALL)
