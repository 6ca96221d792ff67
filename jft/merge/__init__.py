"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.arithmetic import average, task_arithmetic, weights_of
from jft.merge.half_reset import half_reset
from jft.merge.search import Search, addition_row, addition_search, negation_row, negation_search, search

__all__ = [
    "Search",
    "addition_row",
    "addition_search",
    "average",
    "half_reset",
    "negation_row",
    "negation_search",
    "search",
    "task_arithmetic",
    "weights_of",
]
