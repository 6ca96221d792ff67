"""Decisions: which whole layers or matrices train, found once from the base and the data.

Each is a frozen value, ``decide(probe) -> {path: layers}`` (None: the whole weight), for :attr:`jft.methods.Method.decide`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.delta.numeric import host
from jft.models.core import is_jft_model
from jft.select import activations, backward, scores
from jft.select.budget import Flops
from jft.select.probe import Per, Probe

Array = jax.Array
Table = dict[str, list[int] | None]
HIGHER_IS_BETTER = ("accuracy",)


def stacks(probe: Probe) -> dict[str, int]:
    """The stacks of layers that have candidates, and how many layers each has."""
    if not is_jft_model(probe.model):
        raise ValueError(
            "layers are told apart in jft's own models, whose weights are stacked; select by pattern instead"
        )
    found = tree.stacks({p: probe.params[p] for p in probe.paths})
    if not found:
        raise ValueError(f"none of the candidates is in a layer: {', '.join(probe.paths[:3])}")
    return found


def table_of(probe: Probe, layers: Mapping[str, Iterable[int]]) -> Table:
    """``{path: layers}`` of the candidates in ``layers`` of each stack."""
    chosen = {stack: sorted(map(int, own)) for stack, own in layers.items()}
    return {p: chosen[s] for p in probe.paths if (s := tree.stack_of(p)) is not None and chosen.get(s)}


@dataclasses.dataclass(frozen=True)
class ByScore:
    """The ``k`` layers of each stack with the largest ``score(probe) -> {stack: [L]}``, or the smallest; ties: the lower."""

    score: Callable[[Probe], Mapping[str, Array]]
    k: int
    largest: bool = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; choose at least 1 layer")

    def __call__(self, probe: Probe) -> Table:
        found = {s: host(x) for s, x in self.score(probe).items()}
        for stack, values in found.items():
            if self.k > len(values):
                raise ValueError(f"k is {self.k}, and {stack} has {len(values)} layers")
        order = {s: np.argsort(-x if self.largest else x, kind="stable") for s, x in found.items()}
        return table_of(probe, {s: i[: self.k] for s, i in order.items()})


@dataclasses.dataclass(frozen=True)
class LayerFisher:
    """Diagonal Fisher information of each layer's weights together: see :class:`jft.select.scores.Fisher`."""

    count: int
    per: Per = "example"
    pool: Literal["sum", "mean"] = "sum"

    def __call__(self, probe: Probe) -> dict[str, Array]:
        return activations.by_layer(scores.Fisher(self.count, self.per)(probe), self.pool)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """``target(outputs, batch) [B]``: minus the mean loss of each example, the log-likelihood of what is right; 0 without."""

    objective: Any

    def __call__(self, outputs: Any, batch: Any) -> Array:
        axes = jax.tree.map(lambda x: 0 if x.ndim else None, batch)
        ranks = jax.tree.map(lambda x: x.ndim, batch)

        def one(outputs: Any, row: Any) -> Array:
            row = jax.tree.map(lambda x, n: x[None] if n else x, row, ranks)
            loss, weight, _ = self.objective.loss(jax.tree.map(lambda x: x[None], outputs), row)
            return jnp.where(weight > 0, -loss / jnp.where(weight > 0, weight, 1.0), 0.0)

        return jax.vmap(one, in_axes=(0, axes))(outputs, batch)


@dataclasses.dataclass(frozen=True)
class FromBatch:
    """``target(outputs, batch) [B]``: what the batch has under ``name``."""

    name: str

    def __call__(self, outputs: Any, batch: Any) -> Array:
        if self.name not in batch:
            raise ValueError(
                f"the batch has no {self.name!r} to correlate layers with, only {', '.join(sorted(batch))}"
            )
        return batch[self.name]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """How each layer's residual values go with a number known of each example: see :func:`jft.select.activations.correlation`.

    target: a function ``(outputs, batch) -> [B]``, the name of an entry of the batches, or None for the model's own
    log-likelihood of the right answer.
    """

    target: Callable[[Any, Any], Array] | str | None = None
    batches: int = 8
    site: str = "layers/in"
    pool: Literal["mean", "last"] = "mean"

    def __call__(self, probe: Probe) -> dict[str, Array]:
        target = FromBatch(self.target) if isinstance(self.target, str) else self.target or Likelihood(probe.objective)
        stack = tree.stack_of(self.site) or self.site
        return {stack: activations.correlation(probe, target, self.batches, self.site, self.pool)}


def _better(metric: str, metrics: Mapping[str, float]) -> float:
    """A metric of an evaluation, such that more is better."""
    if metric not in metrics:
        raise ValueError(f"evaluation gives {', '.join(metrics)}, not {metric!r}")
    return metrics[metric] if metric in HIGHER_IS_BETTER else -metrics[metric]


@dataclasses.dataclass(frozen=True)
class Greedy:
    """SubTuning's search: layers are added one by one, each time the one with which tuning evaluates best.

    Every candidate is trained from the base for ``steps`` and evaluated; the search ends where the best one gains less than
    ``tolerance``, or with ``most`` layers (0: no limit). Its first round is the finetuning profile. shortlist: in later
    rounds only so many layers are tried, the best of the profile (0: all).
    """

    steps: int
    metric: str = "loss"
    tolerance: float = 0.0
    most: int = 0
    shortlist: int = 0

    def __call__(self, probe: Probe) -> Table:
        order = [(stack, i) for stack, length in stacks(probe).items() for i in range(length)]
        chosen: list[tuple[str, int]] = []
        best, tried = -np.inf, order
        while tried and (not self.most or len(chosen) < self.most):
            found = [self._worth(probe, [*chosen, layer]) for layer in tried]
            place = int(np.argmax(found))
            if (chosen and found[place] < best + self.tolerance) or found[place] <= best:
                break
            best, layer = found[place], tried[place]
            if not chosen and self.shortlist:
                ranked = np.argsort(-np.asarray(found), kind="stable")[: self.shortlist]
                tried = [tried[i] for i in sorted(ranked)]
            chosen.append(layer)
            tried = [x for x in tried if x != layer]
        if not chosen:
            raise ValueError(f"no evaluation gave a {self.metric} that is a number")
        return _table(probe, chosen)

    def _worth(self, probe: Probe, layers: list[tuple[str, int]]) -> float:
        return _better(self.metric, probe.evaluate(probe.tuned(self.steps, table=_table(probe, layers))))


def _table(probe: Probe, layers: Iterable[tuple[str, int]]) -> Table:
    chosen: dict[str, list[int]] = {}
    for stack, i in layers:
        chosen.setdefault(stack, []).append(i)
    return table_of(probe, chosen)


@dataclasses.dataclass(frozen=True)
class RangeSearch:
    """CoFiTune's coarse step: a search over ranges of layers and modules by what tuning them evaluates to.

    Level by level: the ranges that ``parts`` cut the depth into (halves, then quarters) are tried inside the range found
    before, all modules together; then, in that range, each group of ``modules``. Where nothing is better than what the
    level before found, that stays. Every candidate is trained from the base for ``steps``.
    """

    steps: int
    metric: str = "loss"
    parts: tuple[int, ...] = (2, 4)
    modules: tuple[tuple[str, ...], ...] = ()

    def __call__(self, probe: Probe) -> Table:
        lengths = stacks(probe)
        best = {s: list(range(n)) for s, n in lengths.items()}
        value = -np.inf
        for parts in self.parts:
            cuts = [{s: _part(n, i, parts) for s, n in lengths.items()} for i in range(parts)]
            inside = [c for c in cuts if all(set(c[s]) <= set(best[s]) for s in c)]
            found = [self._worth(probe, table_of(probe, c)) for c in inside]
            if found and max(found) > value:
                value, best = max(found), inside[int(np.argmax(found))]
        table = table_of(probe, best)
        tables = [narrowed(table, group) for group in self.modules]
        found = [self._worth(probe, t) for t in tables]
        return tables[int(np.argmax(found))] if found and max(found) > value else table

    def _worth(self, probe: Probe, table: Table) -> float:
        return _better(self.metric, probe.evaluate(probe.tuned(self.steps, table=table)))


def _part(length: int, i: int, parts: int) -> list[int]:
    return list(range(length * i // parts, length * (i + 1) // parts))


def narrowed(table: Table, modules: Iterable[str]) -> Table:
    """The rows of a table whose path matches any of ``modules``."""
    found = {p: layers for p, layers in table.items() if any(re.search(m, p) for m in modules)}
    if not found:
        raise ValueError(f"no weight of the chosen layers matches {', '.join(modules)}")
    return found


@dataclasses.dataclass(frozen=True)
class Green:
    """GreenTrainer's choice: the tensors whose update lowers the loss most, within a fraction of the FLOPs of a full step.

    Importance of a tensor is ``-sum(g * dw)``, g the mean gradient of ``batches`` batches and dw what the run's optimizer
    makes of its first step. Costs are those of :mod:`jft.select.backward`; the choice is by
    :func:`jft.select.budget.plan_flops`. of: whether ``fraction`` is of the whole step, forward pass included, or of the
    backward pass.
    """

    fraction: float
    batches: int = 1
    of: Literal["step", "backward"] = "step"
    resolution: int = 1000

    def __call__(self, probe: Probe) -> Table:
        chain = backward.chain(probe)
        gradient, after = probe.gradient(self.batches), probe.tuned(1)
        worth = {
            p: _lowering(gradient[p], after[p], probe.params[p], tree.stack_of(p) is not None) for p in probe.paths
        }
        importance = [float(worth[t.path][t.layer]) if t.path in worth else 0.0 for t in chain]
        share = self.fraction
        if self.of == "step":
            full = sum(t.weight for t in chain) + sum(t.passing for t in chain[:-1])
            forward = backward.forward(chain)
            share = (self.fraction * (forward + full) - forward) / full
            if share <= 0:
                least = forward / (forward + full)
                raise ValueError(
                    f"fraction is {self.fraction}, and the forward pass alone is {least:.2f} of a full step"
                )
        plan = Flops(share, self.resolution).plan(importance, [t.weight for t in chain], [t.passing for t in chain])
        table: dict[str, Any] = {}
        for i in plan:
            if importance[i] > 0:
                tensor = chain[i]
                layered = tree.stack_of(tensor.path) is not None
                table[tensor.path] = sorted([*table.get(tensor.path, []), tensor.layer]) if layered else None
        if not table:
            raise ValueError(f"no tensor that would lower the loss fits into {self.fraction} of a step; give more")
        return table


def _lowering(gradient: Array, after: Array, before: Array, layered: bool) -> np.ndarray:
    moved = after.astype(jnp.float32) - before.astype(jnp.float32)
    axes = tuple(range(1 if layered else 0, gradient.ndim))
    return np.atleast_1d(np.asarray(-jnp.sum(gradient * moved, axis=axes), np.float64))
