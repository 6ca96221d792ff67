"""CART: the average of the models, and around it the leading directions of each."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range
from jft.merge.singular_vectors import truncated
from jft.merge.spectral import Matrices, on_matrices

Array = jax.Array


@register(paper="Choi et al. 2024, arXiv:2412.12153")
def cart(*, rank_ratio: float = 0.08, coefficient: Any = 1.0, matrices: Matrices = "all") -> Rule:
    """``mean + coefficient sum_i w_i SVD_k(delta_i - mean)``: task arithmetic centered at the average, of low rank.

    k is ``ceil(r rank_ratio)``, r the smaller side of the matrix; of full rank and with equal weights the terms cancel, and
    the average is what remains. coefficient: the paper's lambda, chosen on validation data. Vectors and scalars (and
    matrices outside ``layers``, with ``matrices="layers"``) have full rank: their average. scale multiplies all of it.
    """
    in_range("rank_ratio", rank_ratio, 0, 1)
    return Rule(
        merge=_cart,
        options={"rank_ratio": rank_ratio, "matrices": matrices},
        parameters={"coefficient": coefficient},
    )


def _cart(tensor: Tensor, rank_ratio: float, matrices: str) -> Array:
    mean = jnp.mean(tensor.deltas, axis=0)

    def merge() -> Array:
        terms = truncated(tensor.deltas - mean, math.ceil(min(mean.shape) * rank_ratio))
        factors = tensor.weighted() * tensor.weighted("coefficient")
        return mean + jnp.sum(factors * terms, axis=0)

    return on_matrices(tensor, merge, matrices, lambda: mean)
