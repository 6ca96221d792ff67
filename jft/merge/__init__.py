"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.adamerging import adamerging, ties_split
from jft.merge.adarank import adarank
from jft.merge.arithmetic import average, task_arithmetic
from jft.merge.atlas import atlas
from jft.merge.fisher import fisher
from jft.merge.half_reset import half_reset
from jft.merge.learned import cross_entropy, entropy, learn
from jft.merge.localize import graft, localize, localize_and_stitch, stitch
from jft.merge.mats import mats
from jft.merge.pleas import align, pleas
from jft.merge.registry import RULES, MergingRule, register
from jft.merge.regmean import regmean, regmean_plus_plus
from jft.merge.rule import Rule, Tensor, weights_of
from jft.merge.search import Search, addition_row, addition_search, negation_row, negation_search, search
from jft.merge.ties import ties

__all__ = [
    "RULES",
    "MergingRule",
    "Rule",
    "Search",
    "Tensor",
    "adamerging",
    "adarank",
    "addition_row",
    "addition_search",
    "align",
    "atlas",
    "average",
    "cross_entropy",
    "entropy",
    "fisher",
    "graft",
    "half_reset",
    "learn",
    "localize",
    "localize_and_stitch",
    "mats",
    "negation_row",
    "negation_search",
    "pleas",
    "register",
    "regmean",
    "regmean_plus_plus",
    "search",
    "stitch",
    "task_arithmetic",
    "ties",
    "ties_split",
    "weights_of",
]
