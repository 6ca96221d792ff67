"""WUDI: the matrix whose interference with the models, seen through their own deltas, is least."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor
from jft.merge.spectral import (
    Matrices,
    Others,
    Side,
    combined,
    on_matrices,
    product,
    side_first,
    svd,
    transposed,
    weighted,
)

Array = jax.Array


@register(paper="Cheng et al. 2025, arXiv:2503.08099", presets={"paper": {}, "fusionbench": {}})
def wudi(
    *,
    solver: Literal["adam", "closed_form"] = "adam",
    steps: int = 300,
    learning_rate: float = 1e-5,
    ridge: float = 1e-8,
    side: Side = "inputs",
    matrices: Matrices = "all",
    others: Others = "average",
) -> Rule:
    """The minimum over D of ``sum_i ||tau_i^T (D - tau_i)||^2 / ||tau_i||^2``, ``tau_i = w_i delta_i`` being [in, out].

    The columns of a delta of a linear layer are sums of the layer's inputs, so that ``tau_i^T x`` stands in for the outputs
    on the inputs of task i. solver: ``adam``, ``steps`` of Adam at ``learning_rate`` from ``sum_i tau_i`` (the paper's,
    whose result depends on where it stops and on the size of the deltas; FusionBench's is the same), or ``closed_form``,
    the minimum itself:

        A D = C,    A = sum_i tau_i tau_i^T / ||tau_i||^2,    C = sum_i tau_i tau_i^T tau_i / ||tau_i||^2

    with ``ridge`` added to the eigenvalues of A, whose sum is N; directions that no delta has are zero. Without a ridge this
    is the pseudo-inverse of Wei et al. 2026, arXiv:2606.07289, who report that it does worse than a few hundred steps: it
    amplifies directions of small eigenvalues, which few steps, or a larger ridge, do not. side: whether A is of the
    ``inputs`` (the paper) or the ``outputs``. matrices, others: as in ``tsv_m``.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")
    for name, value in (("learning_rate", learning_rate), ("ridge", ridge)):
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    choices = {"solver": solver, "side": side, "matrices": matrices, "others": others}
    return Rule(merge=_wudi, options={"steps": steps, "learning_rate": learning_rate, "ridge": ridge, **choices})


def _wudi(
    tensor: Tensor,
    solver: str,
    steps: int,
    learning_rate: float,
    ridge: float,
    side: Side,
    matrices: str,
    others: str,
) -> Array:
    def merge() -> Array:
        taus = side_first(weighted(tensor), side)
        solution = descended(taus, steps, learning_rate) if solver == "adam" else solved(taus, ridge)
        return side_first(solution, side)

    return on_matrices(tensor, merge, matrices, lambda: combined(tensor, others))


def descended(taus: Array, steps: int, learning_rate: float) -> Array:
    """``steps`` of Adam from the sum of ``taus [N, I, O]``; the gradient is ``2 (A x - C)``."""
    unit = normalised(taus)
    gram = product(unit, transposed(unit))
    a, c = jnp.sum(gram, axis=0), jnp.sum(product(gram, taus), axis=0)
    adam = optax.adam(learning_rate)
    start = jnp.sum(taus, axis=0)

    def step(_: Array, state: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
        x, moments = state
        update, moments = adam.update(2 * (product(a, x) - c), moments)
        return x + update, moments

    return jax.lax.fori_loop(0, steps, step, (start, adam.init(start)))[0]


def solved(taus: Array, ridge: float) -> Array:
    """The minimum, by least squares: A is never formed, whose eigenvalues are squares and lose half of the digits."""
    unit = transposed(normalised(taus))
    # Rows B of all models, [N O, I], and what they should give: A = B^T B and C = B^T goals.
    u, s, vt = svd(unit.reshape(-1, unit.shape[2]))
    goals = product(unit, taus).reshape(-1, taus.shape[2])
    inverse = s / jnp.where(s == 0, 1, s**2 + ridge)
    return product(transposed(vt) * inverse, product(transposed(u), goals))


def normalised(taus: Array) -> Array:
    """Each of ``taus [N, I, O]`` by its norm; a model without a change has no part in the problem."""
    squares = jnp.sum(jnp.square(taus), axis=(1, 2), keepdims=True)
    # The root of zero has no gradient.
    return taus / jnp.sqrt(jnp.where(squares == 0, 1, squares))
