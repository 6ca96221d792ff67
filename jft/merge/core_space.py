"""Core space: low-rank deltas merged as small matrices between bases that all models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jft.delta import LowRank, TaskVector
from jft.delta.encoding import Encoding
from jft.delta.numeric import wide
from jft.merge.rule import Vectors
from jft.merge.singular_vectors import tsv_m
from jft.merge.spectral import product, transposed
from jft.merge.subspace import Coordinates, MergeRule, merged_in_subspace


def core_space(
    vectors: Vectors,
    weights: Any = None,
    *,
    rule: MergeRule = tsv_m,
    scale: Any = 1.0,
    **rule_options: Any,
) -> TaskVector:
    """``P rule(M_1 .. M_N) Q^T`` with ``M_i = P^T a_i b_i Q``: any rule on cores of side ``N r`` instead of whole matrices.

    P ``[in, N r]``: the left singular vectors of the factors ``[a_1 .. a_N]`` side by side; Q ``[out, N r]``: the right ones
    of the factors b below each other. Nothing is lost, ``P M_i Q^T = a_i b_i``, and no matrix of the size of the weight is
    formed: the result is low rank. rule: any rule of this package, called with ``weights`` and ``rule_options``. A rule that
    turns with the bases (task arithmetic; TSV-M where ranks are equal) gives what it gives on the whole matrices; one of
    entries (TIES) or of the mean of all singular values (Iso-C) does not, which is where the paper's gains are. Paths whose
    delta is not low rank in every vector are merged by the rule as they are.

    Panariello et al. 2025, arXiv:2509.17786. Raises ``ValueError`` as ``rule`` does, and where shapes differ.
    """
    return merged_in_subspace(vectors, weights, _cores, rule, scale, {"rule": "core_space"}, rule_options)


def _cores(deltas: Sequence[Encoding]) -> Coordinates | None:
    factors = [(wide(delta.a), wide(delta.b)) for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) < len(deltas):
        return None
    p, _, _ = jnp.linalg.svd(jnp.concatenate([a for a, _ in factors], axis=-1), full_matrices=False)
    _, _, qt = jnp.linalg.svd(jnp.concatenate([b for _, b in factors], axis=-2), full_matrices=False)
    each = [product(product(transposed(p), a), product(b, transposed(qt))) for a, b in factors]
    return Coordinates(each, lambda core: LowRank(p, product(core, qt)))
