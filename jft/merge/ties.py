"""TIES: trim by magnitude, elect a sign for every entry, average the models that have it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, in_range, over_models
from jft.merge.trim import l1_matched, largest

Array = jax.Array


@register(
    paper="Yadav et al. 2023, arXiv:2306.01708",
    presets={
        "paper": {},
        "mergekit": {
            "scope": "tensor",
            "density": 1.0,
            "elect": "weighted",
            "divide": "weights",
            "zero": "plus",
            "at_least_one": True,
        },
        "peft": {"scope": "tensor", "zero": "plus"},
        "fusionbench": {"divide": "none"},
    },
)
def ties(
    *,
    density: Any = 0.2,
    scope: Literal["model", "tensor"] = "model",
    elect: Literal["sum", "weighted", "count"] = "sum",
    divide: Literal["count", "weights", "none", "max"] = "count",
    zero: Literal["majority", "plus"] = "majority",
    at_least_one: bool = False,
    rescale: bool = False,
) -> Rule:
    """``tau_i <- trim(tau_i)``; ``sign = sgn(sum_i tau_i)``; the mean of ``w_i tau_i`` over the models with that sign.

    density: the fraction of entries that each model keeps, one number or one per model. scope: those of the largest
    magnitude of the whole ``model`` (the paper, its code, FusionBench: every entry that reaches the threshold, which is the
    k-th largest of d with ``k = d - (d - int(d density)) + 1``, so one more than ``int(d density)``), or of each ``tensor``
    (mergekit, peft: exactly ``int(n density)``; ``at_least_one``, mergekit's, where that is none). elect: the sign of the
    sum of deltas, of ``weighted`` deltas (mergekit, which also asks these whether they agree), or the majority ``count`` of
    signs (peft's "frequency"). zero: a sum of exactly zero takes the sign that most entries of the model have
    (``majority``) or ``plus``. divide: by the ``count`` of models that agree, by the sum of their ``weights`` (mergekit's
    ``normalize: true``), or ``none``: the sum, FusionBench's default and mergekit's ``normalize: false``. ``max``: no sum,
    but of the models that agree the ``w_i tau_i`` of the largest magnitude (FusionBench, ``merge_func: max``). rescale
    (mergekit): what trimming leaves of a tensor is multiplied by what makes the sum of its magnitudes what it was.

    Yadav et al. 2023, arXiv:2306.01708; released code prateeky2806/ties-merging. Presets of one name differ by 8 to 50%.
    """
    in_range("density", density, 0, 1)
    options = {"scope": scope, "rescale": rescale, "elect": elect, "divide": divide, "zero": zero}
    return Rule(
        merge=_ties,
        options=options,
        parameters={"density": density},
        ranks=None if scope == "model" else functools.partial(ranks_of_tensor, least=int(at_least_one)),
        # The majority of the signs of a whole model is known only once all of it was seen.
        passes=((LARGEST,) if scope == "model" else ()) + ((Pass(_signs),) if zero == "majority" else ()),
        elementwise=not rescale,
    )


def ranks_of_model(entries: int, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    """How many of all entries reach the threshold of the released code, the (d - int(d K))-th smallest."""
    kept = (entries * parameters["density"]).astype(np.int64)
    return np.minimum(kept + 1, entries)[:, None]


LARGEST = Pass(ranks=ranks_of_model)
"""What trims the whole model."""


def ranks_of_tensor(entries: int, parameters: Mapping[str, np.ndarray], least: int = 0) -> np.ndarray:
    """``int(density entries)``, or ``least`` where that is less and the density not zero."""
    kept = (parameters["density"] * entries).astype(np.int64)
    return np.where(parameters["density"] > 0, np.maximum(kept, min(least, entries)), 0)[:, None]


def _trimmed(tensor: Tensor, scope: str, rescale: bool) -> Array:
    mask = largest(tensor, exact=scope == "tensor")
    return l1_matched(tensor.deltas, mask) if rescale else jnp.where(mask, tensor.deltas, 0)


def _signs(tensor: Tensor, scope: str, rescale: bool, elect: str, **_: Any) -> Array:
    return jnp.sum(elected(tensor, _trimmed(tensor, scope, rescale), elect))


def _ties(tensor: Tensor, scope: str, rescale: bool, elect: str, divide: str, zero: str) -> Array:
    return disjoint_merge(tensor, _trimmed(tensor, scope, rescale), elect, divide, zero)


def elected(tensor: Tensor, deltas: Array, elect: str) -> Array:
    """The sign -1, 0 or 1 of each entry."""
    terms = {"sum": deltas, "weighted": deltas * tensor.weighted(), "count": jnp.sign(deltas)}[elect]
    return jnp.sign(over_models(terms))


def disjoint_merge(tensor: Tensor, deltas: Array, elect: str, divide: str, zero: str) -> Array:
    """Of ``deltas [N, ...]`` the mean over the models that have the elected sign; the options are those of :func:`ties`."""
    return disjoint_mean(tensor, deltas, agreeing(tensor, deltas, elect, zero), divide)


def agreeing(tensor: Tensor, deltas: Array, elect: str, zero: str) -> Array:
    """Bool ``[N, ...]``: which of ``deltas`` have the elected sign.

    With ``zero="majority"`` the last pass is the sum of the elected signs of the whole model.
    """
    sign = elected(tensor, deltas, elect)
    sign = jnp.where(sign == 0, jnp.sign(tensor.passes[-1]) if zero == "majority" else 1.0, sign)
    # A negative weight turns the sign of a model around where signs are those of weighted deltas.
    signs = jnp.sign(deltas * tensor.weighted() if elect == "weighted" else deltas)
    return (signs == sign) & (deltas != 0)


def disjoint_mean(tensor: Tensor, deltas: Array, agree: Array, divide: str) -> Array:
    """The sum of ``w_i deltas_i`` over the models that ``agree``, divided as ``divide`` of :func:`ties` says."""
    weights = tensor.weighted()
    terms = jnp.where(agree, weights * deltas, 0)
    if divide == "max":
        return jnp.take_along_axis(terms, jnp.argmax(jnp.abs(terms), axis=0)[None], axis=0)[0]
    total = over_models(terms)
    if divide == "none":
        return total
    share = over_models(jnp.where(agree, weights if divide == "weights" else 1.0, 0.0))
    return total / jnp.where(share == 0, 1, share)


def trimmed_by_model(tensor: Tensor) -> Array:
    """The deltas where they reach the threshold of their model, zero elsewhere: the paper's trim."""
    return jnp.where(largest(tensor, exact=False), tensor.deltas, 0)


def signs_of_model(tensor: Tensor, **_: Any) -> Array:
    """The sum of the elected signs of a tensor, which :func:`agreeing` wants for the whole model; trimmed by model."""
    return jnp.sum(elected(tensor, trimmed_by_model(tensor), "sum"))


@register(paper="Yang et al. 2024, arXiv:2310.02575")
def ties_split(*, density: Any = 0.2) -> Rule:
    """One vector for each: its entries that TIES would add up, and zero elsewhere. What AdaMerging++ learns coefficients of.

    Trim and elected sign are those of :func:`ties` by its paper: entries of the whole model that reach the threshold, the
    sign of their sum, for a sum of zero that of most entries. Yadav et al. 2023, arXiv:2306.01708.
    """
    in_range("density", density, 0, 1)
    return Rule(
        merge=_ties_split,
        parameters={"density": density},
        passes=(LARGEST, Pass(signs_of_model)),
        elementwise=True,
        each=True,
    )


def _ties_split(tensor: Tensor) -> Array:
    trimmed = trimmed_by_model(tensor)
    return jnp.where(agreeing(tensor, trimmed, "sum", "majority"), tensor.weighted() * trimmed, 0)
