"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.arithmetic import average, task_arithmetic
from jft.merge.compress import METHODS as COMPRESSIONS
from jft.merge.compress import compress
from jft.merge.half_reset import half_reset
from jft.merge.registry import RULES, MergingRule, register
from jft.merge.rule import Rule, Tensor, weights_of
from jft.merge.search import Search, addition_row, addition_search, negation_row, negation_search, search
from jft.merge.ties import ties

__all__ = [
    "COMPRESSIONS",
    "RULES",
    "MergingRule",
    "Rule",
    "Search",
    "Tensor",
    "addition_row",
    "addition_search",
    "average",
    "compress",
    "half_reset",
    "negation_row",
    "negation_search",
    "register",
    "search",
    "task_arithmetic",
    "ties",
    "weights_of",
]
