"""SCE: select the entries in which the models differ most, weigh models by their energy, erase the minority's signs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range, over_models
from jft.select.threshold import top_each

Array = jax.Array


@register(
    paper="Wan et al. 2024, arXiv:2408.07990",
    presets={"paper": {}, "mergekit": {"density": 1.0, "least_energy": 1e-6}},
)
def sce(*, density: Any = 0.1, least_energy: float = 0.0) -> Rule:
    """``sum_i e_i tau_i / sum_i e_i`` over the models that have the elected sign, tensor by tensor.

    Select: the ``density`` of the entries whose variance over the models is not zero, of the largest variance (mergekit's
    ``select_topk``); the others become zero. Calculate: ``e_i``, the mean of the squares of what is selected of ``tau_i``,
    over the sum of all models'. Erase: at each entry the models whose sign is not that of the sum (zero is taken as plus).
    weights multiply the deltas first. least_energy: models whose mean squares sum to less are weighed equally, and shares of
    energy at an entry that sum to less are divided by it: 1e-6 in mergekit, to which the authors gave the rule, and where
    deltas of a size of 1e-3 are therefore averaged; 0 has no such scale, and treats ``c tau`` as it treats ``tau``.

    Of one model nothing varies: with ``density`` below 1 nothing is selected. The count of selected entries is computed in
    float32, which may be one off for tensors of 2**24 entries and more.

    Wan et al. 2024, arXiv:2408.07990 (FuseChat).
    """
    # The selection is one for all models.
    if np.ndim(density) != 0:
        raise ValueError(f"density is {density!r}; of sce it is one number")
    in_range("density", density, 0, 1)
    in_range("least_energy", least_energy, 0, float("inf"))
    return Rule(merge=_sce, options={"least_energy": least_energy}, parameters={"density": density})


def _sce(tensor: Tensor, least_energy: float) -> Array:
    deltas = tensor.weighted() * tensor.deltas
    deltas = jnp.where(_selected(deltas, tensor.parameters["density"][0]), deltas, 0)
    energy = jnp.mean(jnp.square(deltas), axis=tuple(range(1, deltas.ndim)))
    total = jnp.sum(energy)
    small = total <= least_energy
    share = jnp.where(small, 1 / len(deltas), energy / jnp.where(small, 1, total))
    sign = jnp.where(over_models(deltas) >= 0, 1.0, -1.0)
    shares = jnp.where(jnp.sign(deltas) == sign, share.reshape(-1, *(1,) * (deltas.ndim - 1)), 0)
    divisor = jnp.maximum(over_models(shares), least_energy)
    return over_models(shares * deltas) / jnp.where(divisor == 0, 1, divisor)


def _selected(deltas: Array, density: Array) -> Array:
    """Bool ``[...]``: where the models differ most."""
    variance = jnp.var(deltas, axis=0)
    count = jnp.floor(jnp.sum(variance != 0) * density).astype(jnp.uint32)
    return (density >= 1) | top_each(variance[None], count[None], 1)[0]
