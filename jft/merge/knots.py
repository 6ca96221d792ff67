"""KnOTS: models aligned by a singular value decomposition of all their deltas before any rule merges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft.delta import Dense, LowRank, TaskVector
from jft.delta.encoding import Encoding
from jft.delta.numeric import wide
from jft.merge.registry import check_choices
from jft.merge.rule import Vectors
from jft.merge.spectral import Side, product, svd, transposed
from jft.merge.subspace import Coordinates, MergeRule, merged_in_subspace
from jft.merge.ties import ties

Array = jax.Array


def knots(
    vectors: Vectors,
    weights: Any = None,
    *,
    rule: MergeRule = ties,
    scaled: bool = False,
    side: Side = "outputs",
    scale: Any = 1.0,
    **rule_options: Any,
) -> TaskVector:
    """``U diag(s) rule(V_1 .. V_N)``, where ``[delta_1 .. delta_N] = U diag(s) [V_1 .. V_N]``, deltas written [out, in].

    The basis U and the values s are those of all models, ``V_i [k, in]`` is what each does in it, so that a rule that
    compares entry by entry compares like with like. k: the directions whose value is not zero, at most the sum of the ranks;
    in a stack as many as the layer of the highest rank has. rule: any rule of this package, called with ``weights`` and
    ``rule_options``; KnOTS-TIES and, with a rule that drops at random, KnOTS-DARE. scaled: merge ``diag(s) V_i``, as the
    released code does: trimming then goes by what an entry contributes. A linear rule gives what it gives without KnOTS.
    side: U is of the ``outputs`` (the paper) or the ``inputs``, deltas being stacked along the other. Vectors and scalars
    are merged by the rule in a call of their own.

    Deltas that are low rank in all models are decomposed by their factors, and never formed: the result is low rank, with
    k directions. Stoica et al. 2024, arXiv:2410.19735; there and in FusionBench values count as zero below 1e-5 and 1e-4,
    here below 1e-6 of the largest. Raises ``ValueError`` as ``rule`` does, and where shapes differ.
    """
    check_choices(knots, side=side)
    note = {"rule": "knots", "scaled": scaled, "side": side}
    coordinates = lambda deltas: _coordinates(deltas, scaled, side)
    return merged_in_subspace(vectors, weights, coordinates, rule, scale, note, rule_options)


def _coordinates(deltas: Sequence[Encoding], scaled: bool, side: Side) -> Coordinates:
    """Coordinates ``[..., I, k]``, O being ``side`` (``[..., k, O]`` and I)."""
    if side == "inputs":
        found = _coordinates([_transposed(delta) for delta in deltas], scaled, "outputs")
        return Coordinates([transposed(x) for x in found.each], lambda x: _transposed(found.back(transposed(x))))
    lefts, s, right = decomposed(deltas)
    left_scale, right_scale = (s, jnp.ones_like(s)) if scaled else (jnp.ones_like(s), s)
    each = [left * left_scale[..., None, :] for left in lefts]
    return Coordinates(each, lambda x: LowRank(x, right_scale[..., :, None] * right))


def decomposed(deltas: Sequence[Encoding]) -> tuple[list[Array], Array, Array]:
    """``V_i^T [..., I, k]`` of every delta ``V_i^T diag(s) U^T``, ``s [..., k]`` and ``U^T [..., k, O]``."""
    if all(isinstance(delta, LowRank) for delta in deltas):
        # The orthonormal columns of each factor aside, what is decomposed has a row for each rank and not for each input.
        frames = [jnp.linalg.qr(wide(delta.a)) for delta in deltas]  # type: ignore[attr-defined]
        rows = [product(r, wide(delta.b)) for (_, r), delta in zip(frames, deltas, strict=True)]  # type: ignore[attr-defined]
    else:
        frames, rows = [], [delta.dense() for delta in deltas]
    left, s, right = svd(jnp.concatenate(rows, axis=-2))
    # At least one, so that a matrix that nobody changed keeps its place.
    count = max(1, int(jnp.max(jnp.sum(s > 0, axis=-1))))
    cuts = [sum(x.shape[-2] for x in rows[:i]) for i in range(1, len(rows))]
    lefts = jnp.split(left[..., :count], cuts, axis=-2)
    if frames:
        lefts = [product(q, x) for (q, _), x in zip(frames, lefts, strict=True)]
    return lefts, s[..., :count], right[..., :count, :]


def _transposed(delta: Encoding) -> Encoding:
    if isinstance(delta, LowRank):
        return delta.transposed()
    return Dense(transposed(delta.dense()))
