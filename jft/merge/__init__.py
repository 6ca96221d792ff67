"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.arcee_fusion import arcee_fusion
from jft.merge.arithmetic import average, task_arithmetic
from jft.merge.breadcrumbs import breadcrumbs, breadcrumbs_ties
from jft.merge.consensus import consensus, tall_masks
from jft.merge.dare import dare, dare_ties
from jft.merge.della import della, della_linear
from jft.merge.emr import emr
from jft.merge.half_reset import half_reset
from jft.merge.magmax import magmax
from jft.merge.magnitude import magnitude
from jft.merge.pcb import pcb
from jft.merge.ram import ram, ramplus
from jft.merge.registry import RULES, MergingRule, register
from jft.merge.rule import Rule, Tensor, weights_of
from jft.merge.sce import sce
from jft.merge.search import Search, addition_row, addition_search, negation_row, negation_search, search
from jft.merge.ties import ties

__all__ = [
    "RULES",
    "MergingRule",
    "Rule",
    "Search",
    "Tensor",
    "addition_row",
    "addition_search",
    "arcee_fusion",
    "average",
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus",
    "dare",
    "dare_ties",
    "della",
    "della_linear",
    "emr",
    "half_reset",
    "magmax",
    "magnitude",
    "negation_row",
    "negation_search",
    "pcb",
    "ram",
    "ramplus",
    "register",
    "sce",
    "search",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "weights_of",
]
