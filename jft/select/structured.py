"""Scores of parts of a model that several weights share: attention heads, MLP channels, experts, slots of a memory.

Each gives one number for every unit of a weight (a row, a column, an expert), not for every entry. Those that choose by
themselves, so that coupled weights choose alike, give 1 for what is chosen and 0 for the rest: they go with the budget
:class:`jft.select.budget.Beyond` 0.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.select import activations, memory
from jft.select.budget import Beyond
from jft.select.granularity import Column, Row, spread
from jft.select.heads import patching, rolled
from jft.select.probe import Probe
from jft.select.scores import Random, Score, Scores
from jft.select.threshold import top, top_each

Array = jax.Array
# The budget of a score that is 1 for what is chosen, and the side on which heads and channels lie in each weight.
CHOSEN = Beyond(0.0)
SIDES = (
    (r"attn/o/w$|mlp/down/w$", Row()),
    (r"attn/(q|k|v)/w$|mlp/(up|gate)/w$", Column()),
)


def attention(probe: Probe, path: str) -> tuple[int, int]:
    """Query heads, and heads of keys and values, of the attention that the weight at ``path`` belongs to."""
    config = getattr(getattr(probe.model, "config", None), "backbone", getattr(probe.model, "config", None))
    tower = getattr(config, path.split("/")[0], None)
    config = tower if hasattr(tower, "heads") else config
    found = getattr(config, "heads", None)
    if not found:
        raise ValueError(f"how many heads {path} has is known for jft's own models alone")
    return found, getattr(config, "kv_heads", None) or found


def _named(probe: Probe, ending: str) -> dict[str, str]:
    """Candidates with this ending, by what stands before it."""
    return {p.removesuffix(ending): p for p in probe.paths if p.endswith(ending)}


def _count(ratio: float, of: int) -> int:
    """``floor(ratio of)``, at least one."""
    return min(of, max(1, math.floor(ratio * of + 1e-9)))


@dataclasses.dataclass(frozen=True)
class HeadsAndChannels:
    """1 for the heads and channels of each layer that ``score`` chooses, in all weights that they couple.

    o, v, down, up: the fraction of heads whose rows of the output and columns of the value projection, of channels whose rows
    of down and columns of up and gate are chosen; rounded down, at least one of what is above 0. A head or channel counts
    with the sum of ``score`` over its rows of o or down (without them, its columns of v or up), so that the smaller of
    two fractions is a part of the larger. Where v takes part and query heads share values, they are chosen by the group.
    """

    o: float
    v: float
    down: float
    up: float
    score: Score = Random()
    largest: bool = True

    def share(self, path: str, available: int) -> int:
        """About how many of the rows or columns of a weight are chosen: whole heads are not known here."""
        fraction = {"attn/o": self.o, "attn/v": self.v, "mlp/down": self.down}.get(
            "/".join(path.split("/")[-3:-1]), self.up
        )
        return _count(fraction, available)

    def __call__(self, probe: Probe) -> Scores:
        found = self.score(probe)
        return self._heads(probe, found) | self._channels(probe, found)

    def _heads(self, probe: Probe, found: Scores) -> Scores:
        out: Scores = {}
        rows, columns = _named(probe, "attn/o/w"), _named(probe, "attn/v/w")
        for stack in rows | columns:
            path = rows.get(stack) or columns[stack]
            count, groups = attention(probe, path)
            units = groups if stack in columns else count
            score = _pooled(found[path], units, rows=path.endswith("o/w"))
            if stack in rows:
                chosen = top_each(score, _count(self.o, units), 1, self.largest)
                out[rows[stack]] = _spread(chosen, probe.params[rows[stack]].shape[1])
            if stack in columns:
                chosen = top_each(score, _count(self.v, units), 1, self.largest)
                out[columns[stack]] = _spread(chosen, probe.params[columns[stack]].shape[2])
        return out

    def _channels(self, probe: Probe, found: Scores) -> Scores:
        out: Scores = {}
        rows, ups, gates = (_named(probe, f"mlp/{name}/w") for name in ("down", "up", "gate"))
        for stack in rows | ups:
            path = rows.get(stack) or ups[stack]
            score = _pooled(found[path], found[path].shape[1 if stack in rows else 2], rows=stack in rows)
            for weights, fraction in ((rows, self.down), (ups, self.up), (gates, self.up)):
                if stack in weights:
                    chosen = top_each(score, _count(fraction, score.shape[1]), 1, self.largest)
                    out[weights[stack]] = chosen.astype(jnp.float32)
        return out


def _pooled(score: Array, units: int, rows: bool) -> Array:
    """Sums ``[L, units]`` of a score ``[L, I, O]`` over runs of rows, or of columns."""
    summed = jnp.sum(score.astype(jnp.float32), axis=2 if rows else 1)
    return jnp.sum(summed.reshape(len(summed), units, -1), axis=2)


def _spread(mask: Array, extent: int) -> Array:
    """A mask of heads as 1 and 0 for each of ``extent`` rows or columns."""
    return spread(mask, extent // mask.shape[-1]).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PatchedHeads:
    """1 for the columns of q, k, v and rows of o of the heads that carry the right answers most, by path patching.

    heads: how many, of all layers together, as a fraction (rounded down, at least one) or a number. mlps: likewise how many
    whole MLPs. counterfactual, freeze: see :func:`jft.select.heads.patching`. Keys and values that several query heads
    read are chosen with any of them.
    """

    heads: float
    mlps: int = 0
    batches: int = 1
    counterfactual: Callable[[Any], Any] | None = rolled
    freeze: bool = True

    def __call__(self, probe: Probe) -> Scores:
        found = patching(probe, self.batches, self.counterfactual, freeze=self.freeze, mlps=bool(self.mlps))
        of_heads = {name: x for name, x in found.items() if name.endswith("/o")}
        total = sum(x.size for x in of_heads.values())
        wanted = int(self.heads) if self.heads >= 1 else _count(self.heads, total)
        chosen = top(of_heads, wanted)
        of_mlps = {name: x for name, x in found.items() if name not in of_heads}
        if of_mlps:
            chosen |= top(of_mlps, self.mlps)
        return {p: self._unit(probe, p, chosen) for p in probe.paths}

    def _unit(self, probe: Probe, path: str, chosen: Mapping[str, Array]) -> Array:
        module, name, _ = path.rsplit("/", 2)
        shape = probe.params[path].shape
        if module.endswith("mlp"):
            return jnp.broadcast_to(chosen[f"{module}/down"], (shape[0], shape[1 if name == "down" else 2])) * 1.0
        mask, extent = chosen[f"{module}/o"], shape[1 if name == "o" else 2]
        count, groups = attention(probe, path)
        if name in "kv" and groups < count:
            mask = jnp.any(mask.reshape(len(mask), groups, -1), axis=-1)
        return _spread(mask, extent)


@dataclasses.dataclass(frozen=True)
class ExpertUse:
    """1 for the experts of each layer that the data uses most, until they have the share ``p`` of it.

    kind: ``token``, an expert's share of the tokens, or ``gate``, its mean gate value: see
    :func:`jft.select.activations.experts`.
    """

    p: float
    kind: Literal["token", "gate"] = "token"
    batches: int = 1

    def __call__(self, probe: Probe) -> Scores:
        found = activations.experts(probe, self.batches, self.kind)
        masks = {n.removesuffix("router"): activations.until(jax.device_get(x), self.p) for n, x in found.items()}
        out = {}
        for path in probe.paths:
            mask = next((m for stack, m in masks.items() if path.startswith(f"{stack}experts/")), None)
            if mask is None:
                raise ValueError(f"{path} is no weight of experts")
            out[path] = jnp.asarray(mask, jnp.float32)
        return out


@dataclasses.dataclass(frozen=True)
class _Reads:
    """How often a batch reads each slot of the memory."""

    model: Any

    def __call__(self, params: Any, batch: Any) -> Array:
        return memory.accesses(self.model, params, batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """TF-IDF of the slots of a memory: what ``batches`` of the training data read, and the background does not.

    background: :class:`jft.select.memory.Accesses` of data whose skills should stay, made by
    :func:`jft.select.memory.slot_counts`; a ``.npz`` file of its three fields; None for reads alone. Equal to itself alone.
    """

    background: memory.Accesses | str | None = None
    batches: int = 1

    def __call__(self, probe: Probe) -> Scores:
        reads = probe.sums(_Reads(probe.model), self.batches)
        known = self._known(reads.shape[0])
        scores = memory.tf_idf(reads, jnp.asarray(known.batches, jnp.float32), jnp.float32(known.size))
        return dict.fromkeys(probe.paths, scores)

    def _known(self, slots: int) -> memory.Accesses:
        nothing = np.zeros(slots, np.int64)
        known = self.background
        if known is None:
            return memory.Accesses(nothing, nothing, 1)
        if isinstance(known, str | os.PathLike):
            with np.load(known) as file:
                known = memory.Accesses(file["counts"], file["batches"], int(file["size"]))
        if known.batches.shape != nothing.shape:
            raise ValueError(f"the background counts {known.batches.shape[0]} slots, and the memory has {slots}")
        return known
