"""Singular value calibration: what several models count twice in a merged matrix is counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jft.delta import TaskVector
from jft.merge.in_memory import merge
from jft.merge.registry import check_choices
from jft.merge.rule import Rule, Tensor, Vectors, listed
from jft.merge.spectral import TOLERANCE, Matrices, Side, on_matrices, product, side_first, svd
from jft.merge.sums import task_arithmetic

Array = jax.Array


def svc(
    vectors: Vectors,
    weights: Any = None,
    *,
    rule: Callable[..., TaskVector] = task_arithmetic,
    alpha: float = 1.0,
    side: Side = "outputs",
    matrices: Matrices = "all",
    scale: Any = 1.0,
    **rule_options: Any,
) -> TaskVector:
    """The merge of ``rule`` with the singular values of its matrices calibrated: ``s_r <- s_r N / sum_i max(alpha, p_ri)``.

    ``merged = U diag(s) V^T``, written [out, in]; ``a_ri = u_r^T delta_i`` is what model i does along the direction r, and
    ``p_ri = <s_r v_r, a_ri> / ||a_ri||^2`` how often the merge contains it: above 1 where several models add to it. A model
    that does nothing along r (less than 1e-6 of its norm) counts as alpha. rule: any rule of this package, called with
    ``weights`` and ``rule_options``; one with a scale of its own is ``functools.partial(rule, scale=0.3)``, which
    calibration sees, while ``scale`` multiplies the result. alpha: above 0; at 1 nothing grows. side: where the directions
    u lie, at the ``outputs`` (released code: U of a weight of torch, [out, in]) or the ``inputs``. matrices: all, or those
    of ``layers``; everything else is as ``rule`` merges it.

    "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging" 2026, arXiv:2602.05536. FusionBench takes
    ``||a_ri||^2`` below 1e-12 as 1e-12. Raises ``ValueError`` for an ``alpha`` of 0 or less.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, not {alpha}")
    check_choices(svc, side=side, matrices=matrices)
    taus = listed(vectors)
    merged = rule(vectors, weights, **rule_options)
    calibration = Rule(
        merge=_calibrated,
        options={"side": side, "matrices": matrices},
        parameters={"alpha": alpha},
    )
    note = {"rule": "svc", "alpha": alpha, "side": side}
    return merge(calibration, [merged, *taus], scale=scale, note=note)


def _calibrated(tensor: Tensor, side: Side, matrices: str) -> Array:
    merged = tensor.deltas[0]
    return on_matrices(tensor, lambda: _of_matrix(tensor, side), matrices, lambda: merged)


def _of_matrix(tensor: Tensor, side: Side) -> Array:
    merged, *_ = deltas = side_first(tensor.deltas, side)
    u, s, vt = svd(merged)
    # [N, r, other side]
    responses = product(u.T, deltas[1:])
    squares = jnp.sum(responses**2, axis=2)
    # What rounding leaves of an orthogonal direction, divided by its own square, would outweigh everything.
    present = squares > TOLERANCE**2 * jnp.sum(deltas[1:] ** 2, axis=(1, 2))[:, None]
    projections = jnp.where(present, s * jnp.sum(responses * vt, axis=2) / jnp.where(present, squares, 1), 0)
    shares = jnp.maximum(projections, tensor.parameters["alpha"][0])
    return side_first(product(u * (s * len(shares) / jnp.sum(shares, axis=0)), vt), side)
