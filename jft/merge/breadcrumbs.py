"""Model breadcrumbs: neither the largest nor the smallest entries of each delta; added up, or merged by TIES."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, in_range
from jft.merge.ties import disjoint_merge
from jft.merge.trim import l1_matched, largest, weighted_sum

Array = jax.Array
_MERGEKIT = {"density": 1.0, "gamma": 0.01, "exact_density": True}
_PAPER = "Davari and Belilovsky 2023, arXiv:2312.06795"


@register(paper=_PAPER, presets={"paper": {}, "mergekit": _MERGEKIT})
def breadcrumbs(
    *,
    density: Any = 0.2,
    gamma: Any = 0.1,
    axis: int | Literal["tensor", "model"] = "tensor",
    exact_density: bool = False,
    rescale: bool = False,
    normalize: bool = False,
) -> Rule:
    """``sum_i w_i mask_i tau_i``: of each delta the fraction ``density`` of the largest magnitude after the largest ``gamma``.

    density: the fraction that stays; gamma: the fraction of outliers that is removed first; each one number or one per model.
    Of n entries ``int(n gamma)`` are removed and the next ``int(n density)`` stay, or as many as there are; exact_density
    (mergekit) removes fewer outliers where else less than ``int(n density)`` would stay, so that density 1 changes nothing.
    The smallest ``1 - density - gamma`` go. (The same fractions have other names elsewhere: the released code calls what
    stays beta, and what is removed first gamma; mergekit's documentation calls its gamma the beta of the paper, and the
    smallest the gamma of the paper.)

    axis: n counts the entries of each ``tensor`` (the paper's layer-wise masks, mergekit), of the whole ``model``, or those
    along one axis, by its number: the released code has them along the last axis of ``[out, in]``, which is 0 in a weight
    ``[in, out]`` of jft; it leaves scalars as they are, and a vector is one row. rescale (mergekit): what is left of a tensor
    is multiplied by what makes the sum of its magnitudes what it was. normalize: divide by the sum of the weights.

    Davari and Belilovsky 2023, arXiv:2312.06795; released code rezazzr/breadcrumbs, with the preset ``paper`` and an axis.
    """
    return _rule(_breadcrumbs, density, gamma, axis, exact_density, rescale=rescale, normalize=normalize)


@register(paper=_PAPER, presets={"mergekit": {}})
def breadcrumbs_ties(
    *,
    density: Any = 1.0,
    gamma: Any = 0.01,
    axis: int | Literal["tensor", "model"] = "tensor",
    exact_density: bool = True,
    rescale: bool = False,
    elect: Literal["sum", "weighted", "count"] = "weighted",
    divide: Literal["count", "weights", "none", "max"] = "none",
) -> Rule:
    """Deltas as :func:`breadcrumbs` leaves them, merged by TIES: mergekit's combination.

    density, gamma, axis, exact_density, rescale: as in :func:`breadcrumbs`. elect, divide: as in :func:`jft.merge.ties`; a
    sum of exactly zero is taken as plus.

    Davari and Belilovsky 2023, arXiv:2312.06795; Yadav et al. 2023, arXiv:2306.01708.
    """
    return _rule(_breadcrumbs_ties, density, gamma, axis, exact_density, rescale=rescale, elect=elect, divide=divide)


def _rule(merge: Any, density: Any, gamma: Any, axis: Any, exact_density: bool, **options: Any) -> Rule:
    in_range("density", density, 0, 1)
    in_range("gamma", gamma, 0, 1)
    number = axis if isinstance(axis, int) else None
    if number is None and axis not in ("tensor", "model"):
        raise ValueError(f"axis is {axis!r}; it may be 'tensor', 'model' or the number of an axis")
    ranks = functools.partial(_ranks, exact_density=exact_density)
    return Rule(
        merge=merge,
        options={"axis": axis, **options},
        parameters={"density": density, "gamma": gamma},
        ranks=None if axis == "model" else ranks,
        passes=(Pass(ranks=ranks),) if axis == "model" else (),
        axis=number,
        elementwise=number is None and not options["rescale"],
    )


def _ranks(entries: int, parameters: Mapping[str, np.ndarray], exact_density: bool) -> np.ndarray:
    """How many entries are among the outliers or stay, and how many are outliers."""
    kept = (parameters["density"] * entries).astype(np.int64)
    outliers = (parameters["gamma"] * entries).astype(np.int64)
    if exact_density:
        outliers = np.minimum(outliers, entries - kept)
    return np.stack([np.minimum(outliers + kept, entries), outliers], axis=-1)


def _middle(tensor: Tensor, axis: int | str, rescale: bool) -> Array:
    if isinstance(axis, int) and tensor.deltas.ndim == 1:
        return tensor.deltas
    ranked = functools.partial(largest, tensor, exact=axis != "model", axis=axis if isinstance(axis, int) else None)
    mask = ranked(r=0) & ~ranked(r=1)
    return l1_matched(tensor.deltas, mask) if rescale else jnp.where(mask, tensor.deltas, 0)


def _breadcrumbs(tensor: Tensor, axis: int | str, rescale: bool, normalize: bool) -> Array:
    return weighted_sum(tensor, _middle(tensor, axis, rescale), normalize)


def _breadcrumbs_ties(tensor: Tensor, axis: int | str, rescale: bool, elect: str, divide: str) -> Array:
    return disjoint_merge(tensor, _middle(tensor, axis, rescale), elect, divide, zero="plus")
