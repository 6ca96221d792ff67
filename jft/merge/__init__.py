"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.half_reset import half_reset
from jft.merge.registry import RULES, MergingRule, register
from jft.merge.rule import Rule, Tensor, weights_of
from jft.merge.search import Search, addition_row, addition_search, negation_row, negation_search, search
from jft.merge.spheres import karcher, model_stock, multislerp, nearswap, nuslerp, slerp
from jft.merge.sums import average, expo, linear, momentum_interpolation, passthrough, task_arithmetic, wise_ft
from jft.merge.ties import ties

__all__ = [
    "RULES",
    "MergingRule",
    "Rule",
    "Search",
    "Tensor",
    "addition_row",
    "addition_search",
    "average",
    "expo",
    "half_reset",
    "karcher",
    "linear",
    "model_stock",
    "momentum_interpolation",
    "multislerp",
    "nearswap",
    "negation_row",
    "negation_search",
    "nuslerp",
    "passthrough",
    "register",
    "search",
    "slerp",
    "task_arithmetic",
    "ties",
    "weights_of",
    "wise_ft",
]
