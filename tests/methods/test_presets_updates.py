"""Presets that decide at every step which weights move, against their formulas in float64 NumPy."""

import numpy as np
import pytest

from jft import tree
from tests.methods import stack
from tests.methods.stack import DATA

W = stack.wide(stack.parameters())
ALL = stack.everything()


def tensors(x):
    """Matrices and vectors of a leaf: each layer's, or the whole."""
    return x[None] if x.shape == stack.SHAPES[stack.HEAD] else x


def top_gradients(steps, density, parts=1):
    """Adam on gradients of which each tensor keeps its largest entries; the gradient is the mean of microbatches."""
    adam, w = stack.Adam(), W
    for n in range(steps):
        batch = DATA[n]
        micro = [{k: x[i::parts] for k, x in batch.items()} for i in range(parts)]
        g = {p: np.mean([stack.gradient(w, m)[p] for m in micro], axis=0) for p in w}
        for p, x in g.items():
            masks = [stack.largest(np.abs(t), max(1, int(density * t.size + 0.5))) for t in tensors(x)]
            g[p] = np.where(np.reshape(masks, x.shape), x, 0)
        w = adam.step(w, g, ALL)
    return w


def shares(base, total):
    rank = lambda x: 1 / (1 + np.exp(-(np.abs(x) - np.abs(x).mean()) / np.abs(x).std()))
    share = rank(total) / (rank(base) + rank(total)) * (rank(base) < rank(total))
    return np.minimum(share / share[share > 0].mean(), 1)


def drawn_back(steps):
    """SPIDER: after each step ``(1 - v) theta0 + v theta``, v by the gradients of all steps so far."""
    adam, w, total = stack.Adam(), W, {p: 0 for p in W}
    support = {p: np.zeros(x.shape, bool) for p, x in W.items()}
    for n in range(steps):
        g = stack.gradient(w, DATA[n])
        w = adam.step(w, g, ALL)
        for p in w:
            total[p] = total[p] + g[p]
            v = [shares(b, t) for b, t in zip(tensors(W[p]), tensors(total[p]), strict=True)]
            v = np.reshape(v, w[p].shape)
            w[p], support[p] = (1 - v) * W[p] + v * w[p], v > 0
    return w, support


@pytest.mark.parametrize("parts", [1, 2])
def test_gmt_moves_by_the_largest_gradients_of_each_step(parts):
    for steps in (1, 3):
        finished = stack.run({"name": "gmt", "density": 0.3}, steps, accumulate=parts)
        stack.check(finished, top_gradients(steps, 0.3, parts))
    moved = finished.task_vector[stack.UP].dense()
    assert (np.asarray(moved) == 0).any()


def test_gmt_of_one_step_moves_as_many_entries_as_it_should():
    finished = stack.run({"name": "gmt", "density": 0.3}, 1)
    for path, w in W.items():
        moved = np.asarray(finished.task_vector[path].dense()) != 0
        assert [int(m.sum()) for m in tensors(moved)] == [int(0.3 * t.size + 0.5) for t in tensors(w)]


def test_spider_draws_back_what_matters_to_the_base():
    for steps in (1, 3):
        expected, support = drawn_back(steps)
        finished = stack.run("spider", steps)
        stack.check(finished, expected, support)
    assert 0.1 < np.mean([m.mean() for m in support.values()]) < 0.9


def test_what_a_rule_remembers_is_there_after_an_interruption(tmp_path):
    for steps in (2, 4):
        resumed = stack.run("spider", steps, workdir=tmp_path, checkpoint=1)
    whole = stack.run("spider", 4)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rules_go_with_parts_of_layers_and_with_selections():
    """A rule sees whatever trains: here the last layer alone."""
    from jft.methods import InPlace, Method, Select
    from jft.presets.gmt import TopGradient
    from jft.presets.spider import Importance

    for rule in (TopGradient(0.5), Importance()):
        finished = stack.run(Method(Select(layers=(-1,)), InPlace(), rule=rule), 2)
        moved = np.asarray(finished.task_vector[stack.UP].dense())
        assert not moved[0].any() and moved[1].any() and (moved[1] == 0).any()
