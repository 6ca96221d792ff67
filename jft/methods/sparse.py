"""`Selected`: parts of a weight train in place, as entries, blocks, rows or columns; everything else is frozen.

Gradients, masters and optimizer state exist for the selected values alone: see :mod:`jft.models.sparse`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jft import delta
from jft.delta.numeric import host
from jft.kernels import slices
from jft.methods.parametrise import Matrices, Parametrisation, master, padded
from jft.models.sparse import Blocks, Entries, Layout, SelectedWeight, Slices, tap
from jft.select.unit import Unit
from jft.select.units import Block
from jft.tangent.lean import Lean

Array = jax.Array


def layout_of(unit: Unit) -> Layout:
    """How what is selected as ``unit`` is laid out."""
    if unit.parts == "blocks" and isinstance(unit, Block):
        return Blocks(unit.rows, unit.columns)
    if unit.parts is None:
        raise ValueError(f"{unit} selects whole weights; this selection is of parts inside them")
    return Entries() if unit.parts == "entries" else Slices(slices.ROWS if unit.parts == "rows" else slices.COLUMNS)


def _matrices(layout: Layout) -> Matrices | None:
    """The matrices that values laid out so are: rows, and columns, of all cells are one."""
    if isinstance(layout, Slices):
        return Matrices((-3, -2), (-1,)) if layout.axis == slices.ROWS else Matrices((-3,), (-2, -1))
    return None if isinstance(layout, Entries) else Matrices()


@dataclasses.dataclass(frozen=True)
class Selected(Parametrisation):
    """The parts ``at`` of the weight train in place, by ``layout``; float32 masters for them alone.

    live: the run owns the weight and writes every update into it, so no copy of it is ever made. Not live: the weight stays
    the base, shared (by the members of a fleet), and the product with the change is added to that with the base.
    kept ``{"w", "at", "origin"}``: the weight, the selection, and the base's values there.
    """

    layout: Layout
    live: bool = True
    selects = True

    def init(self, key: Array, w: Array, at: Array | None = None) -> tuple[Any, Any]:
        if at is None:
            raise ValueError(f"{self.layout} needs a selection: which parts of the weight train")
        origin = self.layout.gather(w, at)
        return {"w": w, "at": at, "origin": origin}, master(origin)

    def bind(self, kept: Any, trained: Array, structured: bool, key: Array | None = None) -> Any:
        if structured:
            return SelectedWeight(kept["w"], kept["at"], trained, None if self.live else kept["origin"], self.layout)
        if self.live:
            return tap(self.layout, kept["w"], kept["at"], trained)
        return self.layout.put(kept["w"], kept["at"], trained)

    def linearized(self) -> Selected:
        return dataclasses.replace(self, live=False)

    def lean(self, kept: Any, trained: Array, structured: bool, key: Array | None = None) -> Lean:
        # A live weight's tap is the derivative at what the weight holds, which here is the base.
        tapped, change = dataclasses.replace(self, live=True), self.change(kept, trained)
        return Lean(
            lambda values: tapped.bind(kept, values, structured), jnp.zeros(change.shape, kept["w"].dtype), change
        )

    def commit(self, kept: Any, trained: Array) -> Any:
        return {**kept, "w": self.layout.put(kept["w"], kept["at"], trained)} if self.live else kept

    def merged(self, kept: Any, trained: Array) -> Array:
        return kept["w"] if self.live else self.layout.put(kept["w"], kept["at"], trained)

    def count(self, kept: Any, trained: Array) -> Array:
        return self.layout.count(kept["at"], kept["w"].shape)

    def change(self, kept: Any, trained: Array) -> Array:
        return trained - kept["origin"].astype(trained.dtype)

    def encode(self, base: Array, kept: Any, trained: Array) -> delta.Encoding:
        at, values = (host(x) for x in (kept["at"], self.change(kept, trained)))
        return self.layout.encode(at, values, tuple(kept["w"].shape))

    def spread(self, kept: Any, values: Array, fill: Array) -> Array:
        return self.layout.put(fill, kept["at"], values)

    def collect(self, kept: Any, dense: Array) -> Array:
        return self.layout.gather(dense, kept["at"])

    def rebased(self, kept: Any, base: Array) -> Any:
        return {**kept, "origin": self.layout.gather(base, kept["at"])}

    def values(self, kept: Any, w: Array) -> delta.Encoding:
        at, values = (host(x) for x in (kept["at"], self.layout.gather(w, kept["at"])))
        return delta.Entries.of(self.layout.encode(at, values, tuple(w.shape)))

    def matrices(self, trained: Array) -> Any:
        """Each block is one, and so are the rows, or columns, that train of one matrix together; single entries are none."""
        return jax.tree.map(lambda _: _matrices(self.layout), trained)

    def specs(self, spec: PartitionSpec, w: Any, at: Any = None) -> tuple[Any, Any]:
        places, values = self.layout.spec(padded(spec, len(w.shape)), at)
        return {"w": spec, "at": places, "origin": values}, values
