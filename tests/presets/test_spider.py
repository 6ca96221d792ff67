"""SPIDER: after each step what matters more to the base goes back to it, in float64 NumPy."""

import inspect

import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.methods import InPlace, Method, Select
from jft.presets.spider import Importance, soft_share, spider
from tests.methods import stack
from tests.methods.stack import BIAS, DATA, HEAD, UP, W

MUTATIONS = (
    ("jft/presets/spider.py", "max(count - 1, 1)", "max(count, 1)"),
    ("jft/presets/spider.py", "axis=axes, keepdims=True), rank, 0.0)", "axis=axes, keepdims=True), rank, 0.5)"),
    ("jft/presets/spider.py", "jnp.maximum(above, 1)", "base[0].size"),
    ("jft/presets/spider.py", "-(1 - share) * minus + share * now", "-share * minus + (1 - share) * now"),
    ("jft/presets/spider.py", "jax.tree.map(jnp.add, memory, gradient)", "gradient"),
    ("jft/presets/spider.py", "ours > theirs, ours", "ours < theirs, ours"),
)


def tensors(x):
    """Matrices and vectors of a leaf: each layer's, or the whole."""
    return x[None] if x.shape == stack.SHAPES[HEAD] else x


def rank(x):
    """calculate_rank of SPIDER.py: the sigmoid of z-scored sizes by torch's std, that of the sample; 0 where x is all 0."""
    size = np.abs(x)
    return np.zeros(x.shape) if not size.any() else 1 / (1 + np.exp(-(size - size.mean()) / size.std(ddof=1)))


def shares(base, total):
    share = np.where(rank(base) < rank(total), rank(total) / (rank(base) + rank(total) + 1e-300), 0)
    return np.minimum(share / share[share > 0].mean(), 1) if share.any() else share


def drawn_back(base, steps):
    """After each step ``(1 - v) theta0 + v theta``, v by the gradients of all steps so far."""
    adam, w, total = stack.Adam(), base, {p: 0 for p in base}
    support = {p: np.zeros(x.shape, bool) for p, x in base.items()}
    for n in range(steps):
        g = stack.gradient(w, DATA[n])
        w = adam.step(w, g, stack.everything())
        for p in w:
            total[p] = total[p] + g[p]
            v = [shares(b, t) for b, t in zip(tensors(base[p]), tensors(total[p]), strict=True)]
            v = np.reshape(v, w[p].shape)
            w[p], support[p] = (1 - v) * base[p] + v * w[p], v > 0
    return w, support


def test_it_has_no_options():
    assert not inspect.signature(spider).parameters and spider().rule == Importance()


def test_steps():
    """From a base whose first bias is all 0, as many are: all of it trains."""
    params = stack.parameters()
    params["layers"]["up"]["b"] = params["layers"]["up"]["b"].at[0].set(0)
    base = stack.wide(params)
    for steps in (1, 3):
        expected, support = drawn_back(base, steps)
        stack.check(stack.run("spider", steps, params=params), expected, support)
    assert support[BIAS][0].all() and 0.1 < np.mean([m.mean() for m in support.values()]) < 0.9


def test_shares():
    """Of few entries, where the sample's deviation is not that of the population."""
    rng = np.random.default_rng(0)
    base, total = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    base[1], total[2] = 0, 0
    found = soft_share(jnp.asarray(base, jnp.float32), jnp.asarray(total, jnp.float32), 1)
    np.testing.assert_allclose(found, [shares(b, t) for b, t in zip(base, total, strict=True)], atol=1e-6)


def test_what_a_rule_remembers_is_there_after_an_interruption(tmp_path):
    for steps in (2, 4):
        resumed = stack.run("spider", steps, workdir=tmp_path, checkpoint=1)
    whole = stack.run("spider", 4)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_last_layer_alone():
    """A rule sees whatever trains."""
    finished = stack.run(Method(Select(layers=(-1,)), InPlace(), rule=Importance()), 2)
    moved = np.asarray(finished.task_vector[UP].dense())
    assert not moved[0].any() and moved[1].any() and (moved[1] == 0).any()
    assert W[UP].shape == moved.shape
