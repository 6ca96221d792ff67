"""LIFT against the rule of its paper and released optimizer in float64 NumPy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.presets.lift import lift
from jft.select.low_rank import low_rank
from tests.methods import stack
from tests.methods.stack import DATA, DOWN, UP

LINEAR, EVERY, STEPS = (UP, DOWN), 2, 5
W = stack.wide(stack.parameters())
OPTIONS = {"name": "lift", "rank": 1, "filter_rank": 2, "every": EVERY}
MUTATIONS = (
    ("jft/presets/lift.py", "every: int = 200,", "every: int = 0,"),
    ("jft/presets/lift.py", "largest: bool = True,", "largest: bool = False,"),
    ("jft/presets/lift.py", "aged: bool = False,", "aged: bool = True,"),
    ("jft/presets/lift.py", "filter_rank: int = 128,", "filter_rank: int = 64,"),
    ("jft/presets/lift.py", "budget.PerMatrix(rank=rank)", "budget.PerLeaf(count=14)"),
    ("jft/select/low_rank.py", "[1][..., -rank:]", "[1][..., :rank]"),
    ("jft/select/low_rank.py", "// 8) if oversample is None", "// 64) if oversample is None"),
    ("jft/select/scores.py", "iterations: int = 12", "iterations: int = 4"),
    ("jft/train/step.py", "schedule is not None and schedule.aged", "schedule is not None"),
)


def truncated(w, rank):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def principal(w, sign):
    """The ``1 * (I + O)`` entries of each matrix of largest (or smallest) ``|W_2|``."""
    return stack.largest_of_each({p: sign * np.abs(truncated(w[p], 2)) for p in LINEAR}, stack.WIDTH + stack.HIDDEN)


def followed(sign=1, aged=False):
    """Weights after ``STEPS``, and the selections on the way, a new one every ``EVERY`` steps."""
    adam, w, selections = stack.Adam(), W, []
    for n in range(STEPS):
        if n % EVERY == 0:
            selections.append(principal(w, sign))
            adam.forget(selections[-1])
        if not aged:  # one count of steps for all, as `state["step"]` in the released sparseAdam.py
            for p in LINEAR:
                adam.age[p][:] = n
        w = adam.step(w, stack.gradient(w, DATA[n % len(DATA)]), selections[-1])
    return w, selections


@pytest.mark.parametrize(("largest", "aged"), [(True, False), (False, False), (True, True)])
def test_it_selects_anew_from_the_weights_as_they_are(largest, aged):
    expected, selections = followed(1 if largest else -1, aged)
    finished = stack.run({**OPTIONS, "largest": largest, "aged": aged}, STEPS)
    for path, mask in stack.masks(finished).items():
        np.testing.assert_array_equal(mask, selections[-1][path], err_msg=path)
    support = {p: np.logical_or.reduce([s[p] for s in selections]) for p in LINEAR}
    stack.check(finished, expected, support)
    assert any((selections[0][p] != selections[-1][p]).any() for p in LINEAR)


def test_the_two_counts_of_steps_differ():
    one, other = followed(aged=False)[0], followed(aged=True)[0]
    assert max(np.abs(one[p] - other[p]).max() for p in LINEAR) > stack.RATE / 10


def test_without_refreshes_it_keeps_its_first_selection():
    finished = stack.run({**OPTIONS, "every": 0}, 3)
    masks = principal(W, 1)
    stack.check(finished, stack.follow(W, masks, 3), masks)


def test_both_ways_to_low_rank_select_as_the_svd_does_without_a_spectral_gap():
    """Gaussian matrices are the worst case: the randomised way agrees to 0.98 of the entries, the exact one to 0.999."""
    shape, rank = (256, 128), 8
    w = np.random.default_rng(0).normal(size=shape)
    wanted = stack.largest(np.abs(truncated(w, rank)), min(sum(shape) * rank, w.size // 4))
    for exact, agreed in ((True, 0.999), (False, 0.98)):
        found = low_rank(jnp.asarray(w, jnp.float32), rank, None, 12, jax.random.key(0), exact)
        mask = stack.largest(np.abs(np.asarray(found)), int(wanted.sum()))
        assert (mask & wanted).sum() > agreed * wanted.sum(), (exact, (mask & wanted).sum() / wanted.sum())


def test_defaults_are_those_of_paper_and_code():
    """finetune_sft.py: lora_rank 128, filter_rank 128, update_interval 200; sparseAdam.py: torch.svd, one state["step"]."""
    defaults = {p.name: p.default for p in inspect.signature(lift).parameters.values()}
    expected = {"rank": 128, "filter_rank": 128, "every": 200, "largest": True, "exact": True, "aged": False}
    assert defaults == expected
    score = jft.method("lift", exact=False).select.score
    assert (score.oversample, score.iterations, score.exact) == (None, 12, False)


def test_an_age_without_refreshes_is_refused():
    with pytest.raises(ValueError, match="aged=True tells new entries from old ones, and with every=0 none is new"):
        jft.method("lift", every=0, aged=True)
