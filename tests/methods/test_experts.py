"""Chosen experts trained in place: parametrisation, steps against dense training of them alone, the delta's support."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jft import delta, tree
from jft.delta import ExpertLayout, experts
from jft.methods import InPlaceSelected
from jft.models import Model
from jft.models.core import Execution
from jft.models.decoder import DecoderConfig
from jft.models.moe import Experts
from tests.methods import leaf

CONFIG = DecoderConfig(vocab=17, width=8, layers=2, heads=2, hidden=8, experts=Experts(5, 2, 6), init_std=0.4)
MASK = np.array([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1]], bool)
PATHS = [f"layers/mlp/experts/{name}/w" for name in ("gate", "up", "down")]
TOKENS = np.random.default_rng(1).integers(0, 17, (2, 6))

HOW = InPlaceSelected(ExpertLayout())


@functools.cache
def params():
    rng = np.random.default_rng(0)
    return {p: jnp.asarray(rng.standard_normal(s) / 2, jnp.float32) for p, s in CONFIG.shapes().items()}


def loss(flat, execution="dense"):
    return jnp.mean(jnp.square(Model(CONFIG, Execution(experts=execution)).apply(tree.unflatten(flat), TOKENS)))


@functools.cache
def trained_densely(steps=3, rate=0.1):
    """Gradient descent on whole weights, with all but the chosen experts put back."""
    flat = dict(params())
    gradient = jax.jit(jax.grad(loss))
    for _ in range(steps):
        g = gradient(flat)
        flat |= {p: jnp.where(MASK[:, :, None, None], flat[p] - rate * g[p], flat[p]) for p in PATHS}
    return flat


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("execution", ["dense", "ragged"])
def test_steps_are_those_of_dense_training_of_the_chosen(live, execution):
    how, at = InPlaceSelected(ExpertLayout(), live), experts.locate(MASK)
    split = {p: how.init(jax.random.key(0), params()[p], at) for p in PATHS}
    kept, trained = ({p: s[i] for p, s in split.items()} for i in (0, 1))

    @jax.jit
    def step(kept, trained):
        bound = lambda t: params() | {p: how.bind(kept[p], t[p], True) for p in PATHS}
        g = jax.grad(lambda t: loss(bound(t), execution))(trained)
        trained = jax.tree.map(lambda v, g: v - 0.1 * g, trained, g)
        written = {p: {**kept[p], "w": how.spread(kept[p], trained[p], kept[p]["w"])} for p in PATHS}
        return written if live else kept, trained

    for _ in range(3):
        kept, trained = step(kept, trained)
    expected = trained_densely()
    for path in PATHS:
        assert trained[path].shape == (2, 3, *params()[path].shape[2:])
        np.testing.assert_allclose(how.bind(kept[path], trained[path], False), expected[path], rtol=1e-5, atol=1e-6)
        change = how.encode(params()[path], kept[path], trained[path])
        assert isinstance(change, delta.Slices)
        dense = np.asarray(change.dense())
        np.testing.assert_allclose(dense, expected[path] - params()[path], atol=1e-6)
        assert not dense[~MASK].any() and len(change.indices) == MASK.sum() * dense.shape[2]


def test_plain_weights_have_the_same_gradient():
    how, at = HOW, experts.locate(MASK)
    kept, trained = how.init(jax.random.key(0), params()[PATHS[0]], at)
    gradients = [
        jax.jit(jax.grad(lambda t, s=structured: loss(params() | {PATHS[0]: how.bind(kept, t, s)})))(trained)
        for structured in (True, False)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_specs():
    at = experts.locate(MASK)
    kept, trained = leaf.specs(HOW, PartitionSpec(None, "tensor", "fsdp"), params()[PATHS[0]], at)
    assert trained == PartitionSpec(None, None, "fsdp", None)
    assert kept == {"w": PartitionSpec(None, "tensor", "fsdp"), "at": PartitionSpec(None, None), "origin": trained}
