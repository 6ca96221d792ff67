"""Merging by any rule in coordinates: deltas become their coordinates in a basis that models share, and come back merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jft.delta import Dense, LowRank, TaskVector
from jft.delta import manifest as manifests
from jft.delta.encoding import Encoding
from jft.merge.in_memory import stack_axes
from jft.merge.rule import Vectors, listed

Array = jax.Array
MergeRule = Callable[..., TaskVector]


class Coordinates(NamedTuple):
    """The coordinates of one delta of each model, ``[..., I', O']``, and the way back from merged ones."""

    each: Sequence[Array]
    back: Callable[[Array], Encoding]


def merged_in_subspace(
    vectors: Vectors,
    weights: Any,
    coordinates: Callable[[Sequence[Encoding]], Coordinates | None],
    rule: MergeRule,
    scale: Any,
    note: dict[str, Any],
    options: dict[str, Any],
) -> TaskVector:
    """``scale * rule`` on the ``coordinates`` of every matrix; what has none goes to ``rule`` as it is, in a call of its own.

    coordinates: from the deltas of one path, one per model, to their coordinates; None leaves the path as it is. A path that
    a vector lacks is a zero. Raises ``ValueError`` where shapes of a path differ.
    """
    taus = listed(vectors)
    paths = list(dict.fromkeys(path for tau in taus for path in tau))
    aligned: dict[str, Coordinates] = {}
    for path in paths:
        deltas = _deltas(path, taus)
        shape = deltas[0].shape
        one = coordinates(deltas) if len(shape) - stack_axes(path, len(shape)) == 2 else None
        if one is not None:
            aligned[path] = one
    inside = [
        TaskVector({path: Dense(one.each[i]) for path, one in aligned.items()}, tau.manifest)
        for i, tau in enumerate(taus)
    ]
    rest = [TaskVector({p: d for p, d in tau.items() if p not in aligned}, tau.manifest) for tau in taus]
    results: dict[str, Encoding] = {}
    merges = []
    if aligned:
        merged = rule(inside, weights, **options)
        merges.append(merged)
        results = {path: one.back(merged[path].dense()) for path, one in aligned.items()}
    if any(len(tau) for tau in rest):
        merges.append(rule(rest, weights, **options))
        results |= merges[-1].deltas
    # The parents are merges by the rule, whose manifests name it and its options.
    manifest = manifests.derive([x.manifest for x in merges or taus], "merge", **note)
    return TaskVector({path: results[path].scaled(scale) for path in paths}, manifest)


def _deltas(path: str, taus: Sequence[TaskVector]) -> list[Encoding]:
    present = next(tau[path] for tau in taus if path in tau)
    for tau in taus:
        if path in tau and tau[path].shape != present.shape:
            raise ValueError(f"{path!r} has shape {present.shape} in one vector and {tau[path].shape} in another")
    return [tau[path] if path in tau else _zero(present) for tau in taus]


def _zero(delta: Encoding) -> Encoding:
    """No change, as low-rank as ``delta`` is: rules count directions."""
    return (
        LowRank(0 * delta.a, 0 * delta.b) if isinstance(delta, LowRank) else Dense(jnp.zeros(delta.shape, jnp.float32))
    )
