"""RoSA: a low-rank change and, beside it, the entries with the largest gradient."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft.methods.card import Card
from jft.methods.low_rank import LowRank, WithLowRank
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import After
from jft.methods.select import Select
from jft.select import budget, scores
from jft.select.calibration import Calibration


def _rows(params: Any, batch: Any) -> jax.Array:
    # Batches may differ in size, so examples are counted rather than multiplied out.
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])


@dataclasses.dataclass(frozen=True)
class SquaredByExample:
    """``mean of g^2``, g the gradient of one example's loss, over as many examples as ``batches`` batches hold."""

    batches: int = 1

    def __call__(self, calibration: Calibration) -> scores.Scores:
        if not calibration.objective.splits:
            raise ValueError(
                f"squared='example' takes gradients of single examples, and {type(calibration.objective).__name__} compares "
                "examples with each other; squared=True takes those of whole batches"
            )
        return calibration.squares(int(calibration.sums(_rows, self.batches)), "example")


CARD = Card(
    formula=(
        "W + S + (alpha / rank) a b; S on the density of each matrix's entries with the largest mean g^2, g the gradient in W "
        "at the weights after `warmup` steps of (a, b) alone, on the batch that follows; then both from their start"
    ),
    follows=(
        "the code as its scripts run it: the warm-up is the first steps of the run's own schedule, the mask is from the next "
        "batch, and restart=True loads it and starts anew. Squares are of each microbatch there, which is one example"
    ),
    code=(
        "IST-DASLab/peft-rosa@810da6a, src/peft/tuners/rosa/scheduler.py:54-200, hooks.py:57; IST-DASLab/RoSA@5f70c49, "
        "scripts/train/scripts/restarter_llama2.sh"
    ),
    departs=(
        "no dropout before a (code 0.05). Of several batches all gradients are at the weights after the warm-up; the code "
        "trains on in between. With restart=False entries join at update `warmup`, the code's one later"
    ),
    check=(
        "warm-up under a linear schedule, mask and three Adam steps against float64 NumPy; other batches, a squeezed schedule "
        "and squares of batches give other masks there"
    ),
    defaults={
        "rank": ("-", "16 (4, 8 on two tasks); config class 8"),
        "density": ("-", ".006 (ViGGO), .018 (GSM8k), .0045 (SQL); config class .003"),
        "warmup": (64, 64),
        "alpha": (16, 16),
        "batches": (1, 1),
        "squared": ("-", "mean_squared, microbatches of one example"),
        "restart": (True, True),
        "low_rank_rate": ("-", "7e-4 / 2e-4 = 3.5"),
    },
)


@register("rosa", paper="Nikdan et al. 2024, arXiv:2401.04679", card=CARD)
def rosa(
    rank: int = 16,
    density: float = 0.006,
    warmup: int = 64,
    alpha: float = 16.0,
    batches: int = 1,
    squared: bool | Literal["example"] = "example",
    restart: bool = True,
    low_rank_rate: float = 3.5,
) -> Method:
    """Train a low-rank change of every matrix inside the layers, and beside it the entries with the largest gradient.

    The gradient is that of the weight where the run stands after its first ``warmup`` steps with the low-rank change alone,
    on the next ``batches`` batches: the mean of its squares, of each ``example`` or (True) of each batch, or (False) the size
    of its mean. The ``density`` of each matrix's entries where that is largest train. restart: the warm-up only finds them,
    and both start anew (what the authors recommend); without it the low-rank change trains on and the entries join.
    low_rank_rate: its learning rate over that of the entries, which is the optimizer's. alpha: its scale is ``alpha / rank``.
    """
    if squared not in (True, False, "example"):
        raise ValueError(f"squared is {squared!r}; True (of batches), False, or 'example'")
    low_rank = LowRank(rank, alpha, rate=low_rank_rate)
    # Fisher of whole batches is the mean of their squared gradients.
    score: scores.Score = scores.Fisher(batches, "batch") if squared else scores.Gradient(batches)
    if squared == "example":
        score = SquaredByExample(batches)
    select = Select(
        linear_only=True,
        score=scores.Tuned(score, warmup, low_rank) if restart else score,
        budget=budget.PerMatrix(density=density),
    )
    # With restart the warm-up is part of the score (Tuned), so the run itself has no schedule.
    return Method(select, WithLowRank(InPlace(), low_rank), schedule=None if restart else After(warmup))
