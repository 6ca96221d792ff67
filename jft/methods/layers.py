"""`SomeLayers`: training in some of the stacked layers only, in place or by any other parametrisation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta
from jft.methods.parametrise import Composed, Parametrisation
from jft.models.core import Runs

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SomeLayers(Composed):
    """``first``, in some layers of the leaf ``w[L, ...]``, which is cut into :class:`jft.models.core.Runs`.

    sizes: lengths of consecutive runs that sum to L. trains: which of them train. Kept is a tuple over runs (a frozen one
    itself, or what ``first`` keeps), trained a tuple over those that train: values, scores, gates and factors exist for
    these layers alone, and scans of frozen runs below the first trained one have no backward pass at all.
    """

    first: Parametrisation
    sizes: tuple[int, ...]
    trains: tuple[bool, ...]

    def _pieces(self, w: Any) -> list[Any]:
        """``w`` cut along its first axis into the runs."""
        return [w[a:b] for a, b in itertools.pairwise(np.cumsum((0, *self.sizes)).tolist())]

    def _active(self, pieces: Any) -> list[Any]:
        return [piece for piece, trains in zip(pieces, self.trains, strict=True) if trains]

    def _runs(self, kept: Any, trained: Any) -> Iterator[tuple[int, Any, Any]]:
        """``(run, kept, trained)``, in order; trained is None for a frozen one."""
        values = iter(trained)
        for i, (k, trains) in enumerate(zip(kept, self.trains, strict=True)):
            yield i, k, next(values) if trains else None

    def layers(self) -> np.ndarray:
        """Indices of the layers that train."""
        return np.flatnonzero(np.repeat(self.trains, self.sizes))

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        first_kept, values = self.first.leaves()
        kept = tuple(first_kept if trains else delta.Leaf() for trains in self.trains)
        active = [i for i, trains in enumerate(self.trains) if trains]
        # Origins and counts are functions of what ``first`` keeps, which is one item of the tuple over runs.
        trained = (jax.tree.map(lambda leaf, i=i: leaf.inside(lambda kept: kept[i]), values) for i in active)
        return kept, tuple(trained)

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        bases = [None] * len(self.sizes) if base is None else self._pieces(base)
        kept, trained = [], []
        for i, (piece, origin) in enumerate(zip(self._pieces(w), bases, strict=True)):
            # The index of the run in the key: runs of equal shape must not draw the same values.
            if self.trains[i]:
                piece, values = self.first.init(jax.random.fold_in(key, i), piece, base=origin)
                trained.append(values)
            kept.append(piece)
        return tuple(kept), tuple(trained)

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        parts = []
        for i, k, values in self._runs(kept, trained):
            run_key = None if key is None else jax.random.fold_in(key, i)
            parts.append(self.first.bind(k, values, structured, run_key) if self.trains[i] else k)
        return Runs(tuple(parts), self.sizes) if structured else jnp.concatenate(parts)

    def tangent(self, kept: Any, trained: Any, key: Array | None = None) -> Runs:
        parts = []
        for i, k, values in self._runs(kept, trained):
            run_key = None if key is None else jax.random.fold_in(key, i)
            parts.append(self.first.tangent(k, values, run_key) if self.trains[i] else k)
        return Runs(tuple(parts), self.sizes)

    def encode(self, base: Array | None, kept: Any, trained: Any) -> delta.Encoding:
        """Changes of some layers as that of the whole leaf: one mask where they are masks, else layers."""
        bases = [None] * len(self.sizes) if base is None else self._pieces(base)
        active = zip(self._active(bases), self._active(kept), trained, strict=True)
        parts = [self.first.encode(*part) for part in active]
        masks = iter([part.mask for part in parts if isinstance(part, delta.BitMask)])
        if parts and all(isinstance(part, delta.BitMask) for part in parts):
            # A bit mask covers the whole leaf, and frozen layers keep all of their weights.
            shapes = [k.shape if not trains else None for k, trains in zip(kept, self.trains, strict=True)]
            return delta.BitMask.of(jnp.concatenate([next(masks) if s is None else jnp.ones(s, bool) for s in shapes]))
        # Forms that refer to the base (masks, gates) become differences, since one encoding holds all layers.
        if base is not None:
            parts = [part.resolve(piece) for part, piece in zip(parts, self._active(bases), strict=True)]
        values = [part.value if isinstance(part, delta.Dense) else part.dense() for part in parts]
        # Without a trained run the change has zero layers, and the shape is that of a frozen piece.
        shape = tuple(values[0].shape[1:] if values else kept[0].shape[1:])
        stored = jnp.concatenate(values or [jnp.zeros((0, *shape), jnp.float32)])
        return delta.Rows(jnp.asarray(self.layers(), jnp.int32), stored, (sum(self.sizes), *shape))

    def penalty(self, kept: Any, trained: Any) -> Array | None:
        terms = [self.first.penalty(k, t) for k, t in zip(self._active(kept), trained, strict=True)]
        # None where no run has a penalty: the plan then adds no term to the loss.
        return sum((x for x in terms if x is not None), jnp.float32(0)) if any(x is not None for x in terms) else None

    def spread(self, kept: Any, values: Any, fill: Array) -> Array:
        pieces = self._pieces(fill)
        for i, k, run_values in self._runs(kept, values):
            pieces[i] = self.first.spread(k, run_values, pieces[i]) if self.trains[i] else pieces[i]
        return jnp.concatenate(pieces)

    def collect(self, kept: Any, dense: Array) -> Any:
        # An update rule lays dense values out like what trains, and has nothing kept at hand.
        kept = (None,) * len(self.sizes) if kept is None else kept
        active = zip(self._active(kept), self._active(self._pieces(dense)), strict=True)
        return tuple(self.first.collect(k, piece) for k, piece in active)
