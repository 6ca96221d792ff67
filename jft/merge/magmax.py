"""MagMax: of every entry the change of the largest magnitude."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor

Array = jax.Array


@register(paper="Marczak et al. 2024, arXiv:2407.06322", presets={"paper": {}, "fusionbench": {}})
def magmax() -> Rule:
    """``tau[j] = w_k tau_k[j]`` with ``k = argmax_i |w_i tau_i[j]|``; of equal magnitudes the last model's.

    The paper multiplies the result by ``scale=0.5`` for models that were trained independently, and searches it.

    Marczak et al. 2024, arXiv:2407.06322; released code danielm1405/magmax, which FusionBench follows.
    """
    return Rule(merge=_magmax, elementwise=True)


def _magmax(tensor: Tensor) -> Array:
    terms = tensor.weighted() * tensor.deltas
    # argmax takes the first of equals: turned around, the last.
    last = len(terms) - 1 - jnp.argmax(jnp.abs(terms)[::-1], axis=0)
    return jnp.take_along_axis(terms, last[None], axis=0)[0]
