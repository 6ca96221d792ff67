"""The subnetwork that reinforcement learning changed, trained again."""

from __future__ import annotations

from typing import Any

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores


@register("rl_subnetwork", paper="Mukherjee et al. 2025, arXiv:2505.11711")
def rl_subnetwork(tuned: Any = None, tolerance: float = 1e-5) -> Method:
    """Train again, from the base, exactly the entries that differ from it in a tuned model.

    tuned: that model, as a directory, a task vector or its file, or parameters. tolerance: a larger ``|theta1 - theta0|``
    is a difference (the paper's for bfloat16 weights). Matrices with few of them cost as much memory as the fullest layer
    of their stack.
    """
    return Method(Select(score=scores.Difference(tuned, tolerance), budget=budget.Beyond(0.5)), InPlace())
