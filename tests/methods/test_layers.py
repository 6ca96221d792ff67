"""Parametrisations in some of the stacked layers: as in all, and nothing elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import delta, tree
from jft.methods.layers import SomeLayers
from jft.methods.low_rank import LowRank, WithLowRank
from jft.methods.masks import Masked
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.select import Select
from jft.presets.diff_pruning import HardConcrete
from jft.presets.finegates import Gates
from jft.presets.taps import Taps
from tests.methods import leaf, toy

KEY = jax.random.key(0)
SIZES, TRAINS = (1, 2, 1, 1), (False, True, False, True)
HOWS = [
    Masked(sparsity=0.3, start="two_point", margin=0.3),
    Gates(start=0.6),
    HardConcrete(),
    Taps(threshold=-9.0),
    WithLowRank(Gates(rows=False), LowRank(2, 2.0)),
]


def planned(how):
    """A plan whose layers 1, 2 and 4 of 5 train in ``up`` and ``down``; everything stacked is cut alike."""
    model = toy.model(layers=5)
    params = model.init(KEY)
    plan = Method(Select(layers=(1, 2, 4)), InPlace()).plan(params, model)
    cut = {p: SomeLayers(InPlace(), SIZES, (False,) * 4) for p in plan.leaves}
    linear = {p: SomeLayers(how, SIZES, TRAINS) for p in plan.leaves if p.endswith("/w")}
    plan = dataclasses.replace(plan, leaves=cut | linear)
    return model, params, plan, *plan.init(KEY, params)


@pytest.mark.parametrize("how", HOWS, ids=lambda how: type(how).__name__)
def test_layers_that_train_and_layers_that_do_not(how):
    model, params, plan, kept, trained = planned(how)
    assert set(trained) == {"layers/up/w", "layers/down/w"}
    trained = leaf.moved(trained, by=0.2)
    merged = plan.merged(params, kept, trained)
    still = [0, 3]
    for path, w in tree.flatten(params).items():
        now = tree.flatten(merged)[path]
        if path in trained:
            np.testing.assert_array_equal(now[jnp.asarray(still)], w[jnp.asarray(still)])
            assert all((now[i] != w[i]).any() for i in (1, 2, 4))
            encoded = plan.leaves[path].encode(w, kept[path], trained[path])
            np.testing.assert_allclose(encoded.add_to(w), now, atol=1e-5)
            assert isinstance(encoded, delta.BitMask if isinstance(how, Masked) else delta.Rows)
            structure = jax.tree.structure(trained[path])
            assert jax.tree.structure(plan.scales(trained)[path]) == structure
            assert (
                jax.tree.structure(leaf.specs(plan.leaves[path], jax.P(), w)[1], is_leaf=lambda x: isinstance(x, jax.P))
                == structure
            )
        else:
            np.testing.assert_array_equal(now, w)
    x = toy.batch()
    plain = dataclasses.replace(plan, structured=False)
    run = lambda p: jax.jit(jax.value_and_grad(lambda t: jnp.sum(jnp.sin(model.apply(p.bind(kept, t), x)))))(trained)
    (value, gradient), (expected, of_plain) = run(plan), run(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    leaf.close(gradient, leaf.wide(of_plain))


def test_noise_and_penalties():
    _, _, plan, kept, trained = planned(HardConcrete(weight=1.0))
    assert plan.random
    likely = 1 / (1 + np.exp(-5.0))
    np.testing.assert_allclose(plan.penalty(kept, trained), 2 * 3 * 8 * 16 * likely**2, rtol=1e-5)
    assert plan.bind(kept, leaf.moved(trained), key=KEY)["layers"]["up"]["w"].sizes == SIZES
    _, _, plan, kept, trained = planned(Masked())
    assert plan.penalty(kept, trained) is None
