"""Presets of gated and masked training on a small model: what trains, where it starts, that it learns, what comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jft
from jft import tree
from tests.methods import toy

KEY = jax.random.key(0)
LINEAR = {"layers/up/w", "layers/down/w"}
ALL = {"layers/norm/scale", "layers/norm/bias", "layers/up/w", "layers/up/b", "layers/down/w"}
# preset: options, learning rate, paths that train, whether it starts at the base
PRESETS = {
    "diff_pruning": ({"alpha_rate": 10.0}, 1e-2, ALL, True),
    "taps": ({"weight": 0.01}, 1e-2, LINEAR, True),
    "masking": ({}, 1e-3, LINEAR, False),
    "mask_finetuning": ({"keep": 0.75}, 1e-2, LINEAR, False),
    "r_amt": ({"include": "up/"}, 1e-3, {"layers/up/w"}, True),
    "finegates": ({"rank": 2}, 1e-2, LINEAR, True),
    "diablo": ({"blocks": 4}, 1e-2, LINEAR, True),
    "mixout": ({"p": 0.5}, 1e-2, ALL, True),
    "l2_sp": ({}, 1e-2, ALL, True),
    "l1_to_base": ({}, 1e-2, ALL, True),
}


MODEL = toy.model(layers=2).with_(remat="full")


@functools.cache
def setup(name):
    params = MODEL.init(KEY)
    plan = jft.method(name, **PRESETS[name][0]).plan(params, MODEL)
    return params, plan, *jax.jit(plan.init)(KEY, params)


@jax.jit
def outputs(params):
    return MODEL.apply(params, toy.batch(16))


def trained_for(name, steps=40):
    _, plan, kept, trained = setup(name)
    y = outputs(MODEL.init(jax.random.key(9)))
    transform = optax.adam(PRESETS[name][1])

    def loss(t, key):
        penalty = plan.penalty(kept, t)
        fit = jnp.mean(jnp.square(outputs(plan.bind(kept, t, key=key)) - y))
        return fit if penalty is None else fit + penalty

    @jax.jit
    def run(t):
        def step(carry, key):
            t, state = carry
            updates, state = transform.update(jax.grad(loss)(t, key), state, t)
            return (jax.tree.map(lambda v, u, s: v + s * u, t, updates, plan.scales(t)), state), None

        keys = jax.random.split(KEY, steps)
        return jax.lax.scan(step, (t, transform.init(t)), keys)[0][0]

    return run(trained), lambda params: np.mean(np.square(outputs(params) - np.asarray(y)))


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    _, _, paths, at_base = PRESETS[name]
    params, plan, kept, start = setup(name)
    assert set(start) == paths
    assert {x.dtype for x in jax.tree.leaves(start)} == {jnp.dtype("float32")}
    merge = jax.jit(plan.merged)
    same = jax.tree.map(np.array_equal, merge(params, kept, start), params)
    assert all(jax.tree.leaves(same)) == at_base
    trained, fit = trained_for(name)
    merged = merge(params, kept, trained)
    assert fit(merged) < 0.97 * fit(params)
    bound = jax.jit(lambda k, t: outputs(plan.bind(k, t)))(kept, trained)
    np.testing.assert_allclose(bound, outputs(merged), rtol=1e-4, atol=1e-5)
    tau, flat = plan.encode(params, kept, trained), tree.flatten(params)
    changed = flat | jax.jit(lambda tau: {p: change.add_to(flat[p]) for p, change in tau.items()})(tau)
    for path, w in tree.flatten(merged).items():
        np.testing.assert_allclose(changed[path], w, atol=1e-5)


def test_specs_have_the_structure_of_what_they_shard():
    from jax.sharding import PartitionSpec as P

    for name in PRESETS:
        params, plan, kept, trained = setup(name)
        weights = {p: P() for p in tree.flatten(params)} | {"layers/up/w": P(None, "fsdp", "tensor")}
        kept_specs, specs = plan.specs(weights, params)
        leaf = lambda x: isinstance(x, P)
        assert jax.tree.structure(specs, is_leaf=leaf) == jax.tree.structure(trained)
        assert jax.tree.structure(kept_specs, is_leaf=leaf) == jax.tree.structure(kept)
        for spec, x in zip(jax.tree.leaves(specs, is_leaf=leaf), jax.tree.leaves(trained), strict=True):
            assert len(spec) <= x.ndim


def test_every_preset_says_what_it_does():
    for name in PRESETS:
        entry = jft.methods.entries()[name]
        assert entry.summary and "arXiv" in entry.paper
