"""RoSA against float64 NumPy: the warm-up, whose gradient finds the entries, and both parts from their start."""

import dataclasses

import numpy as np
import pytest

import jft
from jft import tree
from jft.select import budget
from jft.select.scores import Tuned
from jft.train.objectives import Contrastive
from tests.methods import stack
from tests.methods.low_rank import ALPHA, LINEAR, RANK, Both, W, check, factors
from tests.methods.stack import DATA, UP

MUTATIONS = (
    ("jft/presets/rosa.py", "scores.Tuned(score, warmup, low_rank)", "scores.Tuned(score, warmup)"),
    ("jft/presets/rosa.py", "rate=low_rank_rate", "rate=1.0"),
    ("jft/presets/rosa.py", "warmup: int = 64", "warmup: int = 32"),
    ("jft/presets/rosa.py", "density: float = 0.006", "density: float = 0.06"),
    ("jft/presets/rosa.py", "alpha: float = 16.0", "alpha: float = 8.0"),
    ("jft/presets/rosa.py", "low_rank_rate: float = 3.5", "low_rank_rate: float = 1.0"),
    ("jft/presets/rosa.py", 'Literal["example"] = "example"', 'Literal["example"] = False'),
    ("jft/presets/rosa.py", "if restart else After(warmup)", "if restart else After(warmup + 1)"),
    ("jft/train/calibration.py", "other._passed = self._passed + steps", "other._passed = self._passed"),
    ("jft/train/calibration.py", "beginning(optimizer, of) if begins else optimizer", "optimizer"),
)
STEPS, WARMUP = 4, 2
# Linear decay to zero over the whole run, as the scripts of the authors have it.
LINEAR_DECAY = {"name": "adam", "lr": stack.RATE, "clip": 0.0, "schedule": "linear"}


def rate(step, of=STEPS):
    return stack.RATE * (1 - step / of)


def warmed(of):
    """Weights after the warm-up, by the first steps of a schedule over ``of``."""
    warm = Both(factors(beside=False), rate=3.0)
    for n in range(WARMUP):
        warm.step(DATA[n], lr=rate(n, of))
    return warm.whole


def masks_of(whole, used, squared, density=0.2):
    """peft-rosa: int(d n) entries of each matrix; of the mean square over microbatches, or of the mean."""
    parts = [stack.rows(8, [b]) for b in used] if squared == "example" else [used]
    each = [stack.gradient(whole, b) for group in parts for b in group]
    power, after = (np.square, np.asarray) if squared else (np.asarray, np.abs)
    size = {p: after(np.mean([power(g[p]) for g in each], axis=0)) for p in LINEAR}
    return stack.largest_of_each(size, lambda n: int(density * n))


def same(one, other):
    return all(np.array_equal(one[p], other[p]) for p in LINEAR)


@pytest.mark.parametrize(("squared", "batches"), [("example", 1), (True, 2), (False, 2)])
def test_from_a_warm_up_that_is_thrown_away(squared, batches):
    """The mask is of the batches after the warm-up, at the weights of the run's own first steps."""
    method = {
        "name": "rosa", "rank": RANK, "alpha": ALPHA, "density": 0.2, "warmup": WARMUP, "batches": batches,
        "squared": squared, "low_rank_rate": 3.0,
    }  # fmt: skip
    masks = masks_of(warmed(STEPS), DATA[WARMUP : WARMUP + batches], squared)
    assert not same(masks, masks_of(warmed(STEPS), DATA[:batches], squared)), "the first batches choose alike"
    expected = Both(factors(), rate=3.0)
    for n in range(STEPS):
        expected.step(DATA[n], masks, rate(n))
    check(stack.run(method, STEPS, optimizer=LINEAR_DECAY), expected, masks)
    if squared == "example":
        assert not same(masks, masks_of(warmed(WARMUP), [DATA[WARMUP]], squared)), "a squeezed schedule chooses alike"
        assert not same(masks, masks_of(warmed(STEPS), [DATA[WARMUP]], True)), "squares of the batch choose alike"
        assert not same(masks, masks_of(W, [DATA[WARMUP]], squared)), "the base chooses alike"


def test_defaults():
    """IST-DASLab/RoSA@5f70c49, restarter_llama2.sh (wl64, alpha 16, mean_squared over one step's microbatches of one example,
    rates 7e-4 and 2e-4) and restart_7b_viggo_bf16.sh (rank 16, density .006)."""
    method = jft.method("rosa")
    tuned, low_rank = method.select.score, method.train.low_rank
    assert isinstance(tuned, Tuned) and tuned.steps == 64 and tuned.how == low_rank
    assert type(tuned.score).__name__ == "SquaredByExample" and tuned.score.batches == 1
    assert method.select.budget == budget.PerMatrix(density=0.006) and method.schedule is None
    assert (low_rank.rank, low_rank.alpha, low_rank.rate) == (16, 16.0, 7e-4 / 2e-4)


def trained_on(steps, warmup):
    """Low rank alone, then entries beside it."""
    state, masks = Both(factors()), {p: np.zeros(W[p].shape, bool) for p in LINEAR}
    for n in range(steps):
        if n == warmup:
            masks = masks_of(state.whole, [DATA[n]], False)
        state.step(DATA[n % len(DATA)], masks)
    return state, masks


GOES_ON = {
    "name": "rosa", "rank": RANK, "density": 0.2, "warmup": 2, "restart": False, "squared": False, "low_rank_rate": 1.0,
}  # fmt: skip


def test_that_trains_on():
    for steps in (2, 4):
        expected, masks = trained_on(steps, 2)
        check(stack.run({**GOES_ON, "alpha": ALPHA}, steps), expected, masks)
    assert masks[UP].any()


@pytest.mark.optimized
def test_that_trains_on_goes_on_after_an_interruption(tmp_path):
    for steps in (2, 3, 4):
        resumed = stack.run(GOES_ON, steps, workdir=tmp_path, checkpoint=1)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, stack.run(GOES_ON, 4))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_refused():
    with pytest.raises(ValueError, match="squared is 'batch'; True"):
        jft.method("rosa", squared="batch")
    score = jft.method("rosa").select.score.score

    @dataclasses.dataclass
    class Calibration:
        objective = Contrastive()

    with pytest.raises(ValueError, match=r"squared='example'.*Contrastive compares.*squared=True"):
        score(Calibration())
