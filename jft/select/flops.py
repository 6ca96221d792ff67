"""`plan_flops`: the tensors to train within a number of FLOPs of the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plan_flops(
    importance: Sequence[float],
    weight_flops: Sequence[int],
    activation_flops: Sequence[int],
    budget: int,
    resolution: int = 1000,
) -> list[int]:
    """Indices of the tensors to train so that their importance is largest and the backward pass costs at most ``budget`` FLOPs.

    Tensors come in the order of the backward pass, the one nearest the loss first. ``weight_flops[i]`` is the cost of the
    gradient of tensor i, ``activation_flops[i]`` that of passing the gradient on beyond it. A choice whose last tensor is d
    costs ``sum(weight_flops[chosen]) + sum(activation_flops[:d])``. The best choice is found by dynamic programming over
    (tensor, cost), where costs are rounded up to a ``resolution``-th of the budget (to whole FLOPs, where that is finer):
    the budget is never exceeded. Time and memory ``n * resolution``.

    Returns the indices, in order; none where no tensor of positive importance fits. GreenTrainer (Huang et al. 2023,
    arXiv:2309.13192).

    Raises ``ValueError`` for lists of different lengths, negative costs, or a budget or resolution below 1.
    """
    value = np.asarray(importance, np.float64)
    weight, passing = [int(f) for f in weight_flops], [int(f) for f in activation_flops]
    if not value.size == len(weight) == len(passing):
        raise ValueError(
            f"{value.size} importances, {len(weight)} and {len(passing)} costs are not of the same tensors"
        )
    if budget < 1 or resolution < 1 or min(weight + passing, default=0) < 0 or np.isnan(value).any():
        raise ValueError("a budget and a resolution are at least 1, costs at least 0, importances are no NaN")
    # Rounded up, so that `resolution` steps cover the budget.
    step = max(1, -(-int(budget) // resolution))
    capacity = int(budget) // step
    best = np.zeros(capacity + 1)  # by what may be spent on weights, over the tensors so far
    decisions = np.zeros((value.size, capacity + 1), bool)
    last, steps, most = -1, 0, 0.0
    passing_sum = 0
    for d, gain in enumerate(value):
        # Tensor d as the last one: passing the gradient on beyond it is not paid.
        free = int(budget) - passing_sum - weight[d]
        # The capacity is rounded down and costs up, so that the budget is never exceeded.
        if free >= 0 and gain + best[free // step] > most:
            last, steps, most = d, free // step, gain + best[free // step]
        # Only now: the best of the tensors before d must not hold d itself.
        need = -(-weight[d] // step)
        # The right-hand sides are new arrays: each tensor is taken at most once.
        if need <= capacity:
            decisions[d, need:] = best[: capacity + 1 - need] + gain > best[need:]
            best[need:] = np.maximum(best[need:], best[: capacity + 1 - need] + gain)
        passing_sum += passing[d]
    indices = [last] if last >= 0 else []
    # Each decision was made over the tensors up to its own, so the way back repeats it exactly.
    for i in range(last - 1, -1, -1):
        if decisions[i, steps]:
            indices.append(i)
            steps -= -(-weight[i] // step)
    return indices[::-1]
