"""Merging: rules that make one task vector of several, and the search for its coefficient."""

from jft.merge.adamerging import adamerging
from jft.merge.adarank import adarank
from jft.merge.arcee_fusion import arcee_fusion
from jft.merge.atlas import atlas
from jft.merge.breadcrumbs import breadcrumbs, breadcrumbs_ties
from jft.merge.calibration import svc
from jft.merge.cart import cart
from jft.merge.coefficients import constrained, learn_coefficients
from jft.merge.compress import METHODS as COMPRESSIONS
from jft.merge.compress import compress
from jft.merge.consensus import consensus, tall_masks
from jft.merge.core_space import core_space
from jft.merge.dare import dare, dare_ties
from jft.merge.della import della, della_linear
from jft.merge.depth import layerwise, lines, with_lines
from jft.merge.emr import emr
from jft.merge.essential_subspace import esm
from jft.merge.fisher import fisher
from jft.merge.half_reset import half_reset
from jft.merge.isotropic import iso_c, iso_cts
from jft.merge.knots import knots
from jft.merge.learned import cross_entropy, entropy, learn
from jft.merge.localize import graft, localize, localize_and_stitch, stitch
from jft.merge.magmax import magmax
from jft.merge.magnitude import magnitude
from jft.merge.mats import mats
from jft.merge.pcb import pcb
from jft.merge.pleas import align, pleas
from jft.merge.points import coordinate_search, draws, product, tune
from jft.merge.ram import ram, ramplus
from jft.merge.realign import irr
from jft.merge.registry import RULES, MergingRule, register
from jft.merge.regmean import regmean, regmean_plus_plus
from jft.merge.rule import Rule, Tensor, weights_of
from jft.merge.sce import sce
from jft.merge.search import (
    GRID,
    Search,
    addition_measure,
    addition_row,
    addition_search,
    negation_measure,
    negation_row,
    negation_search,
    search,
)
from jft.merge.singular_vectors import tsv_compress, tsv_m
from jft.merge.soups import greedy_soup, learned_soup
from jft.merge.spheres import karcher, model_stock, multislerp, nearswap, nuslerp, slerp
from jft.merge.statistics import load_statistics, save_statistics
from jft.merge.sums import average, expo, linear, momentum_interpolation, passthrough, task_arithmetic, wise_ft
from jft.merge.ties import ties, ties_split
from jft.merge.transfer import explained_variance, pre_post, re_adapt, recycle, relative_gap, shadow_ft, transfer
from jft.merge.vectorised import evaluate_points
from jft.merge.wudi import wudi

__all__ = [
    "COMPRESSIONS",
    "GRID",
    "RULES",
    "MergingRule",
    "Rule",
    "Search",
    "Tensor",
    "adamerging",
    "adarank",
    "addition_measure",
    "addition_row",
    "addition_search",
    "align",
    "arcee_fusion",
    "atlas",
    "average",
    "breadcrumbs",
    "breadcrumbs_ties",
    "cart",
    "compress",
    "consensus",
    "constrained",
    "coordinate_search",
    "core_space",
    "cross_entropy",
    "dare",
    "dare_ties",
    "della",
    "della_linear",
    "draws",
    "emr",
    "entropy",
    "esm",
    "evaluate_points",
    "explained_variance",
    "expo",
    "fisher",
    "graft",
    "greedy_soup",
    "half_reset",
    "irr",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "layerwise",
    "learn",
    "learn_coefficients",
    "learned_soup",
    "linear",
    "lines",
    "load_statistics",
    "localize",
    "localize_and_stitch",
    "magmax",
    "magnitude",
    "mats",
    "model_stock",
    "momentum_interpolation",
    "multislerp",
    "nearswap",
    "negation_measure",
    "negation_row",
    "negation_search",
    "nuslerp",
    "passthrough",
    "pcb",
    "pleas",
    "pre_post",
    "product",
    "ram",
    "ramplus",
    "re_adapt",
    "recycle",
    "register",
    "regmean",
    "regmean_plus_plus",
    "relative_gap",
    "save_statistics",
    "sce",
    "search",
    "shadow_ft",
    "slerp",
    "stitch",
    "svc",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "ties_split",
    "transfer",
    "tsv_compress",
    "tsv_m",
    "tune",
    "weights_of",
    "wise_ft",
    "with_lines",
    "wudi",
]
