"""Gradient-mask tuning: in every step the largest gradients of each matrix and vector, in float64 NumPy."""

import inspect

import numpy as np
import pytest

from jft.methods import InPlace, Method, Select
from jft.presets.gmt import TopGradient, gmt
from tests.methods import stack
from tests.methods.stack import DATA, HEAD, UP, W

MUTATIONS = (
    ("jft/presets/gmt.py", "top_each(jnp.abs(g), ", "top_each(g, "),
    ("jft/presets/gmt.py", 'round="nearest"', 'round="ceil"'),
    ("jft/presets/gmt.py", "g.shape[lead:]", "g.shape"),
    ("jft/presets/gmt.py", "def gmt(density: float = 0.2)", "def gmt(density: float = 0.1)"),
)


def tensors(x):
    """Matrices and vectors of a leaf: each layer's, or the whole."""
    return x[None] if x.shape == stack.SHAPES[HEAD] else x


def count(size):
    return max(1, int(0.3 * size + 0.5))


def top_gradients(steps, parts):
    """Adam on gradients of which each tensor keeps its largest entries; the gradient is the mean of microbatches."""
    adam, w = stack.Adam(), W
    for n in range(steps):
        micro = [{k: x[i::parts] for k, x in DATA[n].items()} for i in range(parts)]
        g = {p: np.mean([stack.gradient(w, m)[p] for m in micro], axis=0) for p in w}
        for p, x in g.items():
            masks = [stack.largest(np.abs(t), count(t.size)) for t in tensors(x)]
            g[p] = np.where(np.reshape(masks, x.shape), x, 0)
        w = adam.step(w, g, stack.everything())
    return w


def test_defaults():
    # Li et al.: 10 to 40 % of the gradient.
    assert {name: p.default for name, p in inspect.signature(gmt).parameters.items()} == {"density": 0.2}
    assert gmt().rule == TopGradient(0.2)


@pytest.mark.parametrize("parts", [1, 2])
def test_steps(parts):
    for steps in (1, 3):
        finished = stack.run({"name": "gmt", "density": 0.3}, steps, accumulate=parts)
        stack.check(finished, top_gradients(steps, parts))
        if steps == 1:
            for path, w in W.items():
                moved = np.asarray(finished.task_vector[path].dense()) != 0
                assert [int(m.sum()) for m in tensors(moved)] == [count(t.size) for t in tensors(w)]
    assert (np.asarray(finished.task_vector[UP].dense()) == 0).any()


def test_the_last_layer_alone():
    """A rule sees whatever trains."""
    finished = stack.run(Method(Select(layers=(-1,)), InPlace(), rule=TopGradient(0.5)), 2)
    moved = np.asarray(finished.task_vector[UP].dense())
    assert not moved[0].any() and moved[1].any() and (moved[1] == 0).any()


def test_a_density_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"density 0\.0 is not in"):
        gmt(density=0.0)
