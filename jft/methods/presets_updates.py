"""Presets in which all weights may train, and each step decides which of them move and how far."""

from __future__ import annotations

from collections.abc import Sequence

from jft.methods import update_rules
from jft.methods.parametrise import InPlace
from jft.methods.patterns import patterns
from jft.methods.plan import Method, Select
from jft.methods.registry import register

Names = Sequence[str] | str


@register("gmt", paper="Li et al. 2024, arXiv:2406.15330")
def gmt(density: float = 0.2, include: Names = ("",), exclude: Names = ()) -> Method:
    """Train every weight, in each step by the largest ``density`` of the gradient's entries in each matrix and vector.

    The gradient is the mean over the batch's microbatches (the paper's accumulation), and what is masked is the gradient:
    the optimizer's momentum still moves entries that were not chosen. The paper has densities of 0.1 to 0.4.
    """
    return Method(Select(patterns(include), patterns(exclude)), InPlace(), rule=update_rules.TopGradient(density))


@register("spider", paper="Huang et al. 2024, arXiv:2411.10928")
def spider(include: Names = ("",), exclude: Names = ()) -> Method:
    """Train every weight, and after each step draw those back to the base that matter more to it than to the task.

    By the size of the base weight against that of the summed gradient, each ranked within its matrix or vector: see
    :class:`jft.methods.update_rules.Importance`. This is the authors' code. The optimizer's own moments are not drawn back.
    """
    return Method(Select(patterns(include), patterns(exclude)), InPlace(), rule=update_rules.Importance())
