"""DELLA: entries of each delta dropped at random, the larger the less likely; then merged by TIES, or added up."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range
from jft.merge.ties import disjoint_merge
from jft.merge.trim import along, rescaled, uniform, weighted_sum

Array = jax.Array
_MERGEKIT = {"density": 1.0, "epsilon": 0.15, "axis": 1, "rescale": "l1"}


@register(
    paper="Deep et al. 2024, arXiv:2406.11617",
    presets={"paper": {}, "mergekit": _MERGEKIT | {"elect": "weighted", "divide": "weights"}},
)
def della(
    *,
    density: Any = 0.7,
    epsilon: Any = 0.07,
    axis: int | None = 0,
    rescale: Literal["probability", "l1", "none"] = "probability",
    elect: Literal["sum", "weighted", "count"] = "sum",
    divide: Literal["count", "weights", "none", "max"] = "count",
) -> Rule:
    """MAGPRUNE, then TIES: the entry of rank r of n by magnitude, 0 the smallest, stays with probability

        density - epsilon + 2 epsilon r / (n - 1)

    and is divided by it; of what is left, the mean over the models that have the elected sign (of a sum of zero: plus).

    density: the mean probability to stay, ``1 - p`` of the paper; epsilon: half of the range of probabilities (the paper's
    epsilon and the ``window_size`` of its code are the whole range); each one number or one per model. Where density is 1
    all entries stay, where it is 0 none; elsewhere ``density - epsilon`` and ``density + epsilon`` must lie in (0, 1). axis:
    ranks are among the entries along this axis: 0 in a weight ``[in, out]`` of jft, 1 in ``[out, in]`` as the files of torch
    have it (preset ``mergekit``), the inputs of one output in both; None: among all of a tensor. A vector is one row. The only
    entry of a row has no rank and stays with probability ``density`` (mergekit 0.1.5 divides by zero there and raises).
    rescale: by the ``probability`` (paper), by what makes the sum of magnitudes what it was (``l1``, mergekit), or ``none``.
    elect, divide: as in :func:`jft.merge.ties`.

    Deep et al. 2024, arXiv:2406.11617; released code declare-lab/della, whose ranks reach both ends of the range (the paper
    writes ``epsilon / n`` for a step, which ends one step short).
    """
    options = {"axis": axis, "rescale": rescale, "elect": elect, "divide": divide}
    return Rule(merge=_della, options=options, parameters=_checked(density, epsilon))


@register(paper="Deep et al. 2024, arXiv:2406.11617", presets={"paper": {}, "mergekit": _MERGEKIT})
def della_linear(
    *,
    density: Any = 0.7,
    epsilon: Any = 0.07,
    axis: int | None = 0,
    rescale: Literal["probability", "l1", "none"] = "probability",
    normalize: bool = False,
) -> Rule:
    """``sum_i w_i magprune(tau_i)``: deltas as :func:`della` leaves them, without signs, added up.

    density, epsilon, axis, rescale: as in :func:`della`. normalize: divide by the sum of the weights.

    Deep et al. 2024, arXiv:2406.11617.
    """
    options = {"axis": axis, "rescale": rescale, "normalize": normalize}
    return Rule(merge=_della_linear, options=options, parameters=_checked(density, epsilon))


def _checked(density: Any, epsilon: Any) -> dict[str, Any]:
    in_range("density", density, 0, 1)
    in_range("epsilon", epsilon, 0, 0.5)
    for d, e in np.broadcast(np.asarray(density, np.float64), np.asarray(epsilon, np.float64)):
        if 0 < d < 1 and not 0 < d - e <= d + e < 1:
            raise ValueError(
                f"epsilon is {e:g} and density {d:g}: density - epsilon and density + epsilon must lie in (0, 1)"
            )
    return {"density": density, "epsilon": epsilon}


def _magpruned(tensor: Tensor, axis: int | None, rescale: str) -> Array:
    density, epsilon = tensor.weighted("density"), tensor.weighted("epsilon")
    probability = density - epsilon + _ranks(jnp.abs(tensor.deltas), axis) * 2 * epsilon
    probability = jnp.where(density >= 1, 1, jnp.where(density <= 0, 0, probability))
    return rescaled(tensor.deltas, uniform(tensor) < probability, rescale, probability)


def _ranks(magnitudes: Array, axis: int | None) -> Array:
    """The rank of each entry of each of N tensors, from 0, the smallest, to 1; 1/2 where there is only one."""
    rows = magnitudes.reshape(len(magnitudes), -1) if axis is None or magnitudes.ndim < 2 else magnitudes
    axis = 1 if axis is None or rows.ndim < 3 else along(rows, axis)
    n = rows.shape[axis]
    if n == 1:
        return jnp.full_like(magnitudes, 0.5)
    # The place of each entry in the order is the inverse of the permutation that sorts.
    ranks = jnp.argsort(jnp.argsort(rows, axis=axis), axis=axis)
    return (ranks / (n - 1)).reshape(magnitudes.shape)


def _della(tensor: Tensor, axis: int | None, rescale: str, elect: str, divide: str) -> Array:
    return disjoint_merge(tensor, _magpruned(tensor, axis, rescale), elect, divide, zero="plus")


def _della_linear(tensor: Tensor, axis: int | None, rescale: str, normalize: bool) -> Array:
    return weighted_sum(tensor, _magpruned(tensor, axis, rescale), normalize)
