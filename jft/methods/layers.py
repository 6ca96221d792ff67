"""Any parametrisation, in some of the stacked layers only."""

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
from jft.methods.parametrise import Parametrisation
from jft.models.core import Runs
from jft.tangent.lean import Lean

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SomeLayers(Composed):
    """``first``, in some layers of the leaf ``w[L, ...]``, which is cut into :class:`jft.models.core.Runs`.

    sizes: lengths of consecutive runs that sum to L. trains: which of them train. Kept and trained are tuples over runs
    (trained: over those that train). Scores, gates and factors exist for these layers alone. For in-place training use
    :class:`jft.methods.parametrise.InPlaceLayers`.
    """

    first: Parametrisation
    sizes: tuple[int, ...]
    trains: tuple[bool, ...]

    def _pieces(self, w: Any) -> list[Any]:
        starts = np.cumsum((0, *self.sizes))
        return [w[a:b] for a, b in itertools.pairwise(starts)]

    def _active(self, kept: Any) -> list[Any]:
        return [k for k, t in zip(kept, self.trains, strict=True) if t]

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        kept, trained = [], []
        for i, (piece, trains) in enumerate(zip(self._pieces(w), self.trains, strict=True)):
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
        pieces = self._pieces(base)
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
