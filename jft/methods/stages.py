"""Runs in stages: which whole layers and matrices train changes on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jft import tree
from jft.methods.plan import Method
from jft.methods.schedules import Renewal, Schedule, Standing
from jft.select.halves import halves


@dataclasses.dataclass(frozen=True)
class Last:
    """The last layers: ``count`` of them, all where there are fewer; or a ``share`` (numerator, denominator), rounded up."""

    count: int = 0
    share: tuple[int, int] = (0, 1)

    def of(self, length: int) -> tuple[int, ...]:
        """Their indices among ``length`` layers."""
        wanted = max(self.count, -(-length * self.share[0] // self.share[1]))
        return tuple(range(max(0, length - wanted), length))

    def __str__(self) -> str:
        return f"the last {self.count}" if self.count else f"the last {self.share[0]}/{self.share[1]}"


@dataclasses.dataclass(frozen=True)
class Spaced:
    """A ``fraction`` of the layers (at least one), evenly over the depth.

    k of L layers: ``floor(i L / k)`` for i = 0 to k - 1 (``ends=False``), or ``round(i (L - 1) / (k - 1))``, from the first
    to the last.
    """

    fraction: float
    ends: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction {self.fraction} of the layers is not in (0, 1]")

    def of(self, length: int) -> tuple[int, ...]:
        """Their indices among ``length`` layers."""
        k = max(1, math.floor(self.fraction * length + 0.5))
        if self.ends and k > 1:
            return tuple((2 * i * (length - 1) + k - 1) // (2 * (k - 1)) for i in range(k))
        return tuple(i * length // k for i in range(k))

    def __str__(self) -> str:
        return f"{self.fraction:.0%}, evenly spaced"


@dataclasses.dataclass(frozen=True)
class Between:
    """The layers from ``low`` to ``high`` of the depth, in [0, 1]: ``floor(low L)`` up to, but not, ``floor(high L)``."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"layers from {self.low} to {self.high} of the depth; 0 <= low < high <= 1")

    def of(self, length: int) -> tuple[int, ...]:
        """Their indices among ``length`` layers; at least one."""
        first = min(math.floor(self.low * length), length - 1)
        return tuple(range(first, max(first + 1, math.floor(self.high * length))))

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g} of the depth"


@dataclasses.dataclass(frozen=True)
class LastOf:
    """The table of the last layers of named towers, ``(tower, count)`` each, with or without what stands ``behind`` them."""

    towers: tuple[tuple[str, int], ...]
    behind: bool = True

    def __str__(self) -> str:
        return "of the last layers: " + ", ".join(f"{count} of {tower}" for tower, count in self.towers)

    def __call__(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...] | None]:
        table: dict[str, tuple[int, ...] | None] = {}
        for tower, count in self.towers:
            inside = {p: shape[0] for p, shape in shapes.items() if tree.stack_of(p) == f"{tower}/layers"}
            if not inside:
                raise ValueError(f"this model has no layers under {tower}/; it takes a CLIP")
            if not 0 <= count <= max(inside.values()):
                raise ValueError(f"the last {count} layers of {tower}, which has {max(inside.values())}")
            table |= {p: tuple(range(n - count, n)) for p, n in inside.items() if count}
            ends = (f"{tower}/final_norm/", f"{tower}_projection/")
            table |= {p: None for p in shapes if self.behind and p.startswith(ends)}
        return table


@dataclasses.dataclass(frozen=True)
class Halves:
    """The table of a draw of :func:`jft.select.halves.halves`, with what stands outside layers or without it."""

    seed: int
    draw: int = 0
    outside: bool = False

    def __str__(self) -> str:
        return "of every layer a half that is drawn"

    def __call__(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...] | None]:
        table: dict[str, tuple[int, ...] | None] = dict(halves(shapes, self.seed, self.draw))
        return table | {p: None for p in shapes if self.outside and p not in table}


@dataclasses.dataclass(frozen=True)
class Staged(Schedule):
    """Stages of ``every`` steps each, or ``stages`` of equal length. What is dropped keeps its value."""

    every: int = 0
    stages: int = 0

    def __post_init__(self) -> None:
        if (self.every > 0) == (self.stages > 0) or min(self.every, self.stages) < 0:
            raise ValueError(f"every={self.every} and stages={self.stages}: give one of them, at least 1")

    def stage(self, step: int, steps: int) -> int:
        """The stage, from 0, of update ``step`` out of ``steps``."""
        return step // self.every if self.every else step * self.stages // steps

    def due(self, step: int, steps: int) -> bool:
        return step > 0 and self.stage(step, steps) != self.stage(step - 1, steps)

    def method_at(self, method: Method, step: int, steps: int) -> Method:
        return dataclasses.replace(method, select=self.select(method.select, self.stage(step, steps)))

    def select(self, select: Any, stage: int) -> Any:
        """What is selected in ``stage``."""
        raise NotImplementedError

    def renew(self, standing: Standing) -> Renewal:
        return Renewal({}, method=self.method_at(standing.plan.method, standing.step, standing.steps))


@dataclasses.dataclass(frozen=True)
class Unfreezing(Staged):
    """The last layers first: ``first`` of them, then ``by`` more in each stage; with ``stages``, an equal share in each."""

    first: int = 1
    by: int = 1

    def select(self, select: Any, stage: int) -> Any:
        last = Last(share=(stage + 1, self.stages)) if self.stages else Last(self.first + stage * self.by)
        return dataclasses.replace(select, layers=last)


@dataclasses.dataclass(frozen=True)
class Redraw(Staged):
    """Another draw of :class:`Halves` in each stage."""

    def select(self, select: Any, stage: int) -> Any:
        return dataclasses.replace(select, table=dataclasses.replace(select.table, draw=stage))


@dataclasses.dataclass(frozen=True)
class Decided(Schedule):
    """Every ``every`` steps ``decide`` again, from the weights as they then are and the batches that come next."""

    decide: Any
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"a decision every {self.every} steps; at least 1")

    def due(self, step: int, steps: int) -> bool:
        return step > 0 and step % self.every == 0

    def renew(self, standing: Standing) -> Renewal:
        return Renewal({}, method=standing.plan.method.decided(self.decide(standing.probe)))
