"""Scaling of task vectors by depth."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta, tree
from jft.delta import TaskVector
from jft.merge.rule import Vectors, listed

Array = jax.Array


def lines(tau: TaskVector, alpha: float, beta: float | None = None) -> TaskVector:
    """LiNeS: the change of layer l of L times ``alpha + beta * l / (L - 1)``, of what is outside layers times ``alpha``.

    Layers count from 0. beta: None is ``1 - alpha``, the paper's choice for one fine-tuned model: shallow layers stay near
    the base, the last changes as it did. For a merged vector see :func:`with_lines`. Layers are the first axis of jft's
    stacks, each stack by itself, or numbers in paths (:func:`jft.tree.layer_of`), where L is one more than the largest of
    the base, or of the vector where the base is not known. A single layer has ``alpha``. Rows, entries and low ranks stay so,
    and what is not stacked keeps its encoding; others become dense. Wang et al. 2024, arXiv:2410.17146.
    Raises ``ValueError`` for factors that are not finite.
    """
    beta = 1 - alpha if beta is None else beta
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, not {value}")
    counts = _numbered_layers(tau)

    def scaled(path: str, change: delta.Encoding) -> delta.Encoding:
        layer = tree.layer_of(path)
        if layer is not None:
            depth = layer[1] / max(counts[_unnumbered(layer[0])] - 1, 1)
            return change.scaled(alpha + beta * depth)
        if tree.stack_of(path) is None:
            return change.scaled(alpha)
        count = change.shape[0]
        return _by_layer(change, alpha + beta * jnp.arange(count) / max(count - 1, 1))

    return tau.map(scaled, "lines", alpha=float(alpha), beta=float(beta))


def layerwise(tau: TaskVector, coefficients: Any, outside: Any = 1.0) -> TaskVector:
    """The change of layer l times ``coefficients[l]``, of what is outside layers times ``outside``.

    coefficients: ``[L]``, for every stack of the vector; or ``{stack: [L]}``, as ``text/layers`` or ``image/blocks``. What
    layers are, how many there are and what stays encoded is as in :func:`lines`, which is ``alpha + beta * linspace(0, 1,
    L)``. They may be traced: layers and profiles can be searched (:func:`jft.merge.tune`,
    :func:`jft.merge.evaluate_points`) and learned (:func:`jft.merge.learn_coefficients`). Raises ``ValueError`` for a stack
    without coefficients, or with another number of layers.
    """
    counts = _numbered_layers(tau)

    def of_stack(name: str, count: int) -> Array:
        name = name.rstrip("/_")
        values = coefficients.get(name) if isinstance(coefficients, Mapping) else coefficients
        if values is None:
            raise ValueError(f"there are no coefficients of {name!r}, only of {', '.join(coefficients)}")
        if np.shape(values) != (count,):
            raise ValueError(f"{name!r} has {count} layers; its coefficients have shape {np.shape(values)}")
        return jnp.asarray(values, jnp.float32)

    def scaled(path: str, change: delta.Encoding) -> delta.Encoding:
        layer, stack = tree.layer_of(path), tree.stack_of(path)
        if layer is not None:
            name = _unnumbered(layer[0])
            return change.scaled(of_stack(name, counts[name])[layer[1]])
        return change.scaled(outside) if stack is None else _by_layer(change, of_stack(stack, change.shape[0]))

    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((coefficients, outside)))
    values = {} if traced else {"coefficients": coefficients, "outside": outside}
    return tau.map(scaled, "layerwise", **jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), values))


def with_lines(rule: Callable[..., TaskVector], beta: float, alpha: float | None = None) -> Callable[..., TaskVector]:
    """``rule`` followed by :func:`lines`: called as the rule is, with the same arguments.

    alpha: None is that of the paper for merged vectors, ``|sum_i tau_i|_1 / |merged|_1 / N``: layers of the least depth are
    as large as in the mean of the vectors, whatever the rule. beta is searched. A merged vector of zeros stays.
    """

    def merge(vectors: Vectors, *args: Any, **options: Any) -> TaskVector:
        taus = listed(vectors)
        merged = rule(taus, *args, **options)
        first = alpha
        if first is None:
            size = _l1(merged)
            first = _l1(TaskVector.combine(taus, [1.0] * len(taus))) / size / len(taus) if size else 0.0
        return lines(merged, first, beta)

    return merge


def _by_layer(change: delta.Encoding, scales: Array) -> delta.Encoding:
    """A change ``[L, ...]`` times ``scales [L]``."""
    expanded = lambda x: scales.reshape(-1, *(1,) * (x.ndim - 1))
    if isinstance(change, delta.Sum):
        return dataclasses.replace(change, parts=tuple(_by_layer(part, scales) for part in change.parts))
    if isinstance(change, delta.LowRank) and change.b.ndim > 2:
        return delta.LowRank(change.a, change.b * expanded(change.b))
    if isinstance(change, delta.Rows):
        by_row = scales[change.indices].reshape(-1, *(1,) * (change.values.ndim - 1))
        return dataclasses.replace(change, values=change.values * by_row)
    if isinstance(change, delta.Entries):
        # Rows of entries are counted through all layers.
        rows_per_layer = math.prod(change.shape[1:-1])
        return dataclasses.replace(change, values=change.values * scales[change.rows // rows_per_layer])
    dense = change.dense()
    return delta.Dense(dense * expanded(dense))


def _numbered_layers(tau: TaskVector) -> dict[str, int]:
    """How many layers there are whose numbers stand in paths, by the path without the number."""
    counts: dict[str, int] = {}
    # A last layer that did not change is known to the base alone.
    for path in [*tau.paths, *tau.manifest.get("base", {}).get("leaves", ())]:
        layer = tree.layer_of(path)
        if layer is not None:
            name = _unnumbered(layer[0])
            counts[name] = max(counts.get(name, 0), layer[1] + 1)
    return counts


def _unnumbered(prefix: str) -> str:
    return re.sub(r"\d+$", "", prefix)


def _l1(tau: TaskVector) -> float:
    return sum(float(jnp.sum(jnp.abs(change.dense()))) for _, change in tau.items())
