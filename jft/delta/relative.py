"""`Relative`: deltas that are a function of the weight they change, as masks and gates are."""

from __future__ import annotations

import abc
from typing import Any

import jax

from jft import tree
from jft.delta.encoding import Dense, Encoding, standing_alone
from jft.delta.entries import Entries
from jft.delta.numeric import wide
from jft.tree import visible

Array = jax.Array


class Relative(Encoding):
    """``delta = scale * (gate - 1) * base`` with a gate that each encoding holds in its own way.

    With ``scale`` 1 it makes ``gate * base`` of the base, exactly. Sums with other deltas are :class:`jft.delta.Sum`, and
    every part of one changes the base itself. What needs the base, the dense delta, inner products and
    norms, is refused; :meth:`resolve` makes a delta that needs no base.
    """

    scale: Array

    @property
    def relative(self) -> bool:
        return True

    @abc.abstractmethod
    def gated(self, w: Array) -> Array:
        """``(1 - scale + scale * gate) * w`` for a float32 ``w``."""

    @abc.abstractmethod
    def change(self, w: Array) -> Array:
        """``scale * (gate - 1) * w`` for a float32 ``w``."""

    def scaled(self, c: Any) -> Any:
        return self._with(scale=wide(self.scale) * c)

    def add_to(self, w: Array) -> Array:
        return self.gated(w)

    def astype(self, dtype: Any) -> Any:
        # The scale is one number: rounding it would save nothing.
        return self._with(**{f: tree.cast(getattr(self, f), dtype) for f in self._data if f != "scale"})

    def resolve(self, base: Array) -> Encoding:
        """The delta itself, float32: :class:`Entries` where they take less memory, else (and under ``jit``) dense."""
        self._fits(base)
        delta = self.change(wide(base))
        # An entry is two int32 coordinates and its value.
        sparse = visible(delta) and self.nnz * (2 * 4 + delta.dtype.itemsize) < delta.nbytes
        return Entries.from_dense(delta) if sparse else Dense(delta)

    def dense(self) -> Array:
        # Always refused; the same words as for sums of such.
        standing_alone("the dense value", self)
        raise AssertionError  # it never does
