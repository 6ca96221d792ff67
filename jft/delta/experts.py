"""`ExpertLayout`: whole matrices that train, of the E that a mixture of experts stacks; the others are frozen.

``at[..., e]`` names the experts of ``w[..., E, I, O]`` that train, in ascending order, distinct, int32. Where layers have
different numbers of them, ``e`` is the largest and the rest is padding: ids of E and more, which read as zero and are never
written. Padding costs what an expert costs. Task vectors store all rows of these experts (:class:`jft.delta.Slices`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta.changed import COLUMNS, ROWS, Matrices
from jft.delta.selected import Layout, below, flat_index, over_leading
from jft.delta.slices import Slices
from jft.dot import expert_dot, grouped_dot

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ExpertLayout(Layout):
    """Experts in programs: ``at[*lead, e]`` of a weight ``[*lead, E, I, O]``, values ``[*lead, e, I, O]``.

    The gradient of the values is one product of e matrices, not E.
    """

    matrices = Matrices()
    slot = -3

    def axes(self, at: Any) -> tuple[tuple, tuple]:
        return (..., None), (..., None, ROWS, COLUMNS)

    def lead(self, at: Any) -> int:
        return len(at.shape) - 1

    def gather(self, w: Array, at: Array) -> Array:
        one = lambda w, at: jnp.take(w, at, axis=0, mode="fill", fill_value=0)
        return over_leading(one, at.ndim - 1)(w, at)

    def put(self, w: Array, at: Array, values: Array) -> Array:
        one = lambda w, at, values: w.at[at].set(values.astype(w.dtype), mode="drop", unique_indices=True)
        return over_leading(one, at.ndim - 1)(w, at, values)

    def expert_product(self, x: Array, at: Array, values: Array, shape: tuple[int, ...]) -> Array:
        """``[E, N, O]``, zero for experts that ``at`` does not name."""
        # Inputs of experts begin with the axis E, as weights do.
        y = expert_dot(x if x.ndim == 2 else self.gather(x, at), values)
        # `drop`: results of padding are not written.
        return jnp.zeros((shape[0], *y.shape[1:]), y.dtype).at[at].add(y, mode="drop", unique_indices=True)

    def grouped_product(self, x: Array, at: Array, values: Array, sizes: Array) -> Array:
        """Rows of the experts that ``at`` names are brought to the front.

        So the cost is theirs where ``jax.lax.ragged_dot`` skips rows outside its groups, as on TPUs and GPUs; on CPUs it
        is e / E of the product with all experts.
        """
        order, group_sizes = _sort_by_expert(at, sizes, len(x))
        y = grouped_dot(jnp.take(x, order, axis=0), values, group_sizes)
        # `ragged_dot` does not say what rows past its groups hold.
        inside = jnp.arange(len(x)) < jnp.sum(group_sizes)
        return jnp.zeros_like(y).at[order].set(jnp.where(inside[:, None], y, 0), unique_indices=True)

    def count(self, at: Array, shape: tuple[int, ...]) -> Array:
        return below(at, shape[-3]) * (shape[-2] * shape[-1])

    def encode(self, at: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Slices:
        *lead, count, rows, columns = shape
        valid = at < count
        experts = flat_index((*lead, count), [*np.nonzero(valid)[:-1], at[valid]], valid.sum())
        index = (experts[:, None] * rows + np.arange(rows)).reshape(-1)
        return Slices(jnp.asarray(index, jnp.int32), jnp.asarray(values[valid].reshape(-1, columns)), shape, ROWS)

    def pad(self, at: Array, most: int, shape: tuple[int, ...]) -> Array:
        slots = at.shape[-1]
        # Distinct ids past the end: `put` and `expert_product` promise unique indices.
        padding = jnp.broadcast_to(shape[0] + jnp.arange(slots, most, dtype=at.dtype), (*at.shape[:-1], most - slots))
        return jnp.concatenate([at, padding], axis=-1)


def locate(mask: Any) -> Array:
    """``at[..., e]`` from a mask ``[..., E]`` of the experts that train; e is the largest number of them in a layer.

    Raises ValueError for a mask without any.
    """
    mask = np.asarray(mask, bool)
    width = int(mask.sum(-1).max(initial=0))
    if width == 0:
        raise ValueError("no expert of any layer is chosen; nothing would train")
    # A stable sort puts the chosen ones first, in order; of the others as many as needed become padding.
    order = np.argsort(~mask, axis=-1, kind="stable")[..., :width]
    position = np.arange(width)
    return jnp.asarray(np.where(position < mask.sum(-1, keepdims=True), order, mask.shape[-1] + position), jnp.int32)


def _sort_by_expert(at: Array, sizes: Array, rows: int) -> tuple[Array, Array]:
    """The order of rows that puts those of ``at``'s experts first, in the order of ``at``, and the sizes of their groups."""
    experts = sizes.shape[0]
    # Other experts get a position past all of these, so that sorting puts their rows last.
    position = jnp.full((experts,), len(at), jnp.int32).at[at].set(jnp.arange(len(at), dtype=jnp.int32), mode="drop")
    # The total is known from x, and `jit` needs it to be static.
    expert = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=rows)
    # Stable, so that rows of one expert keep their order. Padding reads a group of no rows.
    return jnp.argsort(position[expert], stable=True), jnp.take(sizes, at, mode="fill", fill_value=0)
