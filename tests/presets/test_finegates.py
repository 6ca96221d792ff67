"""FineGates: gates on channels against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.delta import Changed, LowRank
from jft.dot import grouped_dot, take, transpose
from jft.models import core
from jft.presets.finegates import Gates
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/presets/finegates.py", "delta.Leaf(axes, decays=False,", "delta.Leaf(axes,"),
    ("jft/presets/finegates.py", "jnp.tanh(t) + 0.5", "jnp.tanh(t)"),
    ("jft/presets/finegates.py", "jnp.clip(mu, 0, 1)", "jnp.clip(mu, 0, 2)"),
    ("jft/presets/finegates.py", "norm.cdf(self.mean(t) / self.sigma)", "norm.cdf(self.mean(t))"),
    ("jft/presets/finegates.py", "    rows: bool = True,\n    columns", "    rows: bool = False,\n    columns"),
)
KEY = jax.random.key(4)
_cdf = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
_density = lambda x: np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def fine(how, trained, key):
    """Weight and gradient of FineGates."""
    names = sorted(trained)
    each = [None, None] if key is None else list(jax.random.split(key))
    spread = {"rows": lambda z: z[:, :, None], "columns": lambda z: z[:, None, :]}
    z, dz = {}, {}
    for name, k in zip(names, each, strict=False):
        mu = np.tanh(trained[name]) + 0.5 if how.squash else trained[name]
        slope = 1 - np.tanh(trained[name]) ** 2 if how.squash else 1.0
        noise = how.sigma if how.noise is None else how.noise
        at = mu if k is None else mu + noise * np.asarray(jax.random.normal(k, mu.shape), np.float64)
        z[name], dz[name] = np.clip(at, 0, 1), slope * ((at > 0) & (at < 1))
    product = math.prod(spread[n](z[n]) for n in names)
    w = leaf.W * product
    dw = leaf.loss_and_grad(w)[1]
    gradient, penalty = {}, 0.0
    for name in names:
        others = math.prod([spread[n](z[n]) for n in names if n != name], start=1.0)
        axis = 2 if name == "rows" else 1
        mu = np.tanh(trained[name]) + 0.5 if how.squash else trained[name]
        slope = 1 - np.tanh(trained[name]) ** 2 if how.squash else 1.0
        likely, dlikely = _cdf(mu / how.sigma), _density(mu / how.sigma) / how.sigma * slope
        if how.open is None:
            penalty += how.weight * likely.sum()
            closing = how.weight * dlikely
        else:
            away = likely.mean(-1, keepdims=True) - how.open
            penalty += how.weight * np.abs(away).sum() / len(names)
            closing = how.weight * np.sign(away) * dlikely / likely.shape[-1] / len(names)
        gradient[name] = (dw * leaf.W * others).sum(axis) * dz[name] + closing
    return w, gradient, penalty


FINE = [
    Gates(weight=0.2, start=0.6),
    Gates(columns=False, weight=0.2, start=0.6, noise=0.1),
    Gates(weight=0.5, squash=True, noise=0.1, open=0.8, start=-0.2),
]


@pytest.mark.parametrize("how", FINE, ids=["both", "rows", "released"])
def test_fine_gates(how):
    kept, trained = how.init(KEY, leaf.w32())
    trained = leaf.moved(trained, by=0.1)
    for key in (KEY, None):
        w, gradient, penalty = fine(how, leaf.wide(trained), key)
        leaf.close(leaf.bound(how, kept, trained, key), w)
        leaf.check_gradient(how, kept, trained, gradient, key)
    np.testing.assert_allclose(jax.jit(how.penalty)(kept, trained), penalty, rtol=1e-5)
    leaf.check_steps(how, kept, trained, lambda t, k: fine(how, t, k)[1], keys=jax.random.split(KEY, 3), rate=1e-3)
    leaf.check_transforms(how, kept, trained, KEY)


def test_fine_gates_start_at_the_base_and_encode_what_they_close():
    how = Gates()
    kept, trained = how.init(KEY, leaf.w32())
    np.testing.assert_array_equal(how.bind(kept, trained, False), leaf.w32())
    closed = trained | {"rows": trained["rows"].at[1, 2].set(-1.0)}
    change = how.encode(leaf.w32(), kept, closed).resolve(leaf.w32()).dense()
    np.testing.assert_allclose(change[1, 2], -leaf.w32()[1, 2])
    assert np.count_nonzero(change) == leaf.O


def test_gates_beside_low_rank_and_on_experts_and_tables():
    how = Gates(start=0.5)
    w = jax.random.normal(KEY, (3, 8, 6))
    kept, trained = how.init(KEY, w)
    trained = leaf.moved(trained, by=0.2)

    @jax.jit
    def results(kept, trained):
        structured, plain = how.bind(kept, trained, True), how.bind(kept, trained, False)
        x, sizes, ids = jax.random.normal(KEY, (7, 8)), jnp.asarray([2, 0, 5]), jnp.asarray([[7, 0], [3, 3]])
        one, flat = jax.tree.map(lambda a: a[1], structured), plain[1]
        a, b = jax.random.normal(KEY, (8, 2)), jax.random.normal(KEY, (2, 6))
        return [
            (grouped_dot(x, structured, sizes), grouped_dot(x, plain, sizes)),
            (take(one, ids, jnp.float32), flat[ids]),
            (core.dot(jnp.ones((2, 6)), transpose(one)), jnp.ones((2, 6)) @ flat.T),
            (core.dot(x, Changed(one, LowRank(a, 0.5 * b))), x @ (flat + 0.5 * a @ b)),
        ]

    for found, expected in results(kept, trained):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gates(rows=False, columns=False), "gates need a side"),
        (lambda: Gates(sigma=0.0), "sigma must be above 0"),
        (lambda: Gates().init(KEY, jnp.ones(3)), "need a matrix"),
    ],
)
def test_wrong_uses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_learns_and_decay_leaves_the_gates_alone():
    """Gates have a weight decay of 0 in the released code (finetune_glue.py), sigma is 1/2 in both forms (model.py)."""
    assert jft.method("finegates").train == Gates(True, True, 1e-3, 0.5, None, 1.0)
    learning.check(jft.method("finegates", rank=2), 1e-2, learning.LINEAR)
    moved = learning.moved_by_decay(jft.method("finegates", rank=2))["layers/up/w"]
    assert moved == {"own": {"rows": False, "columns": False}, "low_rank": {"a": True, "b": True}}
