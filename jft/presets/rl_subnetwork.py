"""The subnetwork that reinforcement learning changed, trained again."""

from __future__ import annotations

from typing import Any

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores

CARD = Card(
    formula="mask = |theta1 - theta0| > tolerance, both in the dtype of the base; the mask trains from theta0, nothing else.",
    follows="paper: the mask and training it from the base; code: tolerance, the comparison in the dtype of the checkpoints",
    code="SagnikMukherjee/sparsity_in_rl@c0d55117, src/check_sparsity.py",
    departs="The code reads both models as bfloat16 by default; here the dtype is that of the base as it was loaded. From a "
    "float32 base the mask is that of float32: 4.5 times as many entries in one measurement. Load the base as bfloat16.",
    defaults={"tolerance": (1e-5, 1e-5)},
    check="masks of a bfloat16 base from parameters, directory, task vector and file against NumPy's rounding; three steps",
)


@register("rl_subnetwork", paper="Mukherjee et al. 2025, arXiv:2505.11711", card=CARD)
def rl_subnetwork(tuned: Any = None, tolerance: float = 1e-5) -> Method:
    """Train again, from the base, exactly the entries that differ from it in a tuned model.

    tuned: that model, as a directory, a task vector or its file, or parameters; rounded to the dtype of the base first, so
    that all four say the same. tolerance: a larger ``|theta1 - theta0|`` is a difference (the paper's for bfloat16 weights: a
    float32 base has many more). Matrices with few of them cost as much memory as the fullest layer of their stack.
    """
    # The score is 1 where the models differ and 0 elsewhere; 0.5 separates them.
    return Method(Select(score=scores.Difference(tuned, tolerance), budget=budget.Beyond(0.5)), InPlace())
