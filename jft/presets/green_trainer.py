"""GreenTrainer: the tensors that lower the loss most within a fraction of the FLOPs of a full step."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.methods.layer_schedules import Decided
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import backward
from jft.select.budget import Flops
from jft.select.calibration import Calibration
from jft.select.layers import Choice, Table

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Green(Choice):
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
    from_data = True

    def __call__(self, calibration: Calibration) -> Table:
        chain = backward.chain(calibration)
        gradient, after = calibration.gradient(self.batches), calibration.tuned(1)
        worth = {
            p: _lowering(gradient[p], after[p], calibration.params[p], tree.stack_of(p) is not None)
            for p in calibration.paths
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


@register("green_trainer", paper="Huang et al. 2023, arXiv:2309.13192")
def green_trainer(
    fraction: float = 0.5,
    every: int = 0,
    batches: int = 1,
    of: Literal["step", "backward"] = "step",
) -> Method:
    """Train the tensors that lower the loss most within a fraction of the FLOPs of a full step.

    Importance is ``-sum(g * dw)``, dw what the optimizer makes of one step; the choice is exact but for the rounding of costs
    to a thousandth of the budget. every: steps between decisions (the paper's epoch), with moments of what stays carried
    over and what is dropped kept as it is; 0 decides once. of: whether ``fraction`` counts the forward pass, as the paper's
    rho does. A tensor is one weight of one layer. Models with one stack of layers.
    """
    green = Green(fraction, batches, of)
    schedule = Decided(green, every) if every else None
    return Method(Select(layers=green), InPlace(), schedule=schedule)
