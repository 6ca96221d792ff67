"""IRR: what a fine-tuning changed against the direction of safety, taken back, and the rest adjusted for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta
from jft.delta import TaskVector
from jft.merge.in_memory import stack_axes
from jft.merge.rule import in_range

Array = jax.Array


def irr(
    tau: TaskVector,
    safety: TaskVector,
    importance: Mapping[str, Any],
    grams: Mapping[str, Any],
    *,
    keep: float = 0.0,
    damping: float = 0.01,
) -> TaskVector:
    """``tau`` without its unsafe entries, its other entries recalibrated so that the outputs on the task's data stay.

    Identify: entries whose sign is not that of the safety vector, but for the ``int(keep * count)`` of the least
    ``importance`` among them in each tensor. Remove: they become 0, which is the aligned model. Recalibrate: input by input,
    a removed entry q of an output moves the inputs after it by ``-w_q / (H^-1)_qq * (H^-1)_q``, where H is the Gram matrix
    of the inputs not yet passed; inputs that are always 0 lose their change.

    tau: the change of the aligned model. safety: its safety vector (safe less harmful model). importance: path -> the diagonal
    Fisher information of safety data, shaped as the weight; paths without one stay as they are. grams: path -> ``x^T x`` of the
    task's inputs, ``[..., I, I]`` for a weight ``[..., I, O]``; paths without one are not recalibrated. damping: what is added
    to the diagonal of H, as a fraction of its mean. Wu et al. 2024, arXiv:2412.11041; the released code (pikepokenew/IRR)
    identifies in blocks of 128 inputs, here it is in whole tensors.

    Raises ``ValueError`` for shapes that do not fit.
    """
    in_range("keep", keep, 0, 1)
    in_range("damping", damping, 0, float("inf"))

    def realigned(path: str, change: delta.Encoding) -> delta.Encoding:
        if path not in importance:
            return change
        dense, score = change.dense(), jnp.asarray(importance[path])
        direction = safety[path].dense() if path in safety else jnp.zeros_like(dense)
        for name, x in (("importance", score), ("the safety vector", direction)):
            if x.shape != dense.shape:
                raise ValueError(f"{path!r} has shape {dense.shape} in the task vector, but {x.shape} in {name}")
        if path not in grams:
            return delta.Dense(_realigned(stack_axes(path, dense.ndim), keep, damping, dense, direction, score))
        gram = jnp.asarray(grams[path], jnp.float32)
        if gram.shape != (*dense.shape[:-1], dense.shape[-2]):
            raise ValueError(f"the Gram matrix of {path!r} must be [..., I, I] for {dense.shape}, not {gram.shape}")
        return delta.Dense(_realigned(dense.ndim - 2, keep, damping, dense, direction, score, gram))

    return tau.map(realigned, "irr", keep=float(keep), damping=float(damping))


def unsafe(change: Array, direction: Array, importance: Array, keep: Any) -> Array:
    """Bool, the entries of one tensor against ``direction`` that are important for it; of equal ones, the later first."""
    against = (jnp.sign(change) != jnp.sign(direction)).ravel()
    # Entries that agree stand before all others.
    order = jnp.argsort(jnp.where(against, importance.ravel(), -jnp.inf), stable=True)
    rank = jnp.zeros(order.size, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    count = jnp.sum(against)
    least = order.size - count + jnp.floor(keep * count).astype(jnp.int32)
    return (against & (rank >= least)).reshape(change.shape)


def recalibrated(change: Array, removed: Array, gram: Array, damping: Any) -> Array:
    """``change [I, O]`` with 0 where ``removed``, the inputs after each of these moved so that ``x @ change`` stays near."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    change = jnp.where(dead[:, None], 0, change)
    diagonal = jnp.where(dead, 1, diagonal)
    hessian = jnp.fill_diagonal(gram, diagonal + damping * jnp.mean(diagonal), inplace=False)
    # H^-1 = R^T R: row i of R, by its diagonal, is that of the inverse without the inputs before i.
    r = jnp.linalg.cholesky(jnp.linalg.inv(hessian)).T

    def eliminate(i: Any, w: Array) -> Array:
        error = jnp.where(removed[i], w[i], 0) / r[i, i]
        return w - r[i][:, None] * error

    return jnp.where(removed, 0, jax.lax.fori_loop(0, len(change), eliminate, change))


@functools.partial(jax.jit, static_argnums=0)
def _realigned(axes: int, keep: Any, damping: Any, *arrays: Array) -> Array:
    """The tensors under ``axes`` leading axes: change, direction, importance, and the Gram matrix if there is one."""

    def one(change: Array, direction: Array, importance: Array, *gram: Array) -> Array:
        removed = unsafe(change, direction, importance, keep)
        return recalibrated(change, removed, gram[0], damping) if gram else jnp.where(removed, 0, change)

    for _ in range(axes):
        one = jax.vmap(one)
    return one(*arrays)
