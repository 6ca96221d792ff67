"""A preset on the smallest model: what trains, where it starts, that it learns, what comes out, and what decays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import jft
from jft import tree
from jft.train.optimizers import Optimizer
from tests.methods import toy

KEY = jax.random.key(0)
LINEAR = {"layers/up/w", "layers/down/w"}
ALL = {"layers/norm/scale", "layers/norm/bias", "layers/up/w", "layers/up/b", "layers/down/w"}
MODEL = toy.model(layers=2).with_(remat="full")


@jax.jit
def outputs(params):
    return MODEL.apply(params, toy.batch(16))


def trained_for(method, rate, steps=40):
    """The plan, what is kept and what has trained toward another draw's outputs, and the distance from those."""
    params = MODEL.init(KEY)
    plan = method.plan(params, MODEL)
    kept, start = jax.jit(plan.init)(KEY, params)
    y = outputs(MODEL.init(jax.random.key(9)))
    transform = optax.adam(rate)

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

    return params, plan, kept, start, run(start), lambda p: np.mean(np.square(outputs(p) - np.asarray(y)))


def check(method, rate, paths, at_base=True):
    """Trains ``paths`` in float32, starts at the base (or not), learns, and encodes what it merges."""
    params, plan, kept, start, trained, fit = trained_for(method, rate)
    assert set(start) == paths
    assert {x.dtype for x in jax.tree.leaves(start)} == {jnp.dtype("float32")}
    merge = jax.jit(plan.merged)
    same = jax.tree.map(np.array_equal, merge(params, kept, start), params)
    assert all(jax.tree.leaves(same)) == at_base
    merged = merge(params, kept, trained)
    assert fit(merged) < 0.97 * fit(params)
    bound = jax.jit(lambda k, t: outputs(plan.bind(k, t)))(kept, trained)
    np.testing.assert_allclose(bound, outputs(merged), rtol=1e-4, atol=1e-5)
    tau, flat = plan.encode(params, kept, trained), tree.flatten(params)
    changed = flat | jax.jit(lambda tau: {p: change.add_to(flat[p]) for p, change in tau.items()})(tau)
    for path, w in tree.flatten(merged).items():
        np.testing.assert_allclose(changed[path], w, atol=1e-5)
    _check_shardings(plan, params, kept, start)
    entry = jft.methods.entries()[method.name]
    assert entry.summary and "arXiv" in entry.paper and entry.card


def _check_shardings(plan, params, kept, trained):
    weights = {p: PartitionSpec() for p in tree.flatten(params)}
    weights |= {"layers/up/w": PartitionSpec(None, "fsdp", "tensor")}
    found = plan.specs(weights, params)
    is_spec = lambda x: isinstance(x, PartitionSpec)
    for specs, arrays in zip(found, (kept, trained), strict=True):
        assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(arrays)
        for spec, x in zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(arrays), strict=True):
            assert len(spec) <= x.ndim


def moved_by_decay(method, params=None, model=MODEL):
    """Of each leaf that trains, whether an update of AdamW moves it that has no gradient and decays by 0.1."""
    params = model.init(KEY) if params is None else params
    plan = method.plan(params, model)
    trained = jax.tree.map(lambda x: np.ones(x.shape, np.float32), jax.eval_shape(plan.init, KEY, params)[1])
    decays = functools.partial(plan.decays, paths=frozenset(trained))
    transform = Optimizer("adamw", weight_decay=0.1).transform(decays)
    update = jax.jit(lambda t: transform.update(jax.tree.map(jnp.zeros_like, t), transform.init(t), t)[0])
    return jax.tree.map(lambda x: bool(np.any(x)), update(trained))
