"""Update rules: what is done to gradients before the optimizer, and to values after it, at every step.

A rule is a frozen dataclass, given as ``Method(rule=...)``. Its memory, a pytree of arrays, is part of the run's state. What
the rules here choose changes at every step, so gradients and the optimizer's state are those of everything that may train.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jft.select.budget import Globally
from jft.select.probe import Probe, lead
from jft.select.threshold import top_each

Array = jax.Array
Values = Mapping[str, Any]


class Rule:
    """Does nothing; subclasses replace what they change.

    to_base: whether the step also computes the gradient toward the base's own predictions, for :meth:`join`.
    """

    to_base: ClassVar[bool] = False

    def join(self, key: Array, gradient: Values, anchor: Values) -> Values:
        """The gradient to go on with, from that of the loss (penalties included) and ``anchor``, that toward the base.

        The loss of the anchor is the cross entropy to the base's predictions. key: of the step's noise.
        """
        return gradient

    def init(self, trained: Values) -> Any:
        """The memory before the first step; None for a rule without."""
        return None

    def measure(self, plan: Any, probe: Probe, memory: Any) -> Any:
        """The memory of a run that starts, from what the base and the first batches say; None for that of :meth:`init`."""
        return None

    def gradient(self, plan: Any, kept: Values, trained: Values, gradient: Values, memory: Any) -> tuple[Any, Any]:
        """``(gradient, memory)``, before the optimizer. ``gradient``: that of the whole batch, penalties included."""
        return gradient, memory

    def values(self, plan: Any, kept: Values, trained: Values, memory: Any) -> tuple[Any, Any]:
        """``(trained, memory)``, after the update."""
        return trained, memory


def _each(plan: Any, function: Callable[..., Array], *values: Values) -> dict[str, Any]:
    """``function(lead, leaf, ...)`` of every leaf that trains; its first ``lead`` axes stack matrices or vectors."""

    def one(path: str) -> Any:
        stacked = lambda x, *rest: function(lead(path, x.ndim, plan.structured), x, *rest)
        return jax.tree.map(stacked, *(v[path] for v in values))

    return {path: one(path) for path in values[0]}


@dataclasses.dataclass(frozen=True)
class TopGradient(Rule):
    """Of the gradient of each matrix and vector only the ``density`` of entries that are largest in size.

    Which these are changes from step to step (GMT, Li et al. 2024, arXiv:2406.15330). Counts are rounded to the nearest,
    at least one; ties go to earlier positions.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what is no density."""
        self._count(1)

    def _count(self, size: int) -> int:
        return Globally(density=self.density, round="nearest").units(size, 1, "a gradient")

    def gradient(self, plan: Any, kept: Values, trained: Values, gradient: Values, memory: Any) -> tuple[Any, Any]:
        """The gradient with zeros at all other entries."""

        def largest(lead: int, g: Array) -> Array:
            count = self._count(math.prod(g.shape[lead:]))
            return jnp.where(top_each(jnp.abs(g), count, lead), g, 0.0)

        return _each(plan, largest, gradient), memory


@dataclasses.dataclass(frozen=True)
class Importance(Rule):
    """Values are drawn back to the base where they matter more to it than to the task: ``(1 - v) theta0 + v theta``.

    Within each matrix and vector let ``r(x) = sigmoid((|x| - mean |x|) / std |x|)``, and G the sum of all gradients so far.
    ``v = r(G) / (r(theta0) + r(G))`` where r(G) > r(theta0), else 0; divided by the mean of those above 0, and at most 1
    (SPIDER, Huang et al. 2024, arXiv:2411.10928). std is that of the population. Memory: G, float32.
    """

    def init(self, trained: Values) -> Any:
        """No gradient so far."""
        return jax.tree.map(jnp.zeros_like, trained)

    def gradient(self, plan: Any, kept: Values, trained: Values, gradient: Values, memory: Any) -> tuple[Any, Any]:
        """The gradient, remembered."""
        return gradient, jax.tree.map(jnp.add, memory, gradient)

    def values(self, plan: Any, kept: Values, trained: Values, memory: Any) -> tuple[Any, Any]:
        """The values with the base's share put back; exactly the base where v is 0."""
        # The change of nothing is minus the base.
        base = plan.change(kept, jax.tree.map(jnp.zeros_like, trained))
        return _each(plan, _projected, trained, base, memory), memory


def _projected(lead: int, now: Array, minus: Array, total: Array) -> Array:
    share = soft_share(-minus, total, lead)
    return jnp.where(share > 0, -(1 - share) * minus + share * now, -minus)


def soft_share(base: Array, total: Array, lead: int) -> Array:
    """v of :class:`Importance` for weights ``base`` and summed gradients ``total``; the first ``lead`` axes are apart."""
    axes = tuple(range(lead, base.ndim))
    ours, theirs = _rank(total, axes), _rank(base, axes)
    share = jnp.where(ours > theirs, ours / (ours + theirs), 0.0)
    above = jnp.sum(share > 0, axis=axes, keepdims=True)
    mean = jnp.sum(share, axis=axes, keepdims=True) / jnp.maximum(above, 1)
    return jnp.minimum(share / jnp.where(above > 0, mean, 1.0), 1.0)


def _rank(x: Array, axes: tuple[int, ...]) -> Array:
    size = jnp.abs(x.astype(jnp.float32))
    spread = jnp.std(size, axis=axes, keepdims=True)
    centred = size - jnp.mean(size, axis=axes, keepdims=True)
    return jax.nn.sigmoid(centred / jnp.where(spread > 0, spread, 1.0))
