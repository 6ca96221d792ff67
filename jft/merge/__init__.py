"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.arithmetic import average, task_arithmetic
from jft.merge.calibration import svc
from jft.merge.cart import cart
from jft.merge.core_space import core_space
from jft.merge.essential_subspace import esm
from jft.merge.half_reset import half_reset
from jft.merge.isotropic import iso_c, iso_cts
from jft.merge.knots import knots
from jft.merge.registry import RULES, MergingRule, register
from jft.merge.rule import Rule, Tensor, weights_of
from jft.merge.search import Search, addition_row, addition_search, negation_row, negation_search, search
from jft.merge.singular_vectors import tsv_compress, tsv_m
from jft.merge.ties import ties
from jft.merge.wudi import wudi

__all__ = [
    "RULES",
    "MergingRule",
    "Rule",
    "Search",
    "Tensor",
    "addition_row",
    "addition_search",
    "average",
    "cart",
    "core_space",
    "esm",
    "half_reset",
    "iso_c",
    "iso_cts",
    "knots",
    "negation_row",
    "negation_search",
    "register",
    "search",
    "svc",
    "task_arithmetic",
    "ties",
    "tsv_compress",
    "tsv_m",
    "weights_of",
    "wudi",
]
