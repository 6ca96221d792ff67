"""How one weight trains: parametrisations, each a few pure functions of that weight alone.

A parametrisation splits a weight ``w`` into what is *kept* (never differentiated, stored or saved) and what is *trained*
(a small pytree, in float32 masters), and knows how to put them together again and what the resulting delta is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jft import delta, tree
from jft.select.granularity import Granularity
from jft.tree import host

Array = jax.Array


class Parametrisation:
    """How one weight trains. Subclasses are frozen dataclasses; the defaults here suit what is deterministic and dense.

    random: whether :meth:`bind` draws noise in training. live: whether ``kept["w"]`` always holds the current values, so that
    the loop owns, donates and updates it. selects: whether :meth:`init` needs ``at``, the parts of the weight that train.
    exact: whether :meth:`bind` needs the float32 masters themselves, in whatever dtype the model runs. shares: names among
    the trained values that all weights of a plan have in common: the first of them holds these, and is the others' ``lender``.
    """

    random: ClassVar[bool] = False
    live: Any = False
    selects: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    shares: ClassVar[tuple[str, ...]] = ()
    lender: Any = None

    def fitted(
        self,
        *,
        lead: int | None = None,
        granularity: Granularity | None = None,
        anchored: bool = False,
        linearized: bool = False,
        linear: bool | None = None,
        lender: str | None = None,
        mesh_axes: Any = None,
    ) -> Any:
        """The parametrisation for one weight, with what is told of it; what is not told stays as it is.

        lead: how many of its first axes only stack matrices or vectors (layers, experts). granularity: as what the parts of it
        that train are selected. anchored: what :attr:`jft.delta.Leaf.origin` needs is kept. linearized: the weight stays the
        base, and the model is linear in the change. linear: whether it is the weight of a linear layer, not a table or
        convolution. lender: the path that holds what :attr:`shares` names, where this one does not. mesh_axes: over which it
        and its inputs are cut (:class:`jft.kernels.blocks_forms.Axes`). Raises ``ValueError`` for what it cannot be.
        """
        if granularity is not None:
            raise ValueError(
                f"{type(self).__name__} trains whole weights; a selection inside them goes with in-place training: "
                "drop select.score, or train=InPlace()"
            )
        # A subclass that keeps the base says so by overriding ``tangent``; there is no flag that could disagree with it.
        if linearized and type(self).tangent is Parametrisation.tangent:
            raise ValueError(
                f"{type(self).__name__} keeps no base to linearize the model at; train it with forward='standard'"
            )
        # Callers pass everything they know; a parametrisation takes what it has a field for. None leaves a field as it is.
        told = {"lead": lead, "anchor": anchored or None, "linear": linear, "lender": lender}
        known = {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses
        changes = {name: value for name, value in told.items() if value is not None and name in known}
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        """What ``(kept, trained)`` are: :class:`jft.delta.Leaf` for each of their arrays, in trees like theirs."""
        return delta.Leaf(), delta.Leaf()

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        """``(kept, trained)`` for the weight ``w``; together they must give ``w`` back exactly.

        base: where the change is measured from; ``w`` itself, unless a run goes on that has changed it before.
        """
        raise NotImplementedError

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        """What the model sees: differentiable in ``trained``. Unless ``structured``, a plain array.

        key: of the noise of a training step; None for what holds on average, or in evaluation.
        """
        raise NotImplementedError

    def tangent(self, kept: Any, trained: Any, key: Array | None = None) -> Any:
        """The base weight and the change of it, held: what a linearized model is differentiated along."""
        raise ValueError(f"{type(self).__name__} keeps no base to compare with")

    def encode(self, base: Array | None, kept: Any, trained: Any) -> delta.Encoding:
        """The change from ``base``, in float32 and in its natural encoding; with ``base`` None the values themselves."""
        raise NotImplementedError

    def penalty(self, kept: Any, trained: Any) -> Array | None:
        """What the parametrisation itself adds to the loss, once per batch, weighted; None for nothing."""
        return None

    # What follows is for what trains in place: it lets live weights be updated, and selections change during a run.

    def spread(self, kept: Any, values: Any, fill: Array) -> Array:
        """``fill``, shaped like the weight, with ``values`` (shaped like ``trained``) where they belong."""
        raise ValueError(f"{type(self).__name__} cannot change what it selects during a run")

    def collect(self, kept: Any, dense: Array) -> Any:
        """Of ``dense``, shaped like the weight, what belongs to ``trained``; the inverse of :meth:`spread`."""
        raise ValueError(f"{type(self).__name__} cannot change what it selects during a run")


def master(w: Array) -> Array:
    """A copy of ``w`` in float32 (or wider): what an optimizer updates."""
    # Always a copy: the step donates its masters, and must not free the caller's weights with them.
    return jnp.asarray(w, jnp.promote_types(w.dtype, jnp.float32), copy=True)


def moved_from(base: Array, weight: Array) -> delta.Changed:
    """``base`` and the change to ``weight`` as a whole: :meth:`Parametrisation.tangent` of what has no form of its own."""
    # float32 before the difference: in bfloat16 it would lose the small changes that it is about.
    return delta.Changed(base, delta.Dense(weight.astype(jnp.float32) - base.astype(jnp.float32)), held=True)


@dataclasses.dataclass(frozen=True)
class InPlace(Parametrisation):
    """The values themselves train, from ``w``, as a float32 master copy. anchor: keep ``w`` to measure the change from it.

    rate: a multiplier of their learning rate.
    """

    anchor: bool = False
    rate: float = 1.0

    def fitted(
        self, *, granularity: Granularity | None = None, linearized: bool = False, **told: Any
    ) -> Parametrisation:
        if granularity is not None and granularity.layout is not None:
            return InPlaceSelected(granularity.layout, rate=self.rate).fitted(linearized=linearized, **told)
        # A linearized model needs the base itself, so its change trains beside the weight.
        return Shift(self.rate) if linearized else super().fitted(**told)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        # Without an anchor nothing is kept, and the base's memory is free.
        return delta.Leaf() if self.anchor else None, delta.Leaf(origin=lambda kept: kept, rate=self.rate)

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        return (w if base is None else base) if self.anchor else None, master(w)

    def bind(self, kept: Any, trained: Array, structured: bool, key: Array | None = None) -> Array:
        return trained

    def tangent(self, kept: Any, trained: Array, key: Array | None = None) -> delta.Changed:
        # A linearized model has it as a Shift; this is for what compares with the base in a standard forward pass.
        return moved_from(kept, trained) if self.anchor else super().tangent(kept, trained, key)

    def encode(self, base: Array | None, kept: Any, trained: Array) -> delta.Encoding:
        if base is None:
            return delta.Dense(jnp.array(trained, copy=True))  # trained values are what the next step takes over
        return delta.Dense(trained.astype(jnp.float32) - base.astype(jnp.float32))

    def spread(self, kept: Any, values: Array, fill: Array) -> Array:
        return values

    def collect(self, kept: Any, dense: Array) -> Array:
        return dense


@dataclasses.dataclass(frozen=True)
class Statistic(Parametrisation):
    """A running statistic of a model of another library: training passes give its values, no gradient does.

    dtype: the weight's own, which may be an integer; kept ``w``, where changes are measured from.
    """

    dtype: str
    exact = True

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return delta.Leaf(), delta.Leaf(origin=lambda kept: kept, rate=0.0, decays=False, matrices=None)

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        return w if base is None else base, master(w)

    def bind(self, kept: Any, trained: Array, structured: bool, key: Array | None = None) -> Array:
        return jax.lax.stop_gradient(trained).astype(self.dtype)

    def tangent(self, kept: Any, trained: Array, key: Array | None = None) -> delta.Changed:
        return moved_from(kept, trained)

    def encode(self, base: Array | None, kept: Any, trained: Array) -> delta.Encoding:
        return delta.Dense(jnp.array(trained, copy=True) if base is None else trained - base.astype(trained.dtype))

    def spread(self, kept: Any, values: Array, fill: Array) -> Array:
        return values

    def collect(self, kept: Any, dense: Array) -> Array:
        return dense


@dataclasses.dataclass(frozen=True)
class InPlaceSelected(Parametrisation):
    """The parts ``at`` of the weight train in place, by ``layout``; float32 masters for them alone.

    live: the run owns the weight and writes every update into it, so no copy of it is ever made. Not live: the weight stays
    the base, shared (by the members of a fleet), and the product with the change is added to that with the base.
    kept ``{"w", "at", "origin"}``: the weight, the selection, and the base's values there. rate: a multiplier of their
    learning rate.
    """

    layout: delta.Layout
    live: bool = True
    rate: float = 1.0
    selects = True

    def fitted(self, *, linearized: bool = False, mesh_axes: Any = None, **told: Any) -> InPlaceSelected:
        if mesh_axes is not None:
            return dataclasses.replace(self, layout=self.layout.on_mesh(mesh_axes))
        # A live weight would move the point at which the model is linearized.
        return dataclasses.replace(self, live=False) if linearized else super().fitted(**told)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        places, values = self.layout.axes(at)
        trained = delta.Leaf(
            values,
            matrices=self.layout.matrices,
            rate=self.rate,
            origin=lambda kept: kept["origin"],
            count=lambda kept: self.layout.count(kept["at"], kept["w"].shape),
        )
        return {"w": delta.Leaf(), "at": delta.Leaf(places), "origin": delta.Leaf(values)}, trained

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        if at is None:
            raise ValueError(f"{self.layout} needs a selection: which parts of the weight train")
        values = self.layout.gather(w, at)
        origin = values if base is None else self.layout.gather(base, at)
        return {"w": w, "at": at, "origin": origin}, master(values)

    def _changed(self, kept: Any, values: Array, held: bool) -> delta.Changed:
        shape = kept["w"].shape[self.layout.lead(kept["at"]) :]
        return delta.Changed(kept["w"], delta.Selected(kept["at"], values, self.layout, shape), held)

    def _moved(self, kept: Any, trained: Array) -> Array:
        return trained - kept["origin"].astype(trained.dtype)

    def bind(self, kept: Any, trained: Array, structured: bool, key: Array | None = None) -> Any:
        if not self.live and not structured:
            # Exact: base plus difference would round a second time.
            return self.layout.put(kept["w"], kept["at"], trained)
        changed = self._changed(kept, trained if self.live else self._moved(kept, trained), held=self.live)
        return changed if structured else changed.plain()

    def tangent(self, kept: Any, trained: Array, key: Array | None = None) -> delta.Changed:
        return self._changed(kept, self._moved(kept, trained), held=True)

    def encode(self, base: Array | None, kept: Any, trained: Array) -> delta.Encoding:
        # Encodings sort and compress indices, which is the host's work.
        at, values = (host(x) for x in (kept["at"], trained if base is None else self._moved(kept, trained)))
        return self.layout.encode(at, values, tuple(kept["w"].shape))

    def spread(self, kept: Any, values: Array, fill: Array) -> Array:
        return self.layout.put(fill, kept["at"], values)

    def collect(self, kept: Any, dense: Array) -> Array:
        return self.layout.gather(dense, kept["at"])


class Composed(Parametrisation):
    """Made of ``first``, a field of the subclass: it draws, needs, owns and selects what that does."""

    first: Parametrisation

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.first.random

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.first.exact

    @property
    def live(self) -> bool:  # type: ignore[override]
        return self.first.live

    @property
    def selects(self) -> bool:  # type: ignore[override]
        return self.first.selects

    def fitted(self, **told: Any) -> Any:
        # The lender's values would be cut into runs, or nested, where the other weights do not look for them.
        if self.first.shares:
            raise ValueError(
                f"{type(self.first).__name__} shares {', '.join(self.first.shares)} among whole weights; it does not go into "
                f"{type(self).__name__}: train all layers, and nothing beside it"
            )
        return dataclasses.replace(self, first=self.first.fitted(**told))  # type: ignore[type-var]


class Additive(Parametrisation):
    """``w + change(trained)`` with a frozen ``w``: a subclass says how it starts, and the change in its own form."""

    def change(self, kept: Any, trained: Any) -> delta.Change:
        """What is added to the weight; an encoding too, in the dtype of ``trained``."""
        raise NotImplementedError

    def weight(self, kept: Any) -> Array:
        """The frozen weight."""
        return kept

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        changed = delta.Changed(self.weight(kept), self.change(kept, trained))
        return changed if structured else changed.plain()

    def tangent(self, kept: Any, trained: Any, key: Array | None = None) -> Any:
        return delta.Changed(self.weight(kept), self.change(kept, trained), held=True)

    def encode(self, base: Array | None, kept: Any, trained: Any) -> delta.Encoding:
        return self.change(kept, tree.cast(trained, jnp.float32))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Shift(Additive):
    """``w + trained``: the change itself trains, in float32 and from zero; ``w`` stays the base.

    rate: a multiplier of its learning rate.
    """

    rate: float = 1.0

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return delta.Leaf(), delta.Leaf(rate=self.rate)

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        # promote_types: float64 weights, as in tests, keep their precision.
        return w, jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))

    def change(self, kept: Array, trained: Array) -> delta.Change:
        return delta.Dense(trained)
