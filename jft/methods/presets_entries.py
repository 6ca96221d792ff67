"""Presets that train single entries of weights in place, chosen once: by magnitude, gradient, information or movement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jft.methods.low_rank import LowRank
from jft.methods.parametrise import InPlace, Parametrisation
from jft.methods.patterns import patterns
from jft.methods.penalties import L1ToBase
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.select import budget, drawn, scores
from jft.select.probe import Per

Names = Sequence[str] | str
HEADS = (r"(^|/)(head|classifier)/",)


def _entries(
    score: scores.Score,
    limit: Any,
    include: Names,
    exclude: Names,
    *,
    linear_only: bool = True,
    largest: bool = True,
    train: Parametrisation | None = None,
    penalties: tuple = (),
) -> Method:
    select = Select(
        patterns(include), patterns(exclude), linear_only=linear_only, score=score, budget=limit, largest=largest
    )
    return Method(select, train or InPlace(), penalties=penalties)


@register("fish_mask", paper="Sung, Nair and Raffel 2021, arXiv:2111.09839")
def fish_mask(
    density: float = 0.005,
    count: int = 1024,
    per: Per = "example",
    power: Literal[1, 2] = 2,
    tokens: Literal["mean", "sum"] = "mean",
    include: Names = ("",),
    exclude: Names = HEADS,
) -> Method:
    """Train the entries of the whole model, its head apart, with the largest Fisher information.

    density: of all those weights together. count, per: the information is a mean over ``count`` single examples (the
    paper), whole batches (cheaper, and another quantity), or examples whose target is ``sampled`` from the model (the true
    one). power 2 is the paper's squared gradient and its scripts' ``label-square``; 1 is ``label-absolute``, the default of
    its code. A new head always trains in full: add ``also="^classifier/"``.
    """
    score = scores.Fisher(count, per, power, tokens)
    return _entries(score, budget.Globally(density=density), include, exclude, linear_only=False)


@register("lt_sft", paper="Ansell et al. 2022, arXiv:2110.07560")
def lt_sft(
    density: float = 0.01,
    dense_steps: int = 1000,
    l1: float = 0.0,
    dense_l1: float = 0.0,
    include: Names = ("",),
    exclude: Names = HEADS,
) -> Method:
    """Train the entries of the whole model, its head apart, that move furthest in a first phase of full training.

    After ``dense_steps`` the weights go back to the base, and the ``density`` of entries with the largest ``|theta1 -
    theta0|`` over all weights train from there, on the batches from their beginning. l1, dense_l1: weight of the *mean*
    ``|theta - theta0|`` in the sparse and in the first phase (the regulariser of its code, 0 by default there too). Task
    vectors of several runs add up. The code takes ``>=`` a threshold, so ties overshoot; here the count is exact. It can
    also choose in several rounds; here there is one, its default. A new head trains in full: ``also="^classifier/"``.
    """
    dense = (L1ToBase(dense_l1, mean=True),) if dense_l1 else ()
    sparse = (L1ToBase(l1, mean=True),) if l1 else ()
    score = scores.Movement(dense_steps, dense)
    return _entries(score, budget.Globally(density=density), include, exclude, linear_only=False, penalties=sparse)


@register("sift", paper="Song et al. 2023, arXiv:2312.11875")
def sift(rate: float = 0.05, batches: int = 1, include: Names = ("",), exclude: Names = ()) -> Method:
    """Train the ``int(rate * size) + 1`` entries of each matrix inside the layers with the largest gradient at the start.

    batches: whose mean gradient that is. The paper says the first few, its code takes one. Updates here are those of the
    step they belong to; in the code they arrive one or two steps late and the last never, and it does not train on the
    batch it selects by.
    """
    limit = budget.PerMatrix(density=rate, round="floor+1")
    return _entries(scores.Gradient(batches), limit, include, exclude)


@register("super_tuning", paper="arXiv:2607.09287")
def super_tuning(
    sparsity: float = 0.99,
    largest: bool = True,
    rank: int = 0,
    alpha: float | None = None,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train the ``1 - sparsity`` of the entries of each matrix inside the layers that are largest in size; no data needed.

    largest: or the smallest, the paper's "bottom"; which is better depends on model and task. rank: of a low-rank change
    beside them, which makes it the paper's Supra; alpha: its scale times ``rank``, ``2 * rank`` as in peft. The count is
    ``floor((1 - sparsity) * size)`` in decimal arithmetic; peft's binary one can be one less.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it is the fraction that stays frozen, from 0 to below 1")
    train = LowRank(rank, float(2 * rank if alpha is None else alpha)) if rank else InPlace()
    limit = budget.PerMatrix(density=round(1 - sparsity, 12))
    return _entries(scores.Magnitude(), limit, include, exclude, largest=largest, train=train)


@register("shira", paper="Bhardwaj et al. 2024, arXiv:2406.13175")
def shira(
    rank: int = 32,
    mask: Literal["struct", "rand", "wm", "grad", "snip"] = "rand",
    batches: int = 1,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train ``rank * (I + O)`` entries of each matrix inside the layers, as many as LoRA of that rank would.

    mask: the paper's five. ``struct``, the diagonal and then whole rows and columns drawn at random, the last of them in
    part, so that the number is exact; ``rand``; ``wm``, the largest weights; ``grad``, the largest gradients; ``snip``, the
    largest ``|gradient * weight|``; these two by the mean gradient of ``batches``. peft has ``rand`` alone.
    """
    masks: dict[str, scores.Score] = {
        "struct": drawn.Cross(),
        "rand": scores.Random(),
        "wm": scores.Magnitude(),
        "grad": scores.Gradient(batches),
        "snip": scores.Snip(batches),
    }
    if mask not in masks:
        raise ValueError(f"mask {mask!r} is unknown; choose one of {', '.join(masks)}")
    return _entries(masks[mask], budget.PerMatrix(rank=rank), include, exclude)


@register("tr_pts", paper="Luo et al. 2025, arXiv:2507.22872")
def tr_pts(
    density: float = 0.005,
    count: int = 1024,
    per: Per = "example",
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train the entries of the matrices inside the layers with the largest Fisher information; the parameter half of TR-PTS.

    The ``density`` of them all that is largest gives each layer its number, and the layer's largest train; by one score
    both are the same selection. per: see :func:`fish_mask`. The other half, tokens dropped by the attention of [CLS], is
    an option of the vision model: ``VisionConfig(selection=TokenSelection(...))``.
    """
    return _entries(scores.Fisher(count, per), budget.Globally(density=density), include, exclude)


@register("rl_subnetwork", paper="Mukherjee et al. 2025, arXiv:2505.11711")
def rl_subnetwork(tuned: Any = None, tolerance: float = 1e-5, include: Names = ("",), exclude: Names = ()) -> Method:
    """Train again, from the base, exactly the entries that differ from it in a tuned model.

    tuned: that model, as a directory, a task vector or its file, or parameters. tolerance: a larger ``|theta1 - theta0|``
    is a difference (the paper's for bfloat16 weights). Matrices with few of them cost as much memory as the fullest layer
    of their stack.
    """
    return _entries(scores.Difference(tuned, tolerance), budget.Beyond(0.5), include, exclude, linear_only=False)
