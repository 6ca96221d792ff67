"""A low-rank change beside another way to train the same weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jft import delta
from jft.methods.parametrise import LowRank, Parametrisation
from jft.models.low_rank import LowRankWeight
from jft.tangent.lean import Lean

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class WithLowRank(Parametrisation):
    """``first(w) + scale * a @ b``: gates, masks or selected parts of a weight, and a low-rank change that they do not touch.

    Kept: that of ``first``. Trained: ``first``'s under ``own``, and ``low_rank`` with a and b of :class:`LowRank`.
    """

    first: Parametrisation
    low_rank: LowRank

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.first.random

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether :meth:`bind` needs float32 masters."""
        return self.first.exact

    @property
    def live(self) -> Any:  # type: ignore[override]
        return self.first.live

    @property
    def selects(self) -> bool:  # type: ignore[override]
        return self.first.selects

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        one, two = jax.random.split(key)
        kept, own = self.first.init(one, w, at)
        return kept, {"own": own, "low_rank": self.low_rank.init(two, w)[1]}

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        w = self.first.bind(kept, trained["own"], structured, key)
        a, b = trained["low_rank"]["a"], trained["low_rank"]["b"]
        if structured:
            return LowRankWeight(w, a, b, self.low_rank.scale)
        return self._added(w, a, b)

    def _added(self, w: Array, a: Array, b: Array) -> Array:
        return (w.astype(jnp.float32) + self.low_rank.scale * a @ b).astype(w.dtype)

    def merged(self, kept: Any, trained: Any) -> Array:
        w = self.first.merged(kept, trained["own"])
        return self._added(w, trained["low_rank"]["a"], trained["low_rank"]["b"])

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        own = self.first.encode(base, kept, trained["own"])
        return own + self.low_rank.encode(base, kept, trained["low_rank"])

    def commit(self, kept: Any, trained: Any) -> Any:
        return self.first.commit(kept, trained["own"])

    def count(self, kept: Any, trained: Any) -> Any:
        return self.first.count(kept, trained["own"]) + self.low_rank.count(kept, trained["low_rank"])

    def change(self, kept: Any, trained: Any) -> Any:
        own = self.first.change(kept, trained["own"])
        return {"own": own, "low_rank": self.low_rank.change(kept, trained["low_rank"])}

    # Another selection changes what trains in ``first``; the factors stay as they are.

    def ground(self, kept: Any, trained: Any) -> Array:
        return self.first.ground(kept, trained["own"])

    def spread(self, kept: Any, values: Any, fill: Array) -> Any:
        return {**values, "own": self.first.spread(kept, values["own"], fill)}

    def collect(self, kept: Any, dense: Any) -> Any:
        return {**dense, "own": self.first.collect(kept, dense["own"])}

    def reset(self, kept: Any, w: Array, base: Array) -> Array:
        return self.first.reset(kept, w, base)

    def rebased(self, kept: Any, base: Array) -> Any:
        return self.first.rebased(kept, base)

    def penalty(self, kept: Any, trained: Any) -> Array | None:
        return self.first.penalty(kept, trained["own"])

    def at(self, layout: Any) -> WithLowRank:
        return dataclasses.replace(self, first=self.first.at(layout))

    def anchored(self) -> WithLowRank:
        return dataclasses.replace(self, first=self.first.anchored())

    def linearized(self) -> WithLowRank:
        return dataclasses.replace(self, first=self.first.linearized())

    def lean(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Lean:
        first = self.first.lean(kept, trained["own"], structured, key)
        a, b = trained["low_rank"]["a"], trained["low_rank"]["b"]

        def bind(values: Any) -> Any:
            w = first.bind(values["own"])
            return (
                LowRankWeight(w, a, values["b"], self.low_rank.scale) if structured else self._added(w, a, values["b"])
            )

        return Lean(bind, {"own": first.point, "b": jnp.zeros_like(b)}, {"own": first.direction, "b": b})

    def placed(self, lead: int) -> WithLowRank:
        return dataclasses.replace(self, first=self.first.placed(lead))

    def decays(self, trained: Any) -> Any:
        return {"own": self.first.decays(trained["own"]), "low_rank": self.low_rank.decays(trained["low_rank"])}

    def scales(self, trained: Any) -> Any:
        own = self.first.scales(trained["own"])
        return {"own": own, "low_rank": self.low_rank.scales(trained["low_rank"])}

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        kept, own = self.first.specs(spec, w, at)
        return kept, {"own": own, "low_rank": self.low_rank.specs(spec, w)[1]}
