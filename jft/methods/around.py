"""Parametrisations that are made of another one, and say only what they do in another way."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jft import delta
from jft.methods.parametrise import Parametrisation
from jft.select.unit import Unit

Array = jax.Array


class Composed(Parametrisation):
    """Made of ``first``, a field of the subclass: it draws, needs and becomes what that does."""

    first: Parametrisation

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.first.random

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.first.exact

    def anchored(self) -> Any:
        return self._of(self.first.anchored())

    def linearized(self) -> Any:
        return self._of(self.first.linearized())

    def placed(self, lead: int) -> Any:
        return self._of(self.first.placed(lead))

    def _of(self, first: Parametrisation) -> Any:
        return dataclasses.replace(self, first=first)  # type: ignore[type-var]  # subclasses are dataclasses


class Around(Composed):
    """Composed, with what ``first`` keeps; and of what trains, :meth:`own` is that of ``first``."""

    @property
    def live(self) -> Any:  # type: ignore[override]
        return self.first.live

    @property
    def selects(self) -> bool:  # type: ignore[override]
        return self.first.selects

    def own(self, trained: Any) -> Any:
        """What ``first`` trains."""
        return trained

    def at(self, unit: Unit) -> Any:
        return self._of(self.first.at(unit))

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        return self.first.bind(kept, self.own(trained), structured, key)

    def merged(self, kept: Any, trained: Any) -> Array:
        return self.first.merged(kept, self.own(trained))

    def encode(self, base: Array, kept: Any, trained: Any) -> delta.Encoding:
        return self.first.encode(base, kept, self.own(trained))

    def commit(self, kept: Any, trained: Any) -> Any:
        return self.first.commit(kept, self.own(trained))

    def change(self, kept: Any, trained: Any) -> Any:
        return self.first.change(kept, self.own(trained))

    def count(self, kept: Any, trained: Any) -> Any:
        return self.first.count(kept, self.own(trained))

    def penalty(self, kept: Any, trained: Any) -> Array | None:
        return self.first.penalty(kept, self.own(trained))

    def spread(self, kept: Any, values: Any, fill: Array) -> Any:
        return self.first.spread(kept, self.own(values), fill)

    def collect(self, kept: Any, dense: Any) -> Any:
        return self.first.collect(kept, self.own(dense))

    def ground(self, kept: Any, trained: Any) -> Array:
        return self.first.ground(kept, self.own(trained))

    def reset(self, kept: Any, w: Array, base: Array) -> Array:
        return self.first.reset(kept, w, base)

    def rebased(self, kept: Any, base: Array) -> Any:
        return self.first.rebased(kept, base)

    def decays(self, trained: Any) -> Any:
        return self.first.decays(self.own(trained))

    def matrices(self, trained: Any) -> Any:
        return self.first.matrices(self.own(trained))

    def scales(self, trained: Any) -> Any:
        return self.first.scales(self.own(trained))

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        return self.first.specs(spec, w, at)
