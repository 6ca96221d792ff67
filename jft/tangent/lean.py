"""`Lean`: one weight at the base, and the direction in which it is differentiated; and changes that give one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jft import delta
from jft.delta.numeric import visible
from jft.models.sparse import Layout, SelectedWeight, laid, tap
from jft.tangent.thin import ThinWeight

Array = jax.Array


class Lean(NamedTuple):
    """``bind(point)`` is the base weight, an array or structured; its derivative there along ``direction`` is the change."""

    bind: Callable[[Any], Any]
    point: Any
    direction: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """All of a weight moves, by ``value`` of its shape."""

    value: Array

    def lean(self, w: Array, structured: bool) -> Lean:
        return Lean(lambda value: value, w, self.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """What is selected of a weight moves, by ``values``: the product with ``x`` costs what is selected."""

    at: Array
    values: Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    def lean(self, w: Array, structured: bool) -> Lean:
        def bind(values: Array) -> Any:
            if structured:
                return SelectedWeight(w, self.at, values, None, self.layout)
            return tap(self.layout, w, self.at, values)

        return Lean(bind, jnp.zeros(self.values.shape, w.dtype), self.values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Thin:
    """A weight moves by ``a b``, which is never formed where it may be structured."""

    a: Array
    b: Array

    def lean(self, w: Array, structured: bool) -> Lean:
        def bind(b: Array) -> Any:
            return ThinWeight(w, self.a, b) if structured else w + (self.a @ b).astype(w.dtype)

        return Lean(bind, jnp.zeros_like(self.b), self.b)


Change = Whole | Parts | Thin


def change(given: Any, structured: bool) -> Change:
    """Of an encoding (or array), the form whose products are cheapest, for a weight that may be ``structured``.

    Sparse encodings whose indices cannot be looked at (under ``jit``) are taken whole, and so is any that has no product
    of its own. Raises ``ValueError`` for one that is a function of the base: resolve it first.
    """
    if not isinstance(given, delta.Encoding):
        return Whole(jnp.asarray(given))
    if not structured:
        return Whole(given.dense())
    if isinstance(given, delta.LowRank):
        return Thin(given.a, given.b)
    if (
        isinstance(given, delta.Entries | delta.Blocks | delta.Slices)
        and len(given.shape) > 1
        and visible(*jax.tree.leaves(given))
    ):
        layout, at, values = laid(given)
        return Parts(jnp.asarray(at), jnp.asarray(values), layout)
    return Whole(given.dense())
