"""LoRA, rsLoRA and LoRA+ against float64 NumPy."""

import numpy as np
import pytest

import jft
from jft import delta
from tests.methods import stack
from tests.methods.low_rank import LINEAR, Moments, W, factors, turned
from tests.methods.stack import DATA

MUTATIONS = (
    ("jft/presets/lora.py", "rank: int = 16", "rank: int = 8"),
    ("jft/presets/lora.py", "rank if alpha is None else alpha", "2 * rank if alpha is None else alpha"),
    ("jft/presets/lora.py", "Select(linear_only=True)", "Select()"),
    ("jft/methods/low_rank.py", "math.sqrt(self.rank) if self.rank_stabilised else self.rank", "self.rank"),
    ("jft/methods/low_rank.py", '"b": self.rate * self.b_rate', '"b": self.rate'),
    ("jft/methods/low_rank.py", "bound = 1 / math.sqrt(rows)", "bound = 1 / math.sqrt(columns)"),
)
RANK, STEPS = 4, 3
# Hu et al. 2021: alpha / r, and alpha = r by default; Kalajdzievski 2023: alpha / sqrt(r); Hayou et al. 2024: lr of b.
FORMS = {
    "lora": ({}, 1.0, 1.0),
    "scaled": ({"alpha": 6.0}, 6.0 / RANK, 1.0),
    "stabilised": ({"alpha": 6.0, "rank_stabilised": True}, 6.0 / np.sqrt(RANK), 1.0),
    "faster b": ({"b_rate": 16.0}, 1.0, 16.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_three_steps(form):
    options, scale, faster = FORMS[form]
    run = stack.run({"name": "lora", "rank": RANK, **options}, STEPS)
    low, moments = factors(beside=False, rank=RANK), Moments()
    whole = lambda: W | {p: W[p] + scale * f["a"] @ f["b"] for p, f in low.items()}
    for batch in DATA[:STEPS]:
        g = stack.gradient(whole(), batch)
        by_part = {p: {"a": scale * g[p] @ turned(f["b"]), "b": scale * turned(f["a"]) @ g[p]} for p, f in low.items()}
        rates = {"a": stack.RATE, "b": stack.RATE * faster}
        low = {p: {k: moments.step((p, k), f[k], by_part[p][k], rates[k]) for k in f} for p, f in low.items()}
    stack.check(run, whole(), tolerance=2e-5)
    assert set(run.task_vector.deltas) == set(LINEAR)
    for path in LINEAR:
        assert isinstance(run.task_vector[path], delta.LowRank) and run.task_vector[path].rank == RANK


def test_defaults():
    """alpha = r (section 4.1); rank 16 is jft's own."""
    how = jft.method("lora").train
    assert (how.rank, how.alpha, how.scale, how.rank_stabilised, how.b_rate) == (16, 16.0, 1.0, False, 1.0)


def test_what_is_refused():
    with pytest.raises(ValueError, match="no factors of rank 0"):
        jft.method("lora", rank=0).plan(stack.parameters(), stack.MODEL)
    with pytest.raises(ValueError, match="has no option 'r'"):
        jft.method("lora", r=4)
