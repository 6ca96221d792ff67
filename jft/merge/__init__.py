"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.adamerging import adamerging
from jft.merge.adarank import adarank
from jft.merge.arcee_fusion import arcee_fusion
from jft.merge.arithmetic import average, task_arithmetic
from jft.merge.atlas import atlas
from jft.merge.breadcrumbs import breadcrumbs, breadcrumbs_ties
from jft.merge.consensus import consensus, tall_masks
from jft.merge.dare import dare, dare_ties
from jft.merge.della import della, della_linear
from jft.merge.emr import emr
from jft.merge.fisher import fisher
from jft.merge.half_reset import half_reset
from jft.merge.learned import cross_entropy, entropy, learn
from jft.merge.localize import graft, localize, localize_and_stitch, stitch
from jft.merge.magmax import magmax
from jft.merge.magnitude import magnitude
from jft.merge.mats import mats
from jft.merge.pcb import pcb
from jft.merge.pleas import align, pleas
from jft.merge.ram import ram, ramplus
from jft.merge.registry import RULES, MergingRule, register
from jft.merge.regmean import regmean, regmean_plus_plus
from jft.merge.rule import Rule, Tensor, weights_of
from jft.merge.sce import sce
from jft.merge.search import Search, addition_row, addition_search, negation_row, negation_search, search
from jft.merge.ties import ties, ties_split

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
    "arcee_fusion",
    "atlas",
    "average",
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus",
    "cross_entropy",
    "dare",
    "dare_ties",
    "della",
    "della_linear",
    "emr",
    "entropy",
    "fisher",
    "graft",
    "half_reset",
    "learn",
    "localize",
    "localize_and_stitch",
    "magmax",
    "magnitude",
    "mats",
    "negation_row",
    "negation_search",
    "pcb",
    "pleas",
    "ram",
    "ramplus",
    "register",
    "regmean",
    "regmean_plus_plus",
    "sce",
    "search",
    "stitch",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "ties_split",
    "weights_of",
]
