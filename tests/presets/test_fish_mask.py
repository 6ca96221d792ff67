"""FISH mask: squared gradients of single examples, and one threshold for all weights, in float64 NumPy."""

import inspect

import numpy as np
import pytest

from jft.presets.fish_mask import fish_mask
from tests.methods import stack
from tests.methods.stack import BODY, DATA, HEAD, W

MUTATIONS = (
    ("jft/presets/fish_mask.py", "budget.Globally(", "budget.PerMatrix("),
    ("jft/presets/fish_mask.py", "Select(exclude=HEADS, ", "Select("),
    ("jft/presets/fish_mask.py", "power: Literal[1, 2] = 2", "power: Literal[1, 2] = 1"),
    ("jft/presets/fish_mask.py", 'per: Per = "example"', 'per: Per = "batch"'),
    ("jft/presets/fish_mask.py", "scores.Fisher(count, per, power, tokens)", "scores.Fisher(count, per, 2, tokens)"),
)


def information(each, power=2):
    """The mean over ``each`` of the gradient's size to a power."""
    return stack.average([{p: np.abs(g) ** power for p, g in stack.gradient(W, b).items()} for b in each])


def test_defaults():
    # Sung et al.: 0.5 % of the parameters; create_mask_gradient of the code: num_samples 1024 in its scripts, batches of one.
    given = {name: p.default for name, p in inspect.signature(fish_mask).parameters.items()}
    assert given == {"density": 0.005, "count": 1024, "per": "example", "power": 2, "tokens": "mean"}


@pytest.mark.parametrize(
    ("options", "each", "power"),
    [({"count": 12}, stack.rows(12), 2), ({"count": 3, "per": "batch", "power": 1}, DATA[:3], 1)],
    ids=["paper", "absolute, batches"],
)
def test_entries_and_steps(options, each, power):
    method = {"name": "fish_mask", "density": 0.1, "also": "^head/", **options}
    stack.check_entries(method, stack.of_all(information(each, power), 0.1, BODY), beside=(HEAD,))


def test_targets_drawn_from_the_model_give_another_information():
    method = {"name": "fish_mask", "density": 0.1, "count": 16, "per": "sampled"}
    found = stack.masks(stack.run(method, 1))
    assert set(found) == set(BODY)
    assert sum(m.sum() for m in found.values()) == int(0.1 * sum(W[p].size for p in BODY))
    empirical = stack.of_all(information(stack.rows(16)), 0.1, BODY)
    assert any((found[p] != m).any() for p, m in empirical.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"power": 3}, "power is 3"), ({"per": "token"}, "per is 'token'"), ({"density": 0.0}, "density 0.0 is not in")],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stack.run({"name": "fish_mask", "count": 4, **options}, 1)
