"""Super-tuning: the largest or smallest entries of each matrix; with factors beside them, Supra."""

import inspect

import numpy as np
import pytest

from jft.presets.super_tuning import super_tuning
from tests.methods import stack
from tests.methods.stack import DATA, LINEAR, W

MUTATIONS = (
    ("jft/presets/super_tuning.py", "float(2 * rank if", "float(rank if"),
    ("jft/presets/super_tuning.py", "sparsity: float = 0.99", "sparsity: float = 0.9"),
    ("jft/presets/super_tuning.py", "largest=largest)", "largest=True)"),
    ("jft/presets/super_tuning.py", "scores.Magnitude()", "scores.Random()"),
    ("jft/presets/super_tuning.py", "budget.PerMatrix(", "budget.PerLeaf("),
    ("jft/presets/super_tuning.py", "alpha is not None and not rank", "False"),
)
RATE = 0.5


def smallest_or_largest(sign):
    return stack.of_each({p: sign * x for p, x in stack.sizes(W).items()}, lambda n: int(0.1 * n))


def test_defaults():
    # peft.SupertuningConfig 0.21.2: sparsity 0.99, select_top True, r None, lora_alpha None (2 r).
    given = {name: p.default for name, p in inspect.signature(super_tuning).parameters.items()}
    assert given == {"sparsity": 0.99, "largest": True, "rank": 0, "alpha": None}


@pytest.mark.parametrize(("largest", "steps"), [(True, (1, 3)), (False, (1,))])
def test_entries_and_steps(largest, steps):
    method = {"name": "super_tuning", "sparsity": 0.9, "largest": largest}
    stack.check_entries(method, smallest_or_largest(1 if largest else -1), steps=steps)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (3.0, 1.5)])
def test_supra_trains_entries_and_factors(alpha, scale):
    """One step of descent: the entries by g, b by ``scale * a^T g``, a not at all since b is 0."""
    method = {"name": "super_tuning", "sparsity": 0.9, "rank": 2, "alpha": alpha}
    optimizer = {"name": "sgd", "lr": RATE, "momentum": 0.0, "clip": 0.0}
    finished = stack.run(method, 1, optimizer=optimizer)
    masks, g = smallest_or_largest(1), stack.gradient(W, DATA[0])
    for path in LINEAR:
        a = np.asarray(finished.state.trained[path]["low_rank"]["a"], np.float64)
        change = -RATE * (masks[path] * g[path] + scale**2 * a @ np.swapaxes(a, -1, -2) @ g[path])
        np.testing.assert_allclose(stack.wide(finished.params)[path] - W[path], change, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "fraction that stays frozen"),
        ({"alpha": 4.0}, r"alpha=4.0 scales the low-rank change, and rank is 0; give rank="),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        super_tuning(**options)
