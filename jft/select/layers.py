"""`Choice`: the whole layers and matrices that train, by number, by depth, by a table, or by scores.

Whatever it is made from, a choice comes to a *table*, ``{path: indices of layers}`` with None for a weight as a whole: from
the shapes of the candidates, or, with ``from_data``, from a :class:`jft.select.calibration.Calibration` of the base and the
data. Those that train to find out (:mod:`jft.methods.layer_search`) are each with their preset.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.select import budget as budgets
from jft.select.calibration import Calibration
from jft.select.granularity import POOLS, Granularity, How, Layer, Name
from jft.select.halves import halves
from jft.tree import host

Array = jax.Array
Table = Mapping[str, Sequence[int] | None]


class Choice:
    """A choice of the layers that train, for each weight; subclasses are frozen dataclasses."""

    from_data: ClassVar[bool] = False

    def __call__(self, source: Any) -> Table:
        """The table, from ``{path: shape}`` of the candidates, or of a calibration of them where it is :attr:`from_data`."""
        raise NotImplementedError


class Depth:
    """Layers by their depth in a stack of L, the same for every weight."""

    def of(self, length: int) -> tuple[int, ...]:
        """Their indices among ``length`` layers."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Indices(Depth):
    """Layers by number, negative from the end."""

    layers: tuple[int, ...]

    def of(self, length: int) -> tuple[int, ...]:
        return self.layers

    def __str__(self) -> str:
        return ", ".join(map(str, self.layers))


@dataclasses.dataclass(frozen=True)
class Listed(Choice):
    """A table as it is, pairs ``(path, indices or None)``: the result of every choice from data."""

    pairs: tuple[tuple[str, tuple[int, ...] | None], ...]

    @classmethod
    def of(cls, table: Table) -> Listed:
        # Plain ints in tuples: a choice is hashed and written to JSON.
        return cls(tuple((p, None if layers is None else tuple(map(int, layers))) for p, layers in table.items()))

    def __call__(self, source: Any) -> Table:
        return dict(self.pairs)


def choice(layers: Any) -> Choice | Depth | None:
    """A choice from itself, indices of layers, or a table of them; None for all.

    Raises ``ValueError`` for anything else.
    """
    if layers is None or isinstance(layers, Choice | Depth):
        return layers
    if isinstance(layers, Mapping):
        return Listed.of(layers)
    # A string is iterable too, and would become its letters.
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        indices = tuple(layers)
        if all(isinstance(i, int | np.integer) for i in indices):
            return Indices(tuple(map(int, indices)))
    raise ValueError(
        f"layers={layers!r} is no choice of layers: give indices (negative from the end), a table {{path: indices or None}}, "
        "or one of jft.select.layers, such as Last(4)"
    )


@dataclasses.dataclass(frozen=True)
class Last(Depth):
    """The last layers: ``count`` of them, all where there are fewer; or a ``share`` (numerator, denominator), rounded up."""

    count: int = 0
    share: tuple[int, int] = (0, 1)

    def of(self, length: int) -> tuple[int, ...]:
        """Their indices among ``length`` layers."""
        # The one that is not given is 0.
        count = max(self.count, -(-length * self.share[0] // self.share[1]))
        return tuple(range(max(0, length - count), length))

    def __str__(self) -> str:
        return f"the last {self.count}" if self.count else f"the last {self.share[0]}/{self.share[1]}"


@dataclasses.dataclass(frozen=True)
class Spaced(Depth):
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
        # Half up, where Python's `round` takes halves to the even number.
        k = max(1, math.floor(self.fraction * length + 0.5))
        if self.ends and k > 1:
            # Rounded in integers: floats may put a half on either side.
            return tuple((2 * i * (length - 1) + k - 1) // (2 * (k - 1)) for i in range(k))
        return tuple(i * length // k for i in range(k))

    def __str__(self) -> str:
        return f"{self.fraction:.0%}, evenly spaced"


@dataclasses.dataclass(frozen=True)
class Between(Depth):
    """The layers from ``low`` to ``high`` of the depth, in [0, 1]: ``floor(low L)`` up to, but not, ``floor(high L)``."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"layers from {self.low} to {self.high} of the depth; 0 <= low < high <= 1")

    def of(self, length: int) -> tuple[int, ...]:
        """Their indices among ``length`` layers; at least one."""
        # A short stack may have no layer in the range; then the nearest below.
        first = min(math.floor(self.low * length), length - 1)
        return tuple(range(first, max(first + 1, math.floor(self.high * length))))

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g} of the depth"


@dataclasses.dataclass(frozen=True)
class LastOf(Choice):
    """The table of the last layers of named towers, ``(tower, count)`` each, with or without the weights ``behind`` them."""

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
class Halves(Choice):
    """The table of a draw of :func:`jft.select.halves.halves`, with the weights outside layers or without them."""

    seed: int
    draw: int = 0
    outside: bool = False

    def __str__(self) -> str:
        return "of every layer a half that is drawn"

    def __call__(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...] | None]:
        table: dict[str, tuple[int, ...] | None] = dict(halves(shapes, self.seed, self.draw))
        return table | {p: None for p in shapes if self.outside and p not in table}


@dataclasses.dataclass(frozen=True)
class Scored(Choice):
    """The whole matrices, layers or weights with the best scores within a budget.

    ``granularity`` is :class:`jft.select.granularity.Matrix`: every matrix of every layer by itself; ``Layer``: all weights
    of one layer of a stack together; or ``Name``: a weight with all its layers. score: ``score(calibration)``, numbers like
    each weight, which are pooled, or one for each unit: ``{path: [L]}``, for layers ``{stack: [L]}``. Of equal scores the
    earlier.
    """

    score: Any
    granularity: Granularity
    budget: Any
    pool: How = "sum"
    largest: bool = True
    from_data = True

    def __call__(self, calibration: Calibration) -> dict[str, tuple[int, ...] | None]:
        scores = self.score(calibration)
        if isinstance(self.granularity, Layer):
            return self._layers(calibration, scores)
        leads = {p: calibration.lead(p) for p in scores}
        for path, lead in leads.items():
            # A table names layers, and has no index for experts.
            if lead > 1 and not isinstance(self.granularity, Name):
                raise ValueError(
                    f"{path} stacks experts, which are selected by granularity=Expert(), not {self.granularity}"
                )
        shapes = {p: tuple(calibration.params[p].shape) for p in scores}
        units = {p: self._pooled(scores[p], shapes[p], leads[p]) for p in scores}
        costs = {p: math.prod(shapes[p]) // max(1, tree.size(x)) for p, x in units.items()}
        # No leading axes: layers compete with each other here.
        masks = budgets.choose(units, costs, dict.fromkeys(units, 0), self.budget, self.largest, shapes)
        masks_on_host = {p: host(mask) for p, mask in masks.items()}
        return {p: tuple(np.flatnonzero(m).tolist()) if m.ndim else None for p, m in masks_on_host.items() if m.any()}

    def _pooled(self, score: Array, shape: tuple[int, ...], lead: int) -> Array:
        # A score of units needs no pooling.
        if tuple(score.shape) == self.granularity.units(shape, lead):
            return score
        return self.granularity.pool(score, lead, self.pool)

    def _layers(self, calibration: Calibration, scores: Mapping[str, Array]) -> dict[str, tuple[int, ...] | None]:
        lengths = tree.stacks({p: calibration.params[p] for p in calibration.paths})
        inside = {p: x for p, x in scores.items() if p in calibration.params}
        units = {s: x for s, x in scores.items() if s in lengths} or pooled_layers(inside, self.pool)
        sizes = dict.fromkeys(units, 0)
        for path in calibration.paths:
            stack = tree.stack_of(path)
            if stack in sizes:
                # The cost of a layer is that of its candidates.
                sizes[stack] += tree.size(calibration.params[path]) // lengths[stack]
        masks = budgets.choose(units, sizes, dict.fromkeys(units, 0), self.budget, self.largest)
        return table_of(calibration, {s: np.flatnonzero(host(mask)) for s, mask in masks.items()})


def pooled_layers(scores: Mapping[str, Array], pool: How = "sum") -> dict[str, Array]:
    """``{stack: [L]}``: scores ``[L, ...]`` of all weights of each layer together, for each stack of layers.

    Pooled over the layer's weights as in :meth:`jft.select.granularity.Granularity.pool`; weights outside layers are left out.
    """
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r} is unknown; choose one of {', '.join(POOLS)}")
    groups: dict[str, list[Array]] = {}
    for path, score in scores.items():
        stack = tree.stack_of(path)
        if stack is not None:
            groups.setdefault(stack, []).append(score.astype(jnp.float32).reshape(score.shape[0], -1))
    if not groups:
        raise ValueError(f"none of the scored weights is in a layer: {', '.join(scores)}")
    return {stack: _pool(parts, pool) for stack, parts in groups.items()}


def _pool(parts: list[Array], pool: How) -> Array:
    """Weight by weight, so that no copy of all of them is made."""
    if pool == "max":
        return jnp.max(jnp.stack([jnp.max(x, axis=1) for x in parts]), axis=0)
    # Sums come together over weights; the root, the mean and the size are taken of the total.
    each = {"l2": jnp.square, "abs_mean": jnp.abs}.get(pool, lambda x: x)
    total = functools.reduce(jnp.add, (jnp.sum(each(x), axis=1) for x in parts))
    # The mean over all entries of the layer, not of the means of its weights.
    if pool in ("mean", "abs_mean", "mean_abs"):
        mean = total / sum(x.shape[1] for x in parts)
        return jnp.abs(mean) if pool == "mean_abs" else mean
    return jnp.sqrt(total) if pool == "l2" else total


def table_of(calibration: Calibration, layers: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...] | None]:
    """The table of the candidates in ``layers`` of each stack."""
    indices = {stack: tuple(sorted(map(int, numbers))) for stack, numbers in layers.items()}
    return {p: indices[s] for p in calibration.paths if (s := tree.stack_of(p)) is not None and indices.get(s)}
