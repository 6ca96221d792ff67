"""Training in some of the stacked layers only: in place, or by any other parametrisation."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jft import delta
from jft.methods.around import Composed
from jft.methods.parametrise import Parametrisation, Shift, master
from jft.models.core import Runs
from jft.tangent.lean import Lean

Array = jax.Array


def _pieces(w: Any, sizes: tuple[int, ...]) -> list[Any]:
    """``w`` cut along its first axis into runs of these lengths."""
    return [w[a:b] for a, b in itertools.pairwise(np.cumsum((0, *sizes)))]


@dataclasses.dataclass(frozen=True)
class InPlaceLayers(Parametrisation):
    """In place, but only in some of the stacked layers: the leaf ``w[L, ...]`` is cut into :class:`Runs`.

    sizes: lengths of consecutive runs that sum to L. trains: which of them train. The trained leaf is a tuple of their
    arrays, and scans of frozen runs below the first trained one have no backward pass at all.
    """

    sizes: tuple[int, ...]
    trains: tuple[bool, ...]
    anchor: bool = False

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        pieces = list(zip(_pieces(w, self.sizes), self.trains, strict=True))
        kept = tuple(p for p, t in pieces if not t)
        trained = tuple(master(p) for p, t in pieces if t)
        return (kept, tuple(p for p, t in pieces if t)) if self.anchor else kept, trained

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        kept, trained = iter(kept[0] if self.anchor else kept), iter(trained)
        parts = tuple(next(trained) if t else next(kept) for t in self.trains)
        return Runs(parts, self.sizes) if structured else jnp.concatenate(parts)

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        changed = [p for p, t in zip(_pieces(base, self.sizes), self.trains, strict=True) if t]
        values = [n.astype(jnp.float32) - o.astype(jnp.float32) for n, o in zip(trained, changed, strict=True)]
        if not values:
            return delta.Rows(jnp.zeros((0,), jnp.int32), jnp.zeros((0, *base.shape[1:]), jnp.float32), base.shape)
        return delta.Rows(self._index(), jnp.concatenate(values), base.shape)

    def _index(self) -> Array:
        """The layers that train."""
        return jnp.asarray(np.flatnonzero(np.repeat(self.trains, self.sizes)), jnp.int32)

    def spread(self, kept: Any, values: Any, fill: Array) -> Array:
        values = iter(values)
        return jnp.concatenate(
            [next(values) if t else p for p, t in zip(_pieces(fill, self.sizes), self.trains, strict=True)]
        )

    def collect(self, kept: Any, dense: Array) -> Any:
        return tuple(p for p, t in zip(_pieces(dense, self.sizes), self.trains, strict=True) if t)

    def rebased(self, kept: Any, base: Array) -> Any:
        return (kept[0], self.collect(kept, base)) if self.anchor else kept

    def values(self, kept: Any, w: Array) -> delta.Encoding:
        index = self._index()
        return delta.Rows(index, w[index], tuple(w.shape))

    def resting(self, values: delta.Encoding) -> delta.Encoding:
        if not isinstance(values, delta.Rows):
            return values
        still = np.flatnonzero(~np.isin(values.indices, self._index()))
        return delta.Rows(values.indices[still], values.values[still], values.shape)

    def change(self, kept: Any, trained: Any) -> Any:
        return jax.tree.map(lambda now, then: now - then.astype(now.dtype), trained, kept[1])

    def anchored(self) -> InPlaceLayers:
        return dataclasses.replace(self, anchor=True)

    def linearized(self) -> Parametrisation:
        return SomeLayers(Shift(), self.sizes, self.trains)

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        kept, trained = tuple(spec for t in self.trains if not t), tuple(spec for t in self.trains if t)
        return (kept, trained) if self.anchor else kept, trained


@dataclasses.dataclass(frozen=True)
class SomeLayers(Composed):
    """``first``, in some layers of the leaf ``w[L, ...]``, which is cut into :class:`jft.models.core.Runs`.

    sizes: lengths of consecutive runs that sum to L. trains: which of them train. Kept and trained are tuples over runs
    (trained: over those that train). Scores, gates and factors exist for these layers alone. For in-place training use
    :class:`InPlaceLayers`.
    """

    first: Parametrisation
    sizes: tuple[int, ...]
    trains: tuple[bool, ...]

    def _active(self, kept: Any) -> list[Any]:
        return [k for k, t in zip(kept, self.trains, strict=True) if t]

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        kept, trained = [], []
        for i, (piece, trains) in enumerate(zip(_pieces(w, self.sizes), self.trains, strict=True)):
            own = self.first.init(jax.random.fold_in(key, i), piece) if trains else (piece, None)
            kept.append(own[0])
            trained += [own[1]] if trains else []
        return tuple(kept), tuple(trained)

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        values, parts = iter(trained), []
        for i, (k, trains) in enumerate(zip(kept, self.trains, strict=True)):
            own = None if key is None else jax.random.fold_in(key, i)
            parts.append(self.first.bind(k, next(values), structured, own) if trains else k)
        return Runs(tuple(parts), self.sizes) if structured else jnp.concatenate(parts)

    def merged(self, kept: Any, trained: Any) -> Array:
        values = iter(trained)
        both = zip(kept, self.trains, strict=True)
        return jnp.concatenate([self.first.merged(k, next(values)) if trains else k for k, trains in both])

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        pieces = _pieces(base, self.sizes)
        own = zip(self._active(pieces), self._active(kept), trained, strict=True)
        return self._stacked(pieces, [self.first.encode(*parts) for parts in own], tuple(base.shape))

    def _stacked(self, pieces: list[Array], parts: list[delta.Encoding], shape: tuple[int, ...]) -> delta.Encoding:
        """Changes of some runs as that of the whole leaf, in their own encoding where that holds one layer after another."""
        masks = iter([p.mask for p in parts if isinstance(p, delta.BitMask)])
        if parts and all(isinstance(p, delta.BitMask) for p in parts):
            whole = [next(masks) if t else jnp.ones(p.shape, bool) for p, t in zip(pieces, self.trains, strict=True)]
            return delta.BitMask.of(jnp.concatenate(whole))
        index = [i for i, t in enumerate(np.repeat(self.trains, self.sizes)) if t]
        alone = [p.resolve(w) for p, w in zip(parts, self._active(pieces), strict=True)]
        values = [x.dense() for x in alone] or [jnp.zeros((0, *shape[1:]), jnp.float32)]
        return delta.Rows(jnp.asarray(index, jnp.int32), jnp.concatenate(values), shape)

    def commit(self, kept: Any, trained: Any) -> Any:
        values = iter(trained)
        return tuple(self.first.commit(k, next(values)) if t else k for k, t in zip(kept, self.trains, strict=True))

    def change(self, kept: Any, trained: Any) -> Any:
        return tuple(self.first.change(k, t) for k, t in zip(self._active(kept), trained, strict=True))

    def penalty(self, kept: Any, trained: Any) -> Array | None:
        own = [self.first.penalty(k, t) for k, t in zip(self._active(kept), trained, strict=True)]
        return sum((x for x in own if x is not None), jnp.float32(0)) if any(x is not None for x in own) else None

    def lean(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Lean:
        values, leans = iter(trained), []
        for i, (k, trains) in enumerate(zip(kept, self.trains, strict=True)):
            own = None if key is None else jax.random.fold_in(key, i)
            leans.append(self.first.lean(k, next(values), structured, own) if trains else None)

        def bind(values: Any) -> Any:
            given = iter(values)
            parts = tuple(k if lean is None else lean.bind(next(given)) for k, lean in zip(kept, leans, strict=True))
            return Runs(parts, self.sizes) if structured else jnp.concatenate(parts)

        moving = [lean for lean in leans if lean is not None]
        return Lean(bind, tuple(lean.point for lean in moving), tuple(lean.direction for lean in moving))

    def decays(self, trained: Any) -> Any:
        return tuple(self.first.decays(t) for t in trained)

    def matrices(self, trained: Any) -> Any:
        return tuple(self.first.matrices(t) for t in trained)

    def scales(self, trained: Any) -> Any:
        return tuple(self.first.scales(t) for t in trained)

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        kept, trained = [], []
        for size, trains in zip(self.sizes, self.trains, strict=True):
            piece = jax.ShapeDtypeStruct((size, *w.shape[1:]), w.dtype)
            own = self.first.specs(spec, piece) if trains else (spec, None)
            kept.append(own[0])
            trained += [own[1]] if trains else []
        return tuple(kept), tuple(trained)
