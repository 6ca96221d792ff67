"""`LowRank`: a low-rank change of a weight trains, by itself or beside another way to train the same weight."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta
from jft.methods.parametrise import Additive, Composed, InPlace, Parametrisation
from jft.select.granularity import Granularity

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LowRank(Additive):
    """``w + (alpha / rank) * a @ b``, or ``alpha / sqrt(rank)`` with ``rank_stabilised``.

    For ``w[..., I, O]``: a ``[..., I, rank]`` uniform in ``+-1/sqrt(I)`` (the Kaiming-uniform draw with slope sqrt(5) of
    the reference implementation), b ``[..., rank, O]`` zero; leading axes (layers, experts) each have their own. Both
    learn at ``rate`` times the learning rate, and ``b`` at ``b_rate`` times that (LoRA+). Hu et al. 2021,
    arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; Hayou et al. 2024, arXiv:2402.12354.
    """

    rank: int
    alpha: float
    rank_stabilised: bool = False
    b_rate: float = 1.0
    rate: float = 1.0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def fitted(self, *, granularity: Granularity | None = None, **told: Any) -> Parametrisation:
        """With a selection, the selected parts train in place, and the low-rank change beside them."""
        if granularity is None:
            return super().fitted(**told)
        return WithLowRank(InPlace(), self).fitted(granularity=granularity, **told)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        rates = {"a": self.rate, "b": self.rate * self.b_rate}
        trained = {name: dataclasses.replace(leaf, rate=rates[name]) for name, leaf in delta.LowRank.leaves.items()}
        return delta.Leaf(), trained

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        *lead, rows, columns = w.shape
        bound = 1 / math.sqrt(rows)
        a = jax.random.uniform(key, (*lead, rows, self.rank), jnp.float32, -bound, bound)
        # One factor at zero: the run starts exactly at the base, and the gradient of b is not zero.
        return w, {"a": a, "b": jnp.zeros((*lead, self.rank, columns), jnp.float32)}

    def change(self, kept: Any, trained: Any) -> delta.Change:
        # The scale goes into b, so that the change is a plain product and a saved vector needs no scale.
        return delta.LowRank(trained["a"], self.scale * trained["b"])


@dataclasses.dataclass(frozen=True)
class LowRankFixed(LowRank):
    """:class:`LowRank` whose factor ``a`` stays as it was drawn, so that the weight is linear in ``b``, which trains.

    Also what is left of the derivative in both factors where ``b`` is zero. Kept ``{"w", "a"}``, trained ``{"b"}``.
    """

    def fitted(self, **told: Any) -> Parametrisation:
        # Not LowRank's: with a selection that would build a WithLowRank, which keeps only the weight and would lose ``a``.
        return Parametrisation.fitted(self, **told)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        kept, both = super().leaves()
        return {"w": kept, "a": both["a"]}, {"b": both["b"]}

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        kept, both = super().init(key, w)
        return {"w": kept, "a": both["a"]}, {"b": both["b"]}

    def weight(self, kept: Any) -> Array:
        return kept["w"]

    def change(self, kept: Any, trained: Any) -> delta.Change:
        return super().change(kept["w"], {"a": kept["a"], **trained})


@dataclasses.dataclass(frozen=True)
class WithLowRank(Composed):
    """``first(w) + scale * a @ b``: gates, masks or selected parts of a weight, and a low-rank change that they do not touch.

    Kept: that of ``first``. Trained: ``first``'s under ``own``, and ``low_rank`` with a and b of :class:`LowRank`. Another
    selection during a run changes what trains in ``first``; the factors stay as they are.
    """

    first: Parametrisation
    low_rank: LowRank

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        kept, first = self.first.leaves(at)
        # The kept weight of LowRank is left out: the one of ``first`` serves both.
        return kept, {"own": first, "low_rank": self.low_rank.leaves()[1]}

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        # Two keys, or the draw of ``a`` would be correlated with that of scores or gates.
        one, two = jax.random.split(key)
        kept, first = self.first.init(one, w, at, base)
        return kept, {"own": first, "low_rank": self.low_rank.init(two, w)[1]}

    def _added(self, w: Any, trained: Any, held: bool) -> delta.Changed:
        return delta.Changed(w, self.low_rank.change(None, trained["low_rank"]), held)

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        w = self.first.bind(kept, trained["own"], structured, key)
        if "low_rank" not in trained:  # the weight that another selection starts from
            return w
        changed = self._added(w, trained, held=False)
        return changed if structured else changed.plain()

    def tangent(self, kept: Any, trained: Any, key: Array | None = None) -> delta.Changed:
        return self._added(self.first.tangent(kept, trained["own"], key), trained, held=True)

    def encode(self, base: Array | None, kept: Any, trained: Any) -> delta.Encoding:
        if base is None:
            raise ValueError(
                "WithLowRank cannot change what it selects during a run and keep the values of what it leaves: use a schedule "
                "that resets them, or train the selected parts without the low-rank change"
            )
        first = self.first.encode(base, kept, trained["own"])
        return first + self.low_rank.encode(base, kept, trained["low_rank"])

    def penalty(self, kept: Any, trained: Any) -> Array | None:
        return self.first.penalty(kept, trained["own"])

    def spread(self, kept: Any, values: Any, fill: Array) -> Array:
        return self.first.spread(kept, values["own"], fill)

    def collect(self, kept: Any, dense: Array) -> Any:
        # No low-rank part: the caller keeps the factors that it has.
        return {"own": self.first.collect(kept, dense)}
