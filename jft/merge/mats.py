"""MaTS: merging as one linear system for each weight, solved by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from jft.merge.fisher import mean
from jft.merge.registry import register
from jft.merge.regmean import check_gram, reduced
from jft.merge.rule import Rule, Tensor, in_range

Array = jax.Array


@register(paper="Tam, Bansal and Raffel 2024, arXiv:2312.04339")
def mats(
    *,
    curvature: Literal["identity", "diagonal", "gram", "kfac"] = "kfac",
    init: float | Literal["average"] = "average",
    iterations: int = 100,
    off_diagonal: float = 1.0,
    tolerance: float = 1e-5,
) -> Rule:
    """The solution of ``sum_i w_i C_i tau = sum_i w_i C_i tau_i``, by conjugate gradients from ``init``.

    Of parameters the system is the same, and so is every iterate: the base drops out. curvature: C_i is the ``identity`` (its
    solution is the average, and no statistics are read); ``diagonal``, entries times the Fisher information of
    :func:`jft.tangent.fisher_diagonal`; ``gram``, the Gram matrix of the inputs from the left (RegMean's problem,
    :func:`jft.select.grams.grams`); ``kfac``, ``A_i W B_i`` for a matrix ``[in, out]``, A_i and B_i second moments of inputs
    and of gradients in outputs (:func:`jft.select.grams.factors`). Statistics are one ``{path: ...}`` per model; paths
    without are averaged with the weights. init: ``average``, or a number c for ``c * sum_i tau_i``, the task arithmetic that
    the paper starts from and tunes c for. iterations: at most (paper: 100), until the residual is below ``tolerance``, that of
    SciPy, times the right-hand side: here of task vectors, so earlier stops are rarer than with parameters. off_diagonal: as
    in :func:`jft.merge.regmean`, for both matrices. Released code: r-three/mats. Where the system is singular the solution
    is the one nearest to init. Raises ``ValueError`` for options out of range and statistics of another shape.
    """
    if init != "average" and not isinstance(init, int | float):
        raise ValueError(f"init is {init!r}; give average, or the coefficient of the sum of task vectors")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, not {iterations}")
    in_range("off_diagonal", off_diagonal, 0, 1)
    return Rule(
        merge=_mats,
        options={
            "curvature": curvature,
            "init": init,
            "iterations": iterations,
            "off_diagonal": float(off_diagonal),
            "tolerance": tolerance,
        },
        statistics=curvature != "identity",
    )


def _mats(tensor: Tensor, curvature: str, init: Any, iterations: int, off_diagonal: float, tolerance: float) -> Array:
    deltas, weights = tensor.deltas, tensor.weighted()
    if tensor.statistics is None and curvature != "identity":
        return mean(deltas, weights)
    times = _curvature(tensor, curvature, off_diagonal)
    # `times` takes one matrix for every model: [N, ...] -> [N, ...].
    apply = lambda x: jnp.sum(weights * times(jnp.broadcast_to(x, deltas.shape)), axis=0)
    start = jnp.mean(deltas, axis=0) if init == "average" else init * jnp.sum(deltas, axis=0)
    target = jnp.sum(weights * times(deltas), axis=0)
    return cg(apply, target, x0=start, tol=tolerance, maxiter=iterations)[0]


def _curvature(tensor: Tensor, curvature: str, off_diagonal: float) -> Callable[[Array], Array]:
    """``x[N, ...] -> C_i x_i``."""
    statistics, product = tensor.statistics, lambda x, y: jnp.matmul(x, y, precision="highest")
    if curvature == "identity":
        return lambda x: x
    if curvature == "diagonal":
        if getattr(statistics, "shape", None) != tensor.deltas.shape:
            raise ValueError("curvature='diagonal' needs Fisher information of the shape of the weight")
        return lambda x: statistics * x
    factors = statistics if isinstance(statistics, dict) else {"inputs": statistics}
    wanted = ("inputs", "outputs") if curvature == "kfac" else ("inputs",)
    for name, axis in zip(wanted, (-2, -1), strict=False):
        if name not in factors:
            raise ValueError(
                f"curvature={curvature!r} needs statistics with {name!r}; jft.select.grams.factors gives them"
            )
        check_gram(f"matrix of {name}", factors[name], tensor.deltas, axis)
    inputs = reduced(factors["inputs"], off_diagonal)
    if curvature == "gram":
        return lambda x: product(inputs, x)
    outputs = reduced(factors["outputs"], off_diagonal)
    return lambda x: product(product(inputs, x), outputs)
