"""DARE: entries of each delta dropped at random, the others rescaled; added up, or merged by TIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, in_range
from jft.merge.ties import disjoint_merge, elected, ranks_of_model
from jft.merge.trim import rescaled, uniform, weighted_sum

Array = jax.Array


@register(
    paper="Yu et al. 2023, arXiv:2311.03099",
    presets={
        "paper": {},
        "mergekit": {"density": 1.0, "rescale": "l1"},
        "peft": {},
        "fusionbench": {"density": 0.5},
    },
)
def dare(
    *,
    density: Any = 0.1,
    rescale: Literal["probability", "l1", "none"] = "probability",
    normalize: bool = False,
) -> Rule:
    """``sum_i w_i m_i tau_i / density`` with ``m_i ~ Bernoulli(density)``, entry by entry; `dare_linear` elsewhere.

    density: the probability to stay, ``1 - p`` of the paper; one number or one per model; 0 leaves nothing. rescale: divide by
    the ``probability`` (paper, peft, FusionBench), multiply by what makes the sum of magnitudes of a tensor what it was
    (``l1``, mergekit: smaller than ``1 / density`` where few large entries were drawn, and biased), or not at all
    (``none``). normalize: divide by the sum of the weights. The masks depend on ``seed``, on the name of a tensor and on the
    position of a model.

    Yu et al. 2023, arXiv:2311.03099; released code yule-BUAA/MergeLM.
    """
    in_range("density", density, 0, 1)
    options = {"rescale": rescale, "normalize": normalize}
    return Rule(merge=_dare, options=options, parameters={"density": density})


@register(
    paper="Yu et al. 2023, arXiv:2311.03099",
    presets={
        "paper": {},
        "mergekit": {
            "density": 1.0,
            "rescale": "l1",
            "trim": None,
            "elect": "weighted",
            "divide": "none",
            "zero": "plus",
        },
        "peft": {"trim": None, "zero": "plus"},
        "fusionbench": {"density": 0.5, "divide": "none"},
    },
)
def dare_ties(
    *,
    density: Any = 0.1,
    rescale: Literal["probability", "l1", "none"] = "probability",
    trim: Any = 0.2,
    elect: Literal["sum", "weighted", "count"] = "sum",
    divide: Literal["count", "weights", "none", "max"] = "count",
    zero: Literal["majority", "plus"] = "majority",
) -> Rule:
    """Deltas as :func:`dare` leaves them, merged by TIES.

    density, rescale: as in :func:`dare`. trim: the density to which TIES then trims the whole model (the paper's code and
    FusionBench, which keep one entry more than ``int(d trim)``), one number or one per model; None: no trimming by magnitude
    (mergekit, peft). elect, divide, zero: as in :func:`jft.merge.ties`.

    Yu et al. 2023, arXiv:2311.03099; released code yule-BUAA/MergeLM.
    """
    in_range("density", density, 0, 1)
    if trim is not None:
        in_range("trim", trim, 0, 1)
    options = {"rescale": rescale, "trim": trim is not None, "elect": elect, "divide": divide, "zero": zero}
    return Rule(
        merge=_dare_ties,
        options=options,
        parameters={"density": density} if trim is None else {"density": density, "trim": trim},
        passes=(() if trim is None else (Pass(_magnitudes, _ranks),)) + ((Pass(_signs),) if zero == "majority" else ()),
    )


def _ranks(entries: int, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    return ranks_of_model(entries, {"density": parameters["trim"]})


def dropped(tensor: Tensor, rescale: str) -> Array:
    """The deltas ``[N, ...]`` after the draw."""
    probability = tensor.weighted("density")
    return rescaled(tensor.deltas, uniform(tensor) < probability, rescale, probability)


def _trimmed(tensor: Tensor, rescale: str, trim: bool) -> Array:
    deltas = dropped(tensor, rescale)
    if not trim:
        return deltas
    assert tensor.scores is not None, "the magnitudes of the model are ranked"
    return jnp.where(tensor.scores >= tensor.passes[0].reshape(-1, *(1,) * (deltas.ndim - 1)), deltas, 0)


def _magnitudes(tensor: Tensor, rescale: str, **_: Any) -> Array:
    return jnp.abs(dropped(tensor, rescale))


def _signs(tensor: Tensor, rescale: str, trim: bool, elect: str, **_: Any) -> Array:
    return jnp.sum(elected(tensor, _trimmed(tensor, rescale, trim), elect))


def _dare(tensor: Tensor, rescale: str, normalize: bool) -> Array:
    return weighted_sum(tensor, dropped(tensor, rescale), normalize)


def _dare_ties(tensor: Tensor, rescale: str, trim: bool, elect: str, divide: str, zero: str) -> Array:
    return disjoint_merge(tensor, _trimmed(tensor, rescale, trim), elect, divide, zero)
