"""L2-SP: what is pretrained is drawn to its values, a new head to zero."""

import jax
import numpy as np

import jft
from jft import tree
from jft.methods import L2SP, InPlace
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/presets/l2_sp.py", "head: float = 0.01", "head: float = 0.1"),
    ("jft/presets/l2_sp.py", "weight: float = 0.01", "weight: float = 0.1"),
    ("jft/presets/l2_sp.py", "new=HEADS, new_weight=head", "new=HEADS, new_weight=weight"),
    ("jft/methods/penalties.py", "to_zero = self.new_weight / 2", "to_zero = self.new_weight"),
    ("jft/methods/penalties.py", "return self.weight / 2 * _sized", "return self.weight * _sized"),
)
KEY = jax.random.key(0)


def test_the_head_is_drawn_to_zero_and_the_rest_to_its_values():
    """alpha / 2 |w - w0|^2 + beta / 2 |head|^2 of Li et al. 2018, section 3; their code has 0.01 for both (run_exp.py)."""
    assert jft.method("l2_sp").penalties == jft.method("l2_sp", weight=0.01, head=0.01).penalties
    model = learning.MODEL
    params = model.init(KEY)
    plan = jft.method("l2_sp", weight=0.7, head=0.3, also="^head/").plan(params, model)
    assert set(plan.leaves) == learning.ALL | {"head/w"} and all(isinstance(x, InPlace) for x in plan.leaves.values())
    kept, trained = jax.jit(plan.init)(KEY, params)
    base, moved = leaf.wide(tree.flatten(params)), leaf.moved(trained)
    now = leaf.wide(moved)
    away = {p: now[p] - base[p] for p in learning.ALL}
    total = 0.35 * sum((x**2).sum() for x in away.values()) + 0.15 * (now["head/w"] ** 2).sum()
    value, gradient = jax.jit(jax.value_and_grad(lambda t: plan.penalty(kept, t)))(moved)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    leaf.close(gradient, {p: 0.7 * x for p, x in away.items()} | {"head/w": 0.3 * now["head/w"]})


def test_without_a_new_head_all_is_drawn_to_the_base():
    assert jft.method("l2_sp").penalties[0] == L2SP(0.01, new=tree.HEADS, new_weight=0.01)
    learning.check(jft.method("l2_sp"), 1e-2, learning.ALL)
