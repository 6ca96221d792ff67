"""RAM: entries that one model alone changed are kept whole, those that several did are averaged."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, in_range, over_models

Array = jax.Array
_PAPER = "Yuan et al. 2026, arXiv:2601.13572"


@register(paper=_PAPER, presets={"paper": {}, "mergekit": {}})
def ram(*, epsilon: float = 1e-5) -> Rule:
    """``sum_i w_i tau_i / n`` over the n models that change an entry, ``|w_i tau_i| > epsilon``.

    A change that is unique to a model is so not diluted by the others, as an average would. Made for models of
    reinforcement learning, whose changes are sparse.

    Yuan et al. 2026, arXiv:2601.13572; released code xiangchi-yuan/mrl, mode "arm".
    """
    in_range("epsilon", epsilon, 0, float("inf"))
    return Rule(merge=_ram, options={"epsilon": epsilon}, elementwise=True)


@register(paper=_PAPER, presets={"paper": {}, "mergekit": {"scope": "tensor"}})
def ramplus(
    *, r: Any = 0.1, alpha: Any = 0.2, epsilon: float = 1e-5, scope: Literal["model", "tensor"] = "model"
) -> Rule:
    """:func:`ram`, unique changes of model i multiplied by ``1 + r min(rho_i, alpha)``: RAM+.

    ``rho_i`` is the number of entries that model i shares with others over the number that it changes alone, counted in the
    whole ``model`` or in each ``tensor`` (mergekit's ``ramplus_tl``, "tensor-local"). r, alpha: one number or one per model;
    r = 0.1 and alpha = 0.2 are mergekit's, the released code has alpha = 1 and calls ``1 + r`` its rescale factor (1.2).

    Yuan et al. 2026, arXiv:2601.13572; released code xiangchi-yuan/mrl, mode "arm-r-v2".
    """
    in_range("r", r, 0, float("inf"))
    in_range("alpha", alpha, 0, float("inf"))
    in_range("epsilon", epsilon, 0, float("inf"))
    return Rule(
        merge=_ramplus,
        options={"epsilon": epsilon, "scope": scope},
        parameters={"r": r, "alpha": alpha},
        passes=(Pass(_counts),) if scope == "model" else (),
        elementwise=scope == "model",
    )


def _changed(tensor: Tensor, epsilon: float) -> tuple[Array, Array, Array]:
    """The changes ``[N, ...]``, zero up to ``epsilon``; where they are any; and by how many models each entry is changed."""
    deltas = tensor.weighted() * tensor.deltas
    changed = jnp.abs(deltas) > epsilon
    return jnp.where(changed, deltas, 0), changed, jnp.sum(changed, axis=0)


def _ram(tensor: Tensor, epsilon: float) -> Array:
    deltas, _, models = _changed(tensor, epsilon)
    return over_models(deltas) / jnp.maximum(models, 1)


def _counts(tensor: Tensor, epsilon: float, scope: str) -> tuple[Array, Array]:
    """How many entries each model shares, and how many it changes alone; float32, for there are models of 2**31 and more."""
    _, changed, models = _changed(tensor, epsilon)
    axes = tuple(range(1, changed.ndim))
    shared, unique = (jnp.sum(changed & where, axis=axes) for where in (models > 1, models == 1))
    return shared.astype(jnp.float32), unique.astype(jnp.float32)


def _ramplus(tensor: Tensor, epsilon: float, scope: str) -> Array:
    deltas, _, models = _changed(tensor, epsilon)
    shared, unique = tensor.passes[0] if scope == "model" else _counts(tensor, epsilon, scope)
    # A model without unique entries has none to be scaled.
    rho = shared / jnp.maximum(unique, 1)
    factor = 1 + tensor.parameters["r"] * jnp.minimum(rho, tensor.parameters["alpha"])
    factor = jnp.where(models == 1, factor.reshape(-1, *(1,) * models.ndim), 1)
    return over_models(factor * deltas) / jnp.maximum(models, 1)
