"""EMR: one unified task vector, and for every task a mask and a scale that turn it into that task's."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, over_models

Array = jax.Array


@register(
    paper="Huang et al. 2024, arXiv:2405.17461",
    presets={"paper": {}, "fusionbench": {"rescale": "mean", "zero": "minus"}},
)
def emr(*, rescale: Literal["sum", "mean"] = "sum", zero: Literal["none", "minus"] = "none") -> Rule:
    """``lambda_i M_i tau_uni`` for every task i: a list of task vectors, one per model.

    Elect: ``sign = sgn(sum_i tau_i)``, and ``tau_uni = sign max_i |tau_i|`` over the models that have it. Mask: ``M_i`` is
    where ``tau_i tau_uni > 0``. Rescale: ``lambda_i = sum |tau_i| / sum |M_i tau_uni|`` over the whole model. weights multiply
    the deltas first. rescale: the ``sum`` over all entries (the paper), or the sum over tensors of their ``mean``, in which a
    small tensor counts as much as a large one (released code, FusionBench). zero: where deltas sum to exactly zero no sign is
    elected (``none``: sgn(0) = 0), or ``minus`` (released code, FusionBench).

    Huang et al. 2024, arXiv:2405.17461; released code harveyhuang18/EMR_Merging.
    """
    options = {"rescale": rescale, "zero": zero}
    return Rule(merge=_emr, options=options, passes=(Pass(_sizes),), elementwise=rescale == "sum", each=True)


def _unified(tensor: Tensor, zero: str) -> tuple[Array, Array, Array]:
    """The deltas, the masks ``[N, ...]`` and the unified delta."""
    deltas = tensor.weighted() * tensor.deltas
    sign = jnp.sign(over_models(deltas))
    if zero == "minus":
        sign = jnp.where(sign == 0, -1, sign)
    masks = deltas * sign > 0
    return deltas, masks, sign * jnp.max(jnp.where(masks, jnp.abs(deltas), 0), axis=0)


def _sizes(tensor: Tensor, rescale: str, zero: str) -> tuple[Array, Array]:
    deltas, masks, unified = _unified(tensor, zero)
    reduce = jnp.sum if rescale == "sum" else jnp.mean
    axes = tuple(range(1, deltas.ndim))
    return reduce(jnp.abs(deltas), axis=axes), reduce(jnp.abs(masks * unified), axis=axes)


def _emr(tensor: Tensor, rescale: str, zero: str) -> Array:
    _, masks, unified = _unified(tensor, zero)
    ((before, after),) = tensor.passes
    scales = before / jnp.where(after == 0, 1, after)
    return scales.reshape(-1, *(1,) * unified.ndim) * jnp.where(masks, unified, 0)
