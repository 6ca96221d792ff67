"""LT-SFT: a first phase of full training, a second of the entries that moved furthest, and the regulariser of both."""

import inspect

import numpy as np

import jft
from jft import tree
from jft.presets.lt_sft import lt_sft
from tests.methods import stack
from tests.methods.stack import BODY, DATA, HEAD, UP, W

MUTATIONS = (
    ("jft/presets/lt_sft.py", 'L1ToBase(dense_l1, mean=True, of="all")', "L1ToBase(dense_l1, mean=True)"),
    ("jft/presets/lt_sft.py", 'L1ToBase(l1, mean=True, of="all")', "L1ToBase(l1, mean=True)"),
    ("jft/presets/lt_sft.py", "scores.Movement(dense_steps, dense)", "scores.Movement(dense_steps, ())"),
    ("jft/presets/lt_sft.py", "budget.Globally(", "budget.PerMatrix("),
    ("jft/presets/lt_sft.py", "density: float = 0.01", "density: float = 0.02"),
    ("jft/methods/penalties.py", "return self.weight / plan.size(kept, trained) * total", "return self.weight * total"),
)
# N of the code's regulariser (composable-sft, trainer.py): the number of all parameters of the model, frozen or not.
N = sum(w.size for w in W.values())


def pull(l1, masks):
    """The gradient of ``l1 * sum |theta - theta0| / N`` over what trains; rounding off keeps noise from having a sign."""
    return lambda w: {p: l1 / N * np.sign(np.round(w[p] - W[p], 12)) * m for p, m in masks.items()}


def moved(steps, l1=0.0, paths=BODY):
    """Sizes of the changes after the first phase, in which all of ``paths`` train."""
    masks = stack.everything(paths)
    tuned = stack.follow(W, masks, steps, added=pull(l1, masks) if l1 else None)
    return {p: np.abs(tuned[p] - W[p]) for p in W}


def test_defaults():
    # sft_args.py: ft_params_proportion 0.01, full_l1_reg 0, sparse_l1_reg 0; it leaves the steps to the user.
    given = {name: p.default for name, p in inspect.signature(lt_sft).parameters.items()}
    assert given == {"density": 0.01, "dense_steps": 1000, "l1": 0.0, "dense_l1": 0.0}


def test_entries_and_steps():
    method = {"name": "lt_sft", "density": 0.1, "dense_steps": 3, "also": "^head/"}
    stack.check_entries(method, stack.of_all(moved(3, paths=tuple(W)), 0.1, BODY), beside=(HEAD,))


def test_the_regulariser_divides_by_all_parameters_in_both_phases():
    """The head is frozen, and counts."""
    plain, drawn = (stack.of_all(moved(3, l1, BODY), 0.1, BODY) for l1 in (0.0, 20.0))
    assert any((plain[p] != drawn[p]).any() for p in BODY)
    method = {"name": "lt_sft", "density": 0.1, "dense_steps": 3, "dense_l1": 20.0, "l1": 60.0}
    stack.check_entries(method, drawn, added=pull(60.0, drawn), steps=(3,))
    with_it, without = (stack.follow(W, drawn, 3, added=a)[UP] for a in (pull(60.0, drawn), None))
    assert np.abs(with_it - without).max() > 1e-3


def test_task_vectors_add_up():
    first, second = (
        stack.run({"name": "lt_sft", "density": 0.1, "dense_steps": 2}, 2, data=d).task_vector
        for d in (DATA, stack.batches(seed=9))
    )
    base = stack.parameters()
    together = tree.flatten(jft.delta.apply(base, first + second))
    for path, w in tree.flatten(base).items():
        apart = sum(tau[path].dense() if path in tau else 0 for tau in (first, second))
        np.testing.assert_allclose(together[path], w + apart, atol=1e-6)
