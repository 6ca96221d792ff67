"""Isotropic merging: every direction of the merged matrix gets the same singular value."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range
from jft.merge.singular_vectors import side_by_side
from jft.merge.spectral import (
    Matrices,
    Others,
    Side,
    combined,
    on_matrices,
    polar,
    product,
    side_first,
    svd,
    transposed,
    weighted,
)

Array = jax.Array
PAPER = "Marczak et al. 2025, arXiv:2502.04959"


@register(paper=PAPER, presets={"paper": {}, "fusionbench": {}})
def iso_c(*, matrices: Matrices = "all", others: Others = "average") -> Rule:
    """Iso-C, in the common subspace: ``mean(s) U V^T`` of ``sum_i w_i delta_i = U diag(s) V^T``.

    The mean is over all singular values; directions of the value zero stay zero, where released code fills in those that
    LAPACK returns. scale: the paper's alpha, chosen on validation data. matrices, others: as in ``tsv_m``.
    """
    return Rule(merge=_common, options={"matrices": matrices, "others": others})


def _common(tensor: Tensor, matrices: str, others: str) -> Array:
    def merge() -> Array:
        u, s, vt = svd(combined(tensor, "sum"))
        return jnp.mean(s) * product(u, vt)

    return on_matrices(tensor, merge, matrices, lambda: combined(tensor, others))


@register(paper=PAPER, presets={"paper": {}, "fusionbench": {}})
def iso_cts(
    *,
    common_space_fraction: float = 0.8,
    side: Side = "outputs",
    matrices: Matrices = "all",
    others: Others = "average",
) -> Rule:
    """Iso-CTS, in the common and task-specific subspaces: ``mean(s) polar(U) polar(V)^T``.

    U, s, V: the leading k singular triplets of ``sum_i w_i delta_i``, and beside them the leading (r - k) / N of each model
    once the subspace of those k is projected out of it. r is the smaller side of the matrix, and k ``int(r
    common_space_fraction)``, moved to the nearest number that makes r - k a multiple of N. side: where the common subspace
    is projected out: at the ``outputs`` (released code: U of a weight of torch, which is [out, in]) or the ``inputs``.
    scale: the paper's alpha. matrices, others: as in ``tsv_m``.
    """
    in_range("common_space_fraction", common_space_fraction, 0, 1)
    choices = {"side": side, "matrices": matrices, "others": others}
    return Rule(merge=_common_and_specific, options={"fraction": common_space_fraction, **choices})


def _common_and_specific(tensor: Tensor, fraction: float, side: Side, matrices: str, others: str) -> Array:
    def merge() -> Array:
        deltas = side_first(weighted(tensor), side)
        common, specific = sizes(min(deltas.shape[1:]), len(deltas), fraction)
        u, s, vt = (x[..., :common] for x in _columns(jnp.sum(deltas, axis=0)))
        rest = deltas - product(u, transposed(u), deltas)
        us, ss, vts = (x[..., :specific] for x in _columns(rest, jnp.linalg.norm(deltas, axis=(1, 2))))
        left = polar(jnp.concatenate([u, side_by_side(us)], axis=1))
        right = polar(jnp.concatenate([vt, side_by_side(vts)], axis=1))
        mean = (jnp.sum(s) + jnp.sum(ss)) / max(common + len(deltas) * specific, 1)
        return side_first(mean * product(left, transposed(right)), side)

    return on_matrices(tensor, merge, matrices, lambda: combined(tensor, others))


def _columns(x: Array, size: Array | None = None) -> tuple[Array, Array, Array]:
    """U, s and V, singular vectors as columns."""
    u, s, vt = svd(x, size)
    return u, s, transposed(vt)


def sizes(rank: int, count: int, fraction: float) -> tuple[int, int]:
    """How many directions of the sum, and how many of each of ``count`` models."""
    rest = rank - int(rank * fraction)
    # Rounded as the released code does; where that is more than there is, down.
    each = round(rest / count)
    each = each if each * count <= rank else rest // count
    return rank - each * count, each
