"""n of every m entries train: semi-structured selections such as 2:4, by any score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jft.delta.changed import COLUMNS, ROWS
from jft.delta.n_m import NMLayout, grouped_shape
from jft.methods import InPlace, Method, Select, register
from jft.select import scores, top_each
from jft.select.granularity import Entry

Array = jax.Array
Axis = Literal["rows", "columns"]
AXES = {"rows": ROWS, "columns": COLUMNS}


@dataclasses.dataclass(frozen=True)
class Groups(Entry):
    """Entries, of which every group of m along an axis has n: each group competes by itself, whatever the budget's scope."""

    n: int = 2
    m: int = 4
    axis: Axis = "rows"
    axes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse what is no part of a group."""
        # 127: a position inside a group is stored as int8.
        if not 1 <= self.n <= self.m <= 127 or self.axis not in AXES:
            raise ValueError(f"{self.n} of {self.m} along {self.axis!r}: n from 1 to m, m at most 127, rows or columns")

    @property
    def layout(self) -> NMLayout:
        return NMLayout(self.n, self.m, AXES[self.axis])

    def _cut(self, shape: tuple[int, ...], lead: int) -> tuple[int | None, ...]:
        if shape[AXES[self.axis]] % self.m:
            raise ValueError(
                f"{self.axis} of a weight of shape {shape} are no groups of {self.m}; choose another m or axis, or narrow "
                "select.include"
            )
        return shape

    def locate(self, mask: Array, lead: int, grid: tuple[int, ...] = (1, 1), capacity: int | None = None) -> Array:
        groups = mask.reshape(grouped_shape(mask.shape, self.m, AXES[self.axis]))
        slot = -2 if self.axis == "rows" else -1
        # A stable sort puts the selected ones first, in order.
        order = jnp.argsort(~groups, axis=slot, stable=True)
        # Every group has exactly n, so ``grid`` and ``capacity`` have no say: nothing is padded.
        return jax.lax.slice_in_dim(order, 0, self.n, axis=order.ndim + slot).astype(jnp.int8)

    def mask_of(self, at: Array, shape: Any, lead: int) -> Array:
        shape = tuple(getattr(shape, "shape", shape))
        return self.layout.put(jnp.zeros(shape, bool), at, jnp.ones(at.shape, bool))

    def _extent(self, at: Array, shape: tuple[int, ...]) -> int:
        return self.m


@dataclasses.dataclass(frozen=True)
class OfEachGroup:
    """The budget of :class:`Groups`: the n best of every m, ties to the earlier."""

    n: int
    m: int
    axis: Axis

    @property
    def density(self) -> float:
        return self.n / self.m

    def units(self, available: int, cost: int, what: str) -> int:
        """How many of ``available`` entries are selected."""
        return available // self.m * self.n

    def masks(self, found: Mapping[str, Array], largest: bool, leads: Mapping[str, int]) -> dict[str, Array]:
        """``{path: mask}`` of scores by path."""
        return {path: self._mask(score if largest else -score) for path, score in found.items()}

    def _mask(self, score: Array) -> Array:
        groups = score.reshape(grouped_shape(score.shape, self.m, AXES[self.axis]))
        # top_each competes over the trailing axes; the m entries of a group have to be the last.
        last = jnp.swapaxes(groups, -1, -2) if self.axis == "rows" else groups
        mask = top_each(last, self.n, last.ndim - 1)
        return (jnp.swapaxes(mask, -1, -2) if self.axis == "rows" else mask).reshape(score.shape)


@register("n_m", paper="-")
def n_m(
    n: int = 2,
    m: int = 4,
    axis: Axis = "rows",
    score: Any = None,
    largest: bool = True,
) -> Method:
    """Train n of every m consecutive entries along one axis of every matrix inside the layers, the best by a score.

    The pattern is that of semi-structured sparsity (2:4 in Mishra et al. 2021, arXiv:2104.08378), here of what *changes*: a
    task vector of 2:4 holds half of the entries, a byte of index for each, and nothing is padded. axis: whether groups run
    along the inputs (rows) or outputs (columns) of ``w[I, O]``. score: any of :mod:`jft.select.scores`; by default the size of
    the mean gradient. Gradients, masters and optimizer state exist for the selected entries alone.
    """
    select = Select(
        linear_only=True,
        score=scores.Gradient() if score is None else score,
        granularity=Groups(n, m, axis),
        budget=OfEachGroup(n, m, axis),
        largest=largest,
    )
    return Method(select, InPlace())
