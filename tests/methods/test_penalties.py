"""Penalties on the plan of a small model."""

import jax
import numpy as np
import pytest

from jft import tree
from jft.methods.low_rank import LowRank
from jft.methods.masks import Masked
from jft.methods.parametrise import InPlace
from jft.methods.penalties import L2SP, L1ToBase, Nuclear
from jft.methods.plan import Method
from jft.methods.select import Select
from tests.methods import leaf, toy

KEY = jax.random.key(0)


def planned(train, *penalties, **select):
    model = toy.model(layers=3)
    params = model.init(KEY)
    plan = Method(Select(**select), train, penalties=penalties).plan(params, model)
    kept, trained = plan.init(KEY, params)
    return params, plan, kept, trained


def test_l1_and_l2_to_the_base():
    params, plan, kept, trained = planned(InPlace(), L1ToBase(0.3), L2SP(0.7), include=("up/w", "up/b"))
    assert float(plan.penalty(kept, trained)) == 0
    moved = leaf.moved(trained)
    base = tree.flatten(params)
    change = {p: leaf.wide(x) - leaf.wide(base[p]) for p, x in moved.items()}
    total = sum(0.3 * np.abs(x).sum() + 0.35 * (x**2).sum() for x in change.values())
    np.testing.assert_allclose(plan.penalty(kept, moved), total, rtol=1e-5)
    gradient = jax.grad(lambda t: plan.penalty(kept, t))(moved)
    leaf.close(gradient, {p: 0.3 * np.sign(x) + 0.7 * x for p, x in change.items()})
    still = jax.grad(lambda t: plan.penalty(kept, t))(trained)
    assert not any(np.any(x) for x in jax.tree.leaves(still))
    count = sum(x.size for x in change.values())
    for sized, whole in ((L1ToBase(0.3, mean=True), L1ToBase(0.3)), (L2SP(0.7, mean=True), L2SP(0.7))):
        np.testing.assert_allclose(sized(plan, kept, moved) * count, whole(plan, kept, moved), rtol=1e-5)
    every = sum(x.size for x in base.values())
    assert every > count and plan.size(kept, moved) == every
    mean = L1ToBase(0.3, mean=True, of="all")(plan, kept, moved)
    np.testing.assert_allclose(mean, 0.3 * sum(np.abs(x).sum() for x in change.values()) / every, rtol=1e-5)


@pytest.mark.parametrize(
    ("train", "select"), [(InPlace(), {"layers": (0, 2)}), (LowRank(2, 2.0), {"linear_only": True})]
)
def test_the_size_of_a_model_counts_what_is_frozen(train, select):
    params, plan, kept, trained = planned(train, **select)
    assert plan.size(kept, trained) == tree.count(params)


def test_nuclear_norm():
    params, plan, kept, trained = planned(InPlace(), Nuclear(0.2, eps=1e-10), include=("up/w", "down/w", "head/w"))
    moved = leaf.moved(trained)
    base = tree.flatten(params)
    change = {p: leaf.wide(x) - leaf.wide(base[p]) for p, x in moved.items()}
    total, gradient = 0.0, {}
    for path, x in change.items():
        u, s, v = np.linalg.svd(x, full_matrices=False)
        total += 0.2 * s.sum()
        gradient[path] = 0.2 * u @ v
    np.testing.assert_allclose(plan.penalty(kept, moved), total, rtol=1e-4)
    leaf.close(jax.jit(jax.grad(lambda t: plan.penalty(kept, t)))(moved), gradient, 1e-3)
    at_base = jax.grad(lambda t: plan.penalty(kept, t))(trained)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(at_base))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _penalty(Masked(), L1ToBase(1.0)), "no base to stay near"),
        (lambda: _penalty(LowRank(2, 2.0), Nuclear(1.0)), "change is no matrix"),
        (lambda: L1ToBase(0.1, of="all"), "of='all' says what a mean is divided by, and mean is False; add mean=True"),
        (lambda: L1ToBase(0.1, mean=True, of="model"), "of 'model' is unknown; choose trained or all"),
    ],
)
def test_wrong_uses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _penalty(train, penalty):
    _, plan, kept, trained = planned(train, penalty, linear_only=True)
    return plan.penalty(kept, trained)
