"""A low-rank change beside another way to train the same weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jft import delta
from jft.methods.around import Around
from jft.methods.parametrise import LowRank, Parametrisation
from jft.models.low_rank import LowRankWeight
from jft.tangent.lean import Lean

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class WithLowRank(Around):
    """``first(w) + scale * a @ b``: gates, masks or selected parts of a weight, and a low-rank change that they do not touch.

    Kept: that of ``first``. Trained: ``first``'s under ``own``, and ``low_rank`` with a and b of :class:`LowRank`.
    """

    first: Parametrisation
    low_rank: LowRank

    def own(self, trained: Any) -> Any:
        return trained["own"]

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        one, two = jax.random.split(key)
        kept, own = self.first.init(one, w, at)
        return kept, {"own": own, "low_rank": self.low_rank.init(two, w)[1]}

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        return self._added(super().bind(kept, trained, structured, key), **trained["low_rank"], structured=structured)

    def _added(self, w: Any, a: Array, b: Array, structured: bool) -> Any:
        if structured:
            return LowRankWeight(w, a, b, self.low_rank.scale)
        return (w.astype(jnp.float32) + self.low_rank.scale * a @ b).astype(w.dtype)

    def merged(self, kept: Any, trained: Any) -> Array:
        return self._added(super().merged(kept, trained), **trained["low_rank"], structured=False)

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        return super().encode(base, kept, trained) + self.low_rank.encode(base, kept, trained["low_rank"])

    def count(self, kept: Any, trained: Any) -> Any:
        return super().count(kept, trained) + self.low_rank.count(kept, trained["low_rank"])

    def change(self, kept: Any, trained: Any) -> Any:
        own = super().change(kept, trained)
        return {"own": own, "low_rank": self.low_rank.change(kept, trained["low_rank"])}

    # Another selection changes what trains in ``first``; the factors stay as they are.

    def spread(self, kept: Any, values: Any, fill: Array) -> Any:
        return {**values, "own": super().spread(kept, values, fill)}

    def collect(self, kept: Any, dense: Any) -> Any:
        return {**dense, "own": super().collect(kept, dense)}

    def lean(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Lean:
        first = self.first.lean(kept, trained["own"], structured, key)
        a, b = trained["low_rank"]["a"], trained["low_rank"]["b"]

        def bind(values: Any) -> Any:
            return self._added(first.bind(values["own"]), a, values["b"], structured)

        return Lean(bind, {"own": first.point, "b": jnp.zeros_like(b)}, {"own": first.direction, "b": b})

    def decays(self, trained: Any) -> Any:
        return {"own": super().decays(trained), "low_rank": self.low_rank.decays(trained["low_rank"])}

    def matrices(self, trained: Any) -> Any:
        return {"own": super().matrices(trained), "low_rank": self.low_rank.matrices(trained["low_rank"])}

    def scales(self, trained: Any) -> Any:
        return {"own": super().scales(trained), "low_rank": self.low_rank.scales(trained["low_rank"])}

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        kept, own = super().specs(spec, w, at)
        return kept, {"own": own, "low_rank": self.low_rank.specs(spec, w)[1]}
