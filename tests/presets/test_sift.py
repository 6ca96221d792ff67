"""SIFT: the entries of each matrix with the largest gradient of the first batch, in float64 NumPy."""

import inspect

import pytest

from jft.presets.sift import sift
from tests.methods import stack
from tests.methods.stack import DATA, W

MUTATIONS = (
    ("jft/presets/sift.py", 'round="floor+1"', 'round="floor"'),
    ("jft/presets/sift.py", "budget.PerMatrix(", "budget.PerLeaf("),
    ("jft/presets/sift.py", "scores.Gradient(batches)", "scores.Snip(batches)"),
    ("jft/presets/sift.py", "batches: int = 1", "batches: int = 2"),
    ("jft/presets/sift.py", "linear_only=True, ", ""),
)


def count(size):
    # sift.py of the code: train_num = int(sparse_rate * numel) + 1.
    return int(0.05 * size) + 1


def test_defaults():
    # Song et al.: 5 % of LLaMA's matrices; the code takes the gradient of one batch.
    assert {name: p.default for name, p in inspect.signature(sift).parameters.items()} == {"rate": 0.05, "batches": 1}


def test_entries_and_steps():
    stack.check_entries("sift", stack.of_each(stack.sizes(stack.gradient(W, DATA[0])), count))


def test_the_gradient_of_the_first_batches():
    mean = stack.average([stack.gradient(W, b) for b in DATA[:3]])
    stack.check_entries({"name": "sift", "batches": 3}, stack.of_each(stack.sizes(mean), count), steps=(1,))


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"density 0\.0 is not in"):
        sift(rate=0.0)
