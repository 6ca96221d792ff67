"""What has settled: values of weights that trained once, and stay in the weight while others train.

They are noted as encodings of values, not of changes, so that a run taken up later has the same bits in its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jft import delta
from jft.methods import InPlace, Parametrisation, SomeLayers

Settled = dict[str, delta.Encoding]


def settle(
    settled: Settled, leaves: Mapping[str, Parametrisation], kept: Mapping[str, Any], current: Mapping[str, jax.Array]
) -> Settled:
    """Values of all that trained so far; where something settled before and trained since, what it is now."""
    now = {p: how.encode(None, kept[p], how.collect(kept[p], current[p])) for p, how in leaves.items()}
    return {**settled, **{p: settled[p].under(above) if p in settled else above for p, above in now.items()}}


def resting(settled: Settled, leaves: Mapping[str, Parametrisation]) -> Settled:
    """What of it does not train in ``leaves`` as whole weights or layers: the state has the values of those that do."""
    left = {p: _resting(values, leaves.get(p)) for p, values in settled.items()}
    # Arrays of no size cannot be saved.
    return {p: x for p, x in left.items() if x is not None and all(y.size for y in jax.tree.leaves(x))}


def _resting(values: delta.Encoding, how: Parametrisation | None) -> delta.Encoding | None:
    if isinstance(how, InPlace):
        return None
    if not isinstance(how, SomeLayers) or not isinstance(values, delta.Rows):
        return values
    still = np.flatnonzero(~np.isin(values.indices, how.layers()))
    return delta.Rows(values.indices[still], values.values[still], values.shape)


def write(settled: Settled, w: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Weights with what settled in them put in place: the inverse of noting it, exactly."""
    return {p: settled[p].written(x) if p in settled else x for p, x in w.items()}


def change(
    settled: Settled, base: Mapping[str, jax.Array], encoded: Mapping[str, delta.Encoding]
) -> dict[str, delta.Encoding]:
    """The whole change from the base: what settled, minus the base there, with what trains now over it."""
    moved = {p: values.minus(base[p]) for p, values in settled.items()}
    return {**encoded, **{p: x.under(encoded[p]) if p in encoded else x for p, x in moved.items()}}
