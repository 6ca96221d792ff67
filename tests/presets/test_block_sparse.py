"""Blocks of matrices with the largest score, in float64 NumPy."""

import inspect

import numpy as np
import pytest

from jft.presets.block_sparse import block_sparse
from tests.methods import stack
from tests.methods.stack import DATA, LAYERS, LINEAR, W

MUTATIONS = (
    ("jft/presets/block_sparse.py", 'pool: How = "l2"', 'pool: How = "max"'),
    ("jft/presets/block_sparse.py", 'round="nearest"', 'round="ceil"'),
    ("jft/presets/block_sparse.py", '"global"] = "matrix"', '"global"] = "layer"'),
    ("jft/presets/block_sparse.py", 'score: scores.Score | str = "gradient"', 'score: scores.Score | str = "snip"'),
    ("jft/presets/block_sparse.py", '"global": budget.Globally', '"global": budget.PerLayer'),
)


def blocks(count, together=False):
    """Masks of the blocks of 2 x 2 (12 in each matrix) with the largest gradient norm."""
    norms = {}
    for p in sorted(LINEAR):
        g = stack.gradient(W, DATA[0])[p]
        cut = g.reshape(LAYERS, g.shape[1] // 2, 2, g.shape[2] // 2, 2)
        norms[p] = np.sqrt((cut**2).sum((2, 4)))
    chosen = stack.largest_of_all(norms, count) if together else stack.largest_of_each(norms, count)
    return {p: np.repeat(np.repeat(m, 2, 1), 2, 2) for p, m in chosen.items()}


def test_defaults():
    given = {name: p.default for name, p in inspect.signature(block_sparse).parameters.items()}
    assert given == {"density": 0.05, "block": (128, 128), "score": "gradient", "pool": "l2", "scope": "matrix"}


def test_blocks_and_steps():
    stack.check_entries({"name": "block_sparse", "density": 0.36, "block": (2, 2)}, blocks(4))


def test_blocks_of_the_whole_model_compete():
    method = {"name": "block_sparse", "density": 0.25, "block": (2, 2), "scope": "global"}
    stack.check_entries(method, blocks(12, together=True), steps=(1,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "head"}, "scope 'head' is unknown; choose one of matrix, layer, global"),
        ({"score": "best"}, "score 'best' is unknown; choose one of gradient, magnitude, snip, random"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        block_sparse(**options)
