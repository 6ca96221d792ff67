"""How one weight trains: parametrisations, each a few pure functions of that weight alone.

A parametrisation splits a weight ``w`` into what is *kept* (never differentiated, stored or saved) and what is *trained*
(a small pytree, in float32 masters), and knows how to put them together again and what the resulting delta is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jft import delta, tree
from jft.models.low_rank import LowRankWeight
from jft.select.unit import Unit
from jft.tangent.lean import Lean, Thin, Whole

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Which axes of an array, counted from its end, are inputs and outputs of the matrices that its other axes stack."""

    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)


class Parametrisation:
    """How one weight trains. Subclasses are frozen dataclasses; the defaults here suit what is deterministic and dense.

    random: whether :meth:`bind` draws noise in training. live: whether ``kept["w"]`` always holds the current values, so that
    the loop owns, donates and updates it. selects: whether :meth:`init` needs ``at``, the parts of the weight that train.
    exact: whether :meth:`bind` needs the float32 masters themselves, in whatever dtype the model runs.
    """

    random: ClassVar[bool] = False
    live: Any = False
    selects: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        """``(kept, trained)`` for the base weight ``w``; together they must give ``w`` back exactly."""
        raise NotImplementedError

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        """What the model sees: differentiable in ``trained``. Unless ``structured``, a plain array.

        key: of the noise of a training step; None asks for what holds on average, or in evaluation.
        """
        raise NotImplementedError

    def merged(self, kept: Any, trained: Any) -> Array:
        """The plain weight after training."""
        return self.bind(kept, trained, structured=False)

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        """The change from ``base``, in float32 and in its natural encoding."""
        raise NotImplementedError

    def commit(self, kept: Any, trained: Any) -> Any:
        """``kept`` after an update of ``trained``: live weights take the new values."""
        return kept

    def base(self, kept: Any) -> Array:
        """The base weight, where it is kept."""
        raise ValueError(f"{type(self).__name__} keeps no base to compare with")

    def change(self, kept: Any, trained: Any) -> Any:
        """``trained`` minus what it was at the base, shaped like it: what decay toward the base and penalties act on."""
        return trained

    def count(self, kept: Any, trained: Any) -> Any:
        """How many values train."""
        return tree.count(trained)

    def penalty(self, kept: Any, trained: Any) -> Array | None:
        """What the parametrisation itself adds to the loss, once per batch, weighted; None for nothing."""
        return None

    def at(self, unit: Unit) -> Parametrisation:
        """The same for parts of a weight alone, which are selected as ``unit``."""
        raise ValueError(
            f"{type(self).__name__} trains whole weights; a selection inside them goes with in-place training: "
            "drop select.score, or train=InPlace()"
        )

    def anchored(self) -> Parametrisation:
        """The same, keeping what :meth:`change` needs."""
        return self

    def linearized(self) -> Parametrisation:
        """The same where the forward pass is linearized: ``w`` stays the base, and only the change beside it moves."""
        if type(self).base is Parametrisation.base:
            raise ValueError(
                f"{type(self).__name__} keeps no base to linearize the model at; train it with forward='standard'"
            )
        return self

    def lean(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Lean:
        """The base weight and the change as the direction of its derivative, of a :meth:`linearized` parametrisation."""
        base = self.base(kept)
        moved = self.bind(kept, trained, False, key).astype(jnp.float32) - base.astype(jnp.float32)
        return Whole(moved).lean(base, structured)

    # What follows lets a run change from one selection to another: see jft.methods.renewal.

    def spread(self, kept: Any, values: Any, fill: Array) -> Array:
        """``fill``, shaped like the weight, with ``values`` (shaped like ``trained``) where they belong."""
        raise ValueError(f"{type(self).__name__} cannot change what it selects during a run")

    def collect(self, kept: Any, dense: Array) -> Any:
        """Of ``dense``, shaped like the weight, what belongs to ``trained``; the inverse of :meth:`spread`."""
        raise ValueError(f"{type(self).__name__} cannot change what it selects during a run")

    def ground(self, kept: Any, trained: Any) -> Array:
        """The weight that another selection starts from: the plain one, without what stands beside it."""
        return self.merged(kept, trained)

    def reset(self, kept: Any, w: Array, base: Array) -> Array:
        """``w``, with what trains back at its value in ``base``."""
        return self.spread(kept, self.collect(kept, base), w).astype(w.dtype)

    def rebased(self, kept: Any, base: Array) -> Any:
        """``kept`` of a weight that is no longer the base, such that :meth:`change` is measured from ``base``."""
        return kept

    def values(self, kept: Any, w: Array) -> delta.Encoding:
        """The values of ``w`` where this trains, in the encoding of the change."""
        raise ValueError(f"{type(self).__name__} cannot change what it selects during a run")

    def resting(self, values: delta.Encoding) -> delta.Encoding | None:
        """Of such values, noted before, those that do not train here as a whole weight or layer; None for none."""
        return values

    def placed(self, lead: int) -> Parametrisation:
        """The same for a weight whose first ``lead`` axes only stack matrices or vectors: layers, experts."""
        return self

    def decays(self, trained: Any) -> Any:
        """Which leaves of ``trained`` weight decay is for, a bool each: values and factors, no scores or gates."""
        return jax.tree.map(lambda _: True, trained)

    def matrices(self, trained: Any) -> Any:
        """For each leaf of ``trained`` the :class:`Matrices` it stacks, which an optimizer may take as such; None for none."""
        return jax.tree.map(lambda x: Matrices() if x.ndim > 1 else None, trained)

    def scales(self, trained: Any) -> Any:
        """Learning-rate multipliers, a float for each leaf of ``trained``."""
        return jax.tree.map(lambda _: 1.0, trained)

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        """Sharding of ``(kept, trained)`` for a weight (array or shape) sharded as ``spec``."""
        raise NotImplementedError


def master(w: Array) -> Array:
    """A copy of ``w`` in float32 (or wider): what an optimizer updates."""
    return jnp.asarray(w, jnp.promote_types(w.dtype, jnp.float32), copy=True)


def padded(spec: PartitionSpec, ndim: int) -> tuple:
    """``spec`` with an entry for each of ``ndim`` axes."""
    return tuple(spec) + (None,) * (ndim - len(tuple(spec)))


@dataclasses.dataclass(frozen=True)
class InPlace(Parametrisation):
    """The values themselves train, from ``w``, as a float32 master copy. anchor: keep ``w`` to measure the change from it."""

    anchor: bool = False

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        return w if self.anchor else None, master(w)

    def bind(self, kept: Any, trained: Array, structured: bool, key: Array | None = None) -> Array:
        return trained

    def change(self, kept: Array, trained: Array) -> Array:
        return trained - kept.astype(trained.dtype)

    def at(self, unit: Unit) -> Parametrisation:
        from jft.methods.experts import InPlaceExperts
        from jft.methods.sparse import Selected, layout_of

        return InPlaceExperts() if unit.parts == "experts" else Selected(layout_of(unit))

    def anchored(self) -> InPlace:
        return InPlace(anchor=True)

    def linearized(self) -> Shift:
        return Shift()

    def encode(self, base: Array, kept: Any, trained: Array) -> delta.Encoding:
        return delta.Dense(trained.astype(jnp.float32) - base.astype(jnp.float32))

    def spread(self, kept: Any, values: Array, fill: Array) -> Array:
        return values

    def collect(self, kept: Any, dense: Array) -> Array:
        return dense

    def rebased(self, kept: Any, base: Array) -> Any:
        return base if self.anchor else kept

    def values(self, kept: Any, w: Array) -> delta.Encoding:
        return delta.Dense(jnp.array(w, copy=True))  # w may be the trained values, which the next step takes over

    def resting(self, values: delta.Encoding) -> None:
        return None

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        return spec if self.anchor else None, spec


@dataclasses.dataclass(frozen=True)
class Shift(Parametrisation):
    """``w + trained``: the change itself trains, in float32 and from zero; ``w`` stays the base."""

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        return w, jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))

    def bind(self, kept: Array, trained: Array, structured: bool, key: Array | None = None) -> Array:
        return (kept.astype(jnp.promote_types(kept.dtype, jnp.float32)) + trained).astype(kept.dtype)

    def base(self, kept: Array) -> Array:
        return kept

    def lean(self, kept: Array, trained: Array, structured: bool, key: Array | None = None) -> Lean:
        return Whole(trained).lean(kept, structured)

    def encode(self, base: Array, kept: Any, trained: Array) -> delta.Encoding:
        return delta.Dense(trained.astype(jnp.float32))

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        return spec, spec


@dataclasses.dataclass(frozen=True)
class LowRank(Parametrisation):
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

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        *lead, rows, columns = w.shape
        bound = 1 / math.sqrt(rows)
        a = jax.random.uniform(key, (*lead, rows, self.rank), jnp.float32, -bound, bound)
        return w, {"a": a, "b": jnp.zeros((*lead, self.rank, columns), jnp.float32)}

    def bind(self, kept: Array, trained: Any, structured: bool, key: Array | None = None) -> Any:
        if structured:
            return LowRankWeight(kept, trained["a"], trained["b"], self.scale)
        return (kept.astype(jnp.float32) + self.scale * trained["a"] @ trained["b"]).astype(kept.dtype)

    def at(self, unit: Unit) -> Parametrisation:
        """The selected parts train in place, and the low-rank change beside them."""
        from jft.methods.beside import WithLowRank

        return WithLowRank(InPlace().at(unit), self)

    def linearized(self) -> LowRank:
        return self

    def lean(self, kept: Array, trained: Any, structured: bool, key: Array | None = None) -> Lean:
        return Thin(trained["a"], self.scale * trained["b"]).lean(kept, structured)

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        return delta.LowRank(trained["a"].astype(jnp.float32), self.scale * trained["b"].astype(jnp.float32))

    def scales(self, trained: Any) -> Any:
        return {"a": self.rate, "b": self.rate * self.b_rate}

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        *lead, rows, columns = padded(spec, len(w.shape))
        return spec, {"a": PartitionSpec(*lead, rows, None), "b": PartitionSpec(*lead, None, columns)}


@dataclasses.dataclass(frozen=True)
class LowRankFixed(LowRank):
    """:class:`LowRank` whose factor ``a`` stays as it was drawn, so that the weight is linear in ``b``, which trains.

    Also what is left of the derivative in both factors where ``b`` is zero. Kept ``{"w", "a"}``, trained ``{"b"}``.
    """

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        kept, both = super().init(key, w, at)
        return {"w": kept, "a": both["a"]}, {"b": both["b"]}

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        return super().bind(kept["w"], {"a": kept["a"], **trained}, structured, key)

    def at(self, unit: Unit) -> Parametrisation:
        return Parametrisation.at(self, unit)

    def lean(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Lean:
        return super().lean(kept["w"], {"a": kept["a"], **trained}, structured, key)

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        return super().encode(base, kept["w"], {"a": kept["a"], **trained})

    def scales(self, trained: Any) -> Any:
        return {"b": self.rate * self.b_rate}

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        kept, both = super().specs(spec, w, at)
        return {"w": kept, "a": both["a"]}, {"b": both["b"]}
