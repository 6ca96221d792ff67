"""Task singular vectors: the leading singular directions of each model, made orthogonal to those of the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range
from jft.merge.spectral import Matrices, Others, combined, on_matrices, polar, product, svd, weighted

Array = jax.Array
PAPER = "Gargiulo et al. 2024, arXiv:2412.00081"


@register(paper=PAPER, presets={"paper": {}, "fusionbench": {}})
def tsv_m(*, at_least_one: bool = False, matrices: Matrices = "all", others: Others = "average") -> Rule:
    """TSV-Merge: ``polar(U) diag(S) polar(V)^T``, U, S, V the leading r // N singular triplets of all models side by side.

    r is the smaller side of the matrix and N the number of models, so that what is kept is r directions in all; polar is
    the nearest matrix with orthonormal columns, which takes away what the directions of two models share. Of models whose
    matrices have a lower rank than r // N only the directions that exist enter; of a matrix with fewer rows or columns than
    models nothing is left (``at_least_one`` keeps one direction of each). weights multiply the deltas first, as the list
    ``alpha`` of FusionBench does; its number ``alpha`` is ``scale``.

    matrices: all, or only those of ``layers`` (embeddings and heads are not). others: what vectors, scalars and further
    matrices become: the ``average`` (the paper's), the ``sum`` or ``zero``. FusionBench is the same, except that the null
    directions of deltas of low rank, which LAPACK chooses, take part in its whitening.
    """
    return Rule(merge=_merge, options={"at_least_one": at_least_one, "matrices": matrices, "others": others})


def _merge(tensor: Tensor, at_least_one: bool, matrices: str, others: str) -> Array:
    def merge() -> Array:
        deltas = weighted(tensor)
        return singular_vectors(deltas, max(min(deltas.shape[1:]) // len(deltas), int(at_least_one)))

    return on_matrices(tensor, merge, matrices, lambda: combined(tensor, others))


def singular_vectors(deltas: Array, rank: int) -> Array:
    """The merge of ``deltas [N, I, O]`` with ``rank`` directions of each."""
    if rank == 0:
        return jnp.zeros(deltas.shape[1:], deltas.dtype)
    u, s, vt = svd(deltas)
    left = polar(side_by_side(u[:, :, :rank]))
    right = polar(vt[:, :rank].reshape(-1, vt.shape[-1]))
    return product(left * s[:, :rank].reshape(-1), right)


def side_by_side(x: Array) -> Array:
    """``[N, I, k]`` as ``[I, N k]``."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


@register(paper=PAPER)
def tsv_compress(*, fraction: float | None = None, matrices: Matrices = "all") -> Rule:
    """TSV-Compress: each model's own best approximation of rank ``int(r fraction)``; a list, one result per vector.

    r is the smaller side of the matrix. fraction: of the singular values that stay; None is ``1 / N``. What is no matrix
    stays as it is. weights multiply each result.
    """
    if fraction is not None:
        in_range("fraction", fraction, 0, 1)
    return Rule(merge=_compress, options={"fraction": fraction, "matrices": matrices}, each=True)


def _compress(tensor: Tensor, fraction: float | None, matrices: str) -> Array:
    deltas = weighted(tensor)

    def compress() -> Array:
        size = min(deltas.shape[1:])
        return truncated(deltas, size // len(deltas) if fraction is None else int(size * fraction))

    return on_matrices(tensor, compress, matrices, lambda: deltas)


def truncated(x: Array, rank: int) -> Array:
    """The best approximation of ``x [..., I, O]`` of rank ``rank``."""
    u, s, vt = svd(x)
    return product(u[..., :rank] * s[..., None, :rank], vt[..., :rank, :])
