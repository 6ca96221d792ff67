"""A soft mask: gradients are scaled down where a unit matters to what the model knew."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import tree
from jft.methods.rules import Rule
from jft.select import agreement
from jft.select.probe import Probe

Array = jax.Array
# The pattern of a weight in its layer, the unit whose importance scales it, and the axis of the unit, from the end.
UNITS = (
    (r"mlp/(?:up|gate)/(?:w|b)", "mlp/channels", -1),
    (r"mlp/down/(?:w|b)", "mlp/outputs", -1),
    (r"attn/q/(?:w|b)", "attn/heads", -1),
    (r"attn/(?:k|v)/(?:w|b)", "attn/kv_heads", -1),
    (r"attn/o/w", "attn/heads", -2),
)


def _unit(path: str) -> tuple[str, int] | None:
    """The name of the unit that scales a weight, and its axis."""
    stack = tree.stack_of(path)
    if stack is None:
        return None
    inside = path.removeprefix(f"{stack}/")
    return next(((f"{stack}/{name}", axis) for pattern, name, axis in UNITS if re.fullmatch(pattern, inside)), None)


@dataclasses.dataclass(frozen=True)
class SoftMask(Rule):
    """Gradients times ``1 - importance`` of the unit they belong to (Zhang et al. 2024, arXiv:2404.10306).

    Columns of up and gate go by the MLP's channel, those of down by the output, columns of q, k, v and rows of o by the head
    (keys and values by the most important query head that reads them); whatever else trains is left alone. Importance:
    :func:`jft.select.agreement.importance`, over ``batches`` with ``dropout``, once, at the base. Memory: ``1 -
    importance`` for each unit.
    """

    batches: int = 8
    dropout: float = 0.1

    def init(self, trained: Mapping[str, Any]) -> Any:
        """Ones."""
        found = {p: _unit(p) for p in trained}
        return {p: jax.tree.map(lambda x, u=u: _ones(x, u[1]), trained[p]) for p, u in found.items() if u}

    def measure(self, plan: Any, probe: Probe, memory: Any) -> Any:
        """What the base says of its units."""
        found = agreement.importance(probe, self.batches, self.dropout)
        out = {}
        for path in memory:
            name, axis = _unit(path) or ("", -1)
            shape = probe.params[path].shape
            importance = found[name]
            scale = 1.0 - jnp.repeat(importance, shape[axis] // importance.shape[1], axis=1)
            dense = jnp.expand_dims(scale, -3 - axis) if len(shape) > 2 else scale
            out[path] = plan.leaves[path].collect(None, dense)
        return out

    def gradient(self, plan: Any, kept: Any, trained: Any, gradient: Any, memory: Any) -> tuple[Any, Any]:
        """The gradient, scaled."""
        scaled = {p: jax.tree.map(jnp.multiply, gradient[p], memory[p]) for p in memory}
        return {**gradient, **scaled}, memory


def _ones(x: Array, axis: int) -> Array:
    """Ones for each unit along ``axis`` of ``x[l, I, O]`` or ``[l, O]``."""
    if x.ndim == 2:
        return jnp.ones_like(x)
    return jnp.ones((x.shape[0], 1, x.shape[2]) if axis == -1 else (x.shape[0], x.shape[1], 1), x.dtype)
