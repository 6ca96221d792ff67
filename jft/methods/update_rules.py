"""Update rules: what is done to gradients before the optimizer, and to values after it, at every step.

A rule is a frozen dataclass, given as ``Method(rule=...)``. Its memory, a pytree of arrays, is part of the run's state. What
a rule chooses may change at every step, so gradients and the optimizer's state are those of everything that may train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax

from jft.select.calibration import Calibration
from jft.tree import lead

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

    def start(self, memory: Any, steps: int) -> Any:
        """The memory of a run of ``steps`` updates before the first of them, from that of :meth:`init`."""
        return memory

    def measure(self, plan: Any, calibration: Calibration, memory: Any) -> Any:
        """The memory of a run that starts, from what the base and the first batches say; None for that of :meth:`init`."""
        return None

    def gradient(self, plan: Any, kept: Values, trained: Values, gradient: Values, memory: Any) -> tuple[Any, Any]:
        """``(gradient, memory)``, before the optimizer. ``gradient``: that of the whole batch, penalties included."""
        return gradient, memory

    def values(self, plan: Any, kept: Values, trained: Values, memory: Any) -> tuple[Any, Any]:
        """``(trained, memory)``, after the update."""
        return trained, memory


def each_leaf(plan: Any, function: Callable[..., Array], *values: Values) -> dict[str, Any]:
    """``function(lead, leaf, ...)`` of every leaf that trains; its first ``lead`` axes stack matrices or vectors."""

    def one(path: str) -> Any:
        stacked = lambda x, *rest: function(lead(path, x.ndim, plan.structured), x, *rest)
        return jax.tree.map(stacked, *(v[path] for v in values))

    return {path: one(path) for path in values[0]}
