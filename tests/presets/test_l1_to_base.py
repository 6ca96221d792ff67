"""The L1 distance from the base: its mean over what trains, with no pull at the base itself."""

import jax
import numpy as np

import jft
from jft import tree
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/presets/l1_to_base.py", "weight: float = 0.1", "weight: float = 0.2"),
    ("jft/presets/l1_to_base.py", "mean: bool = True", "mean: bool = False"),
    ("jft/presets/l1_to_base.py", "exclude=HEADS", "exclude=()"),
    ("jft/methods/penalties.py", "x * jnp.sign(jax.lax.stop_gradient(x))", "jnp.abs(x)"),
)
KEY = jax.random.key(0)


def test_value_and_gradient():
    """0.1 * |w - w0|_1 / N, the regulariser of Ansell et al. 2022 and its coefficient."""
    model = learning.MODEL
    params = model.init(KEY)
    plan = jft.method("l1_to_base").plan(params, model)
    kept, trained = jax.jit(plan.init)(KEY, params)
    assert set(trained) == learning.ALL
    base, moved = leaf.wide(tree.flatten(params)), leaf.moved(trained)
    away = {p: x - base[p] for p, x in leaf.wide(moved).items()}
    count = sum(x.size for x in away.values())
    penalty = jax.jit(jax.value_and_grad(lambda t: plan.penalty(kept, t)))
    value, gradient = penalty(moved)
    np.testing.assert_allclose(value, 0.1 * sum(np.abs(x).sum() for x in away.values()) / count, rtol=1e-5)
    leaf.close(gradient, {p: 0.1 * np.sign(x) / count for p, x in away.items()}, 1e-7)
    value, still = penalty(trained)
    assert value == 0 and not any(np.any(g) for g in still.values())
    total = jft.method("l1_to_base", mean=False).penalties[0](plan, kept, moved)
    np.testing.assert_allclose(total, 0.1 * sum(np.abs(x).sum() for x in away.values()), rtol=1e-5)


def test_it_learns():
    learning.check(jft.method("l1_to_base"), 1e-2, learning.ALL)
