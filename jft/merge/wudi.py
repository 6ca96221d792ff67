"""WUDI: the matrix whose interference with the models, seen through their own deltas, is least."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor
from jft.merge.spectral import (
    TOLERANCE,
    Matrices,
    Others,
    Side,
    combined,
    on_matrices,
    options,
    product,
    side_first,
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

    by the eigenvectors of A with ``ridge`` added to its eigenvalues, whose sum is N; directions that no delta has are zero,
    which is the pseudo-inverse of Wei et al. 2026, arXiv:2606.07289, where it does worse than a few hundred steps, for it
    amplifies the small eigenvalues that the steps leave alone. A larger ridge leaves them alone as well. side: whether A is
    of the ``inputs`` (the paper) or the ``outputs``. matrices, others: as in ``tsv_m``.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")
    for name, value in (("learning_rate", learning_rate), ("ridge", ridge)):
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    choices = options(solver=solver, side=side, matrices=matrices, others=others)
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
        a, c, start = normal_equation(side_first(weighted(tensor), side))
        solution = descended(a, c, start, steps, learning_rate) if solver == "adam" else solved(a, c, ridge)
        return side_first(solution, side)

    return on_matrices(tensor, merge, matrices, lambda: combined(tensor, others))


def normal_equation(taus: Array) -> tuple[Array, Array, Array]:
    """A ``[I, I]``, C ``[I, O]`` and the sum of ``taus [N, I, O]``; a model without a change has no part in A and C."""
    squares = jnp.sum(taus**2, axis=(1, 2), keepdims=True)
    gram = product(taus, transposed(taus)) / jnp.where(squares == 0, 1, squares)
    return jnp.sum(gram, axis=0), jnp.sum(product(gram, taus), axis=0), jnp.sum(taus, axis=0)


def descended(a: Array, c: Array, start: Array, steps: int, learning_rate: float) -> Array:
    """``steps`` of Adam from ``start`` on the quadratic with the gradient ``2 (a x - c)``."""
    adam = optax.adam(learning_rate)

    def step(_: Array, state: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
        x, moments = state
        update, moments = adam.update(2 * (product(a, x) - c), moments)
        return x + update, moments

    return jax.lax.fori_loop(0, steps, step, (start, adam.init(start)))[0]


def solved(a: Array, c: Array, ridge: float) -> Array:
    """``(a + ridge)^-1 c`` where ``a`` is not singular, and 0 where it is."""
    values, vectors = jnp.linalg.eigh(a)
    support = values > TOLERANCE * values[-1]
    inverse = jnp.where(support, 1 / jnp.where(support, values + ridge, 1), 0)
    return product(vectors * inverse, product(transposed(vectors), c))
