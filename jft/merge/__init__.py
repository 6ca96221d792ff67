"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.depth import lines, with_lines
from jft.merge.half_reset import half_reset
from jft.merge.realign import irr
from jft.merge.registry import RULES, MergingRule, register
from jft.merge.rule import Rule, Tensor, weights_of
from jft.merge.search import Search, addition_row, addition_search, negation_row, negation_search, search
from jft.merge.soups import greedy_soup, learned_soup
from jft.merge.spheres import karcher, model_stock, multislerp, nearswap, nuslerp, slerp
from jft.merge.sums import average, expo, linear, momentum_interpolation, passthrough, task_arithmetic, wise_ft
from jft.merge.ties import ties
from jft.merge.transfer import explained_variance, pre_post, re_adapt, recycle, relative_gap, shadow_ft, transfer

__all__ = [
    "RULES",
    "MergingRule",
    "Rule",
    "Search",
    "Tensor",
    "addition_row",
    "addition_search",
    "average",
    "explained_variance",
    "expo",
    "greedy_soup",
    "half_reset",
    "irr",
    "karcher",
    "learned_soup",
    "linear",
    "lines",
    "model_stock",
    "momentum_interpolation",
    "multislerp",
    "nearswap",
    "negation_row",
    "negation_search",
    "nuslerp",
    "passthrough",
    "pre_post",
    "re_adapt",
    "recycle",
    "register",
    "relative_gap",
    "search",
    "shadow_ft",
    "slerp",
    "task_arithmetic",
    "ties",
    "transfer",
    "weights_of",
    "wise_ft",
    "with_lines",
]
