"""GreenTrainer: the tensors that lower the loss most within a fraction of the FLOPs of a full step."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.methods import Card
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

    Importance of a tensor is ``-sum(g * dw)``, dw the first step of the run's optimizer on the next batch and g the mean
    gradient of ``batches`` batches, from that one on, at the weights after it. Costs are those of
    :mod:`jft.select.backward`; the choice is by :class:`jft.select.budget.Flops`. of: whether ``fraction`` is of the whole
    step, forward pass included, or of the backward pass.
    """

    fraction: float
    batches: int = 1
    of: Literal["step", "backward"] = "step"
    resolution: int = 1000
    from_data = True

    def __call__(self, calibration: Calibration) -> Table:
        chain = backward.chain(calibration)
        worth = importance(calibration, self.batches)
        gains = [float(worth[t.path][t.layer]) if t.path in worth else 0.0 for t in chain]
        share = self.fraction
        if self.of == "step":
            # Nothing is passed on below the lowest tensor, the last of the chain.
            full = sum(t.weight for t in chain) + sum(t.passing for t in chain[:-1])
            forward = backward.forward(chain)
            # The forward pass is always paid, so what is left of the fraction goes to the backward pass.
            share = (self.fraction * (forward + full) - forward) / full
            if share <= 0:
                least = forward / (forward + full)
                raise ValueError(
                    f"fraction is {self.fraction}, and the forward pass alone is {least:.2f} of a full step"
                )
        plan = Flops(share, self.resolution).plan(gains, [t.weight for t in chain], [t.passing for t in chain])
        table: dict[str, Any] = {}
        for i in plan:
            if gains[i] > 0:
                tensor = chain[i]
                layered = tree.stack_of(tensor.path) is not None
                table[tensor.path] = sorted([*table.get(tensor.path, []), tensor.layer]) if layered else None
        if not table:
            raise ValueError(f"no tensor that would lower the loss fits into {self.fraction} of a step; give more")
        return table


def importance(calibration: Calibration, batches: int = 1) -> dict[str, np.ndarray]:
    """``{path: -sum(g * dw)}`` of every tensor, ``[L]`` or ``[1]``: how much the loss would fall, to first order.

    dw is the first step of the run's optimizer, g the mean gradient of ``batches`` batches after it, the step's own first.
    """
    after = calibration.tuned(1)
    gradient = calibration.at(after).gradient(batches)
    return {
        p: _lowering(gradient[p], after[p], calibration.params[p], tree.stack_of(p) is not None)
        for p in calibration.paths
    }


def _lowering(gradient: Array, after: Array, before: Array, layered: bool) -> np.ndarray:
    moved = after.astype(jnp.float32) - before.astype(jnp.float32)
    axes = tuple(range(1 if layered else 0, gradient.ndim))
    # Weights outside layers give a scalar, which is indexed like a layer 0.
    return np.atleast_1d(np.asarray(-jnp.sum(gradient * moved, axis=axes), np.float64))


CARD = Card(
    formula="maximise sum of -sum(g dw) over the tensors that train, subject to their FLOPs <= rho of a full step; dw the "
    "optimizer's step on a batch, g the gradient of the same batch after it",
    follows="the authors' code for importance (the paper writes g dw of one update), budget and rounding to a thousandth",
    check="importance from float64 gradients and Adam, costs written out, the choice by exhaustive search; steps of Adam",
    code="pittisl/GreenTrainer@7b7a9fe, decoder_lm/train.py and decoder_lm/tensor_selector.py",
    departs="dw is the step of a fresh optimizer; the code's has run before when it decides again, and keeps the moments of "
    "its two trial steps. The first decision is the same. A rho below the forward pass is refused, where the code takes .05 "
    "of the backward pass. every=0 decides once",
    defaults={"fraction": ("-", 0.5), "every": ("an epoch", "2 epochs"), "batches": ("-", 1), "of": ("-", "step")},
)


@register("green_trainer", paper="Huang et al. 2023, arXiv:2309.13192", card=CARD)
def green_trainer(
    fraction: float = 0.5,
    every: int = 0,
    batches: int = 1,
    of: Literal["step", "backward"] = "step",
) -> Method:
    """Train the tensors that lower the loss most within a fraction of the FLOPs of a full step.

    Importance is ``-sum(g * dw)``, dw what a fresh optimizer makes of one step on the next batch and g the gradient after
    it (of ``batches`` batches, from that one on); the choice is exact but for the rounding of costs to a thousandth of the
    budget. every: steps between decisions (the paper's epoch), with moments of what stays carried
    over and what is dropped kept as it is; 0 decides once. of: whether ``fraction`` counts the forward pass, as the paper's
    rho does. A tensor is one weight of one layer. Models with one stack of layers.
    """
    green = Green(fraction, batches, of)
    schedule = Decided(green, every) if every else None
    return Method(Select(layers=green), InPlace(), schedule=schedule)
