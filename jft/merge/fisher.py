"""Fisher merging: the average in which every parameter counts as much as the data say it matters."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, in_range

Array = jax.Array


@register(
    paper="Matena and Raffel 2022, arXiv:2111.09832",
    presets={"paper": {}, "fusionbench": {"floor_by": "sum", "normalise": True}},
)
def fisher(*, floor: float = 1e-6, floor_by: Literal["max", "sum", "first"] = "max", normalise: bool = False) -> Rule:
    """``sum_i w_i F_i tau_i / sum_i w_i F_i``, entry by entry, F_i the diagonal Fisher information of model i.

    Of parameters the formula is the same: the base drops out. statistics: ``{path: array like the weight}`` per model, from
    :func:`jft.tangent.fisher_diagonal` (exact), :func:`jft.tangent.squared_batch_sums` (what MergeLM and FusionBench compute)
    or the ``squares`` of a calibration (:class:`jft.select.scores.Fisher`). A path without statistics is averaged with the
    weights. floor, floor_by: F_i is at least the floor (``max``), so that what matters to no model is averaged; has it added
    (``sum``, MergeLM and FusionBench); or is at least the floor in the ``first`` model alone, "the target", which is the
    default of the released code (mmatena/model_merging). normalise: weights are divided by the norm of F_i over the whole
    model, which lets models count alike whatever the size of their gradients (default of the released code; MergeLM and
    FusionBench divide by the norm plus the floor). Weights that cancel give 0.

    Raises ``ValueError`` for a floor below 0.
    """
    in_range("floor", floor, 0, float("inf"))
    return Rule(
        merge=_fisher,
        options={"floor": float(floor), "floor_by": floor_by, "normalise": normalise},
        passes=(Pass(_squared_norms),) if normalise else (),
        statistics=True,
    )


def _squared_norms(tensor: Tensor, **_: Any) -> Array:
    if tensor.statistics is None:
        return jnp.zeros(len(tensor.deltas))
    return jnp.sum(jnp.square(tensor.statistics), axis=tuple(range(1, tensor.statistics.ndim)))


def _fisher(tensor: Tensor, floor: float, floor_by: str, normalise: bool) -> Array:
    weights = tensor.weighted()
    if tensor.statistics is None:
        return mean(tensor.deltas, weights)
    if tensor.statistics.shape != tensor.deltas.shape:
        shapes = f"{tensor.statistics.shape[1:]} and the tensor {tensor.deltas.shape[1:]}"
        raise ValueError(f"the Fisher information has the shape {shapes}")
    information = tensor.statistics
    if floor_by == "sum":
        information = information + floor
    elif floor_by == "max":
        information = jnp.maximum(information, floor)
    else:
        information = information.at[0].set(jnp.maximum(information[0], floor))
    if normalise:
        # MergeLM adds its floor to the norm as well; elsewhere only a norm of zero needs another divisor.
        norms = jnp.sqrt(tensor.passes[0]) + (floor if floor_by == "sum" else 0.0)
        scale = 1 / jnp.where(norms == 0, 1.0, norms)
        # Divided by their sum, which drops out: the terms would else be as large as 1e6 over 1e-6.
        weights = weights * (scale / jnp.sum(scale)).reshape(weights.shape)
    return mean(tensor.deltas, weights * information)


def mean(deltas: Array, weights: Array) -> Array:
    """``sum_i weights_i deltas_i / sum_i weights_i`` over the first axis; 0 where the weights sum to zero."""
    total = jnp.sum(weights * jnp.ones_like(deltas), axis=0)
    return jnp.sum(weights * deltas, axis=0) / jnp.where(total == 0, jnp.inf, total)
