"""SHiRA: as many entries of each matrix as a LoRA of some rank has, by each of its five masks."""

import inspect

import numpy as np
import pytest

from jft.presets.shira import shira
from tests.methods import stack
from tests.methods.stack import DATA, LINEAR, W

MUTATIONS = (
    ("jft/presets/shira.py", '] = "rand"', '] = "wm"'),
    ("jft/presets/shira.py", "rank: int = 32", "rank: int = 8"),
    ("jft/presets/shira.py", "scores.Snip(batches)", "scores.Gradient(batches)"),
    ("jft/presets/shira.py", "scores.Gradient(batches)", "scores.Gradient()"),
    ("jft/presets/shira.py", "budget.PerMatrix(rank=rank)", "budget.PerMatrix(count=8 * rank)"),
    ("jft/presets/shira.py", "diagonal, 2.0, ", "diagonal, 0.0, "),
    ("jft/presets/shira.py", "jnp.maximum(u", "jnp.multiply(u"),
    ("jft/presets/shira.py", "batches != 1 and mask not in", "batches > 9 and mask not in"),
)
COUNT = stack.WIDTH + stack.HIDDEN  # r (I + O) of rank 1


def test_defaults():
    # peft.ShiraConfig 0.21.2: r 32, mask_type random.
    given = {name: p.default for name, p in inspect.signature(shira).parameters.items()}
    assert given == {"rank": 32, "mask": "rand", "batches": 1}


CASES = {
    "wm": ({}, lambda: W),
    "grad": ({"batches": 2}, lambda: stack.average([stack.gradient(W, b) for b in DATA[:2]])),
    "snip": ({}, lambda: {p: g * W[p] for p, g in stack.gradient(W, DATA[0]).items()}),
}


@pytest.mark.parametrize("mask", CASES)
def test_entries_and_steps(mask):
    options, score = CASES[mask]
    expected = stack.of_each(stack.sizes(score()), COUNT)
    stack.check_entries({"name": "shira", "rank": 1, "mask": mask, **options}, expected, steps=(3,))


def test_a_random_mask_has_as_many_entries_as_a_low_rank_change():
    one, other = (stack.masks(stack.run({"name": "shira", "rank": 2}, 1, seed=s)) for s in (0, 1))
    for path in LINEAR:
        assert (one[path].sum((1, 2)) == 2 * COUNT).all()
        assert (one[path][0] != one[path][1]).any() and (one[path] != other[path]).any()


def test_the_structured_mask_is_a_diagonal_with_rows_and_columns():
    found = stack.masks(stack.run({"name": "shira", "rank": 2, "mask": "struct"}, 1))
    for path in LINEAR:
        for mask in found[path]:
            rows, columns = mask.shape
            assert mask.sum() == 2 * COUNT
            size = min(mask.shape)
            diagonal = np.arange(rows)[:, None] % size == np.arange(columns) % size
            assert mask[diagonal].all()
            # Without whole rows and columns, what is left off the diagonal lies in the last slice, which is cut.
            rest = mask & ~diagonal
            rest[mask.all(1)], rest[:, mask.all(0)] = False, False
            assert mask.all(1).any() or mask.all(0).any()
            assert not rest.any() or min(rest.any(0).sum(), rest.any(1).sum()) == 1


@pytest.mark.parametrize("mask", ["rand", "struct", "wm"])
def test_batches_where_no_data_is_read_are_refused(mask):
    with pytest.raises(
        ValueError, match=f"mask '{mask}' reads no data, and batches is 3; leave batches out, or take grad"
    ):
        shira(mask=mask, batches=3)


def test_an_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="choose one of struct, rand, wm, grad, snip"):
        shira(mask="best")
