"""TALL masks, which find in a merged vector what each task needs, and consensus, which keeps what several need."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, in_range, over_models
from jft.merge.ties import LARGEST, disjoint_merge, signs_of_model, trimmed_by_model

Array = jax.Array
_PAPER = "Wang et al. 2024, arXiv:2405.07813"


@register(paper=_PAPER, presets={"paper": {}, "fusionbench": {"mask_lambda": 0.6}})
def tall_masks(
    *, mask_lambda: Any = 0.4, multi_task: Literal["task_arithmetic", "ties"] = "task_arithmetic", density: Any = 0.2
) -> Rule:
    """``M_i tau`` for every task i, with ``M_i = |tau_i| > lambda_i |tau - tau_i|``: a list of task vectors, one per model.

    tau is the multi-task vector: ``sum_i w_i tau_i`` (``task_arithmetic``), or what TIES makes with the sum in place of the
    mean (``ties``: the whole model trimmed to ``density``, zero signs by majority). mask_lambda: one number or one per task;
    the paper chooses it for each task from 0.2, 0.3 ... 0.6 by validation accuracy. The smaller, the more of tau stays.

    Wang et al. 2024, arXiv:2405.07813; released code nik-dim/tall_masks.
    """
    return _rule(_tall_masks, mask_lambda, multi_task, density, each=True)


@register(paper=_PAPER)
def consensus(
    *,
    mask_lambda: Any = 0.4,
    least: int = 2,
    multi_task: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    density: Any = 0.2,
) -> Rule:
    """The multi-task vector tau where ``least`` tasks or more have it in their mask, ``|tau_i| > lambda_i |tau - tau_i|``.

    least: 2 removes entries that no task needs ("catastrophic") and that one alone does ("selfish"), 1 the former, 0 none.
    mask_lambda, multi_task, density: as in :func:`tall_masks`. ``scale`` is searched, as for task arithmetic.

    Wang et al. 2024, arXiv:2405.07813; released code nik-dim/tall_masks.
    """
    if least < 0:
        raise ValueError(f"least is {least}; it is a number of tasks, 0 or more")
    return _rule(_consensus, mask_lambda, multi_task, density, least=least)


def _rule(merge: Any, mask_lambda: Any, multi_task: str, density: Any, each: bool = False, **options: Any) -> Rule:
    in_range("mask_lambda", mask_lambda, 0, float("inf"))
    in_range("density", density, 0, 1)
    trims = multi_task == "ties"
    return Rule(
        merge=merge,
        options={"multi_task": multi_task, **options},
        parameters={"mask_lambda": mask_lambda, "density": density},
        passes=(LARGEST, Pass(signs_of_model)) if trims else (),
        elementwise=True,
        each=each,
    )


def _masks(tensor: Tensor, multi_task: str) -> tuple[Array, Array]:
    """Which entries each task needs, ``[N, ...]``, and the multi-task vector."""
    if multi_task == "ties":
        merged = disjoint_merge(tensor, trimmed_by_model(tensor), elect="sum", divide="none", zero="majority")
    else:
        merged = over_models(tensor.weighted() * tensor.deltas)
    distance = jnp.abs(merged - tensor.deltas)
    return jnp.abs(tensor.deltas) > tensor.weighted("mask_lambda") * distance, merged


def _tall_masks(tensor: Tensor, multi_task: str) -> Array:
    masks, merged = _masks(tensor, multi_task)
    return jnp.where(masks, merged, 0)


def _consensus(tensor: Tensor, multi_task: str, least: int) -> Array:
    masks, merged = _masks(tensor, multi_task)
    return jnp.where(jnp.sum(masks, axis=0) >= least, merged, 0)
