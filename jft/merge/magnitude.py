"""Magnitude pruning: the largest entries of each delta, added up."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range
from jft.merge.ties import LARGEST, ranks_of_tensor
from jft.merge.trim import l1_matched, largest, weighted_sum

Array = jax.Array


@register(
    paper="Yu et al. 2023, arXiv:2311.03099 (as the baseline of DARE)",
    presets={"peft": {}, "mergekit": {"density": 1.0, "at_least_one": True}},
)
def magnitude(
    *,
    density: Any = 0.2,
    scope: Literal["tensor", "model"] = "tensor",
    at_least_one: bool = False,
    rescale: bool = False,
    normalize: bool = False,
) -> Rule:
    """``sum_i w_i trim(tau_i)``: of each delta the fraction ``density`` of the largest magnitude.

    density: one number or one per model. scope: of each ``tensor`` exactly ``int(n density)`` entries (peft's
    ``magnitude_prune``; ``at_least_one``, mergekit's ``magnitude``, where that is none), or of the whole ``model`` the entries
    that TIES keeps (:func:`jft.merge.ties`). rescale (mergekit): what is left of a tensor is multiplied by what makes the
    sum of its magnitudes what it was. normalize: divide by the sum of the weights.

    With density 1 it is task arithmetic.
    """
    in_range("density", density, 0, 1)
    return Rule(
        merge=_magnitude,
        options={"scope": scope, "rescale": rescale, "normalize": normalize},
        parameters={"density": density},
        ranks=None if scope == "model" else functools.partial(ranks_of_tensor, least=int(at_least_one)),
        passes=(LARGEST,) if scope == "model" else (),
        elementwise=not rescale,
    )


def _magnitude(tensor: Tensor, scope: str, rescale: bool, normalize: bool) -> Array:
    mask = largest(tensor, exact=scope == "tensor")
    kept = l1_matched(tensor.deltas, mask) if rescale else jnp.where(mask, tensor.deltas, 0)
    return weighted_sum(tensor, kept, normalize)
