"""Evaluation: exact weighted means over all batches, by one compiled function per model and objective."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jft import parallel
from jft.compiled import program_cache
from jft.methods import Plan
from jft.train import feed
from jft.train.objectives import Objective
from jft.train.objectives import objective as find_objective
from jft.train.state import find_mesh
from jft.train.step import apply_for


# Bound by `partial` below: jit's cache knows a program by its function, and `sums` caches the partial.
def _sums(
    apply: Callable, objective: Objective, plan: Plan | None, dtype: Any, params: Any, batch: Any
) -> dict[str, Any]:
    # Without `key`: evaluation draws no noise.
    outputs = apply(params, batch) if plan is None else plan.outputs(apply, params[0], params[1], batch, dtype)
    return batch_sums(objective, outputs, batch)


def batch_sums(objective: Objective, outputs: Any, batch: Any) -> dict[str, Any]:
    """``{"loss", metrics..., "weight"}``, sums over the batch, some of them arrays; :func:`told` takes their totals."""
    loss, weight, sums = objective.loss(outputs, batch)
    counts = objective.counts(outputs, batch) if hasattr(objective, "counts") else {}
    return {"loss": loss, **sums, **counts, "weight": weight}


def total(before: Any, value: Any) -> Any:
    """``before + value`` in float64: a float, or an array."""
    whole = np.asarray(value, np.float64)
    return before + (float(whole) if whole.ndim == 0 else whole)


@program_cache
def sums(apply: Callable, objective: Objective, plan: Plan | None = None, dtype: Any = None) -> Callable:
    """Jitted ``(params, batch) -> {"loss", metrics..., "weight"}``, sums over the batch; equal arguments share one.

    With a plan, ``params`` are ``(kept, trained)``: the model under training is evaluated without being merged.
    """
    return jax.jit(functools.partial(_sums, apply, objective, plan, dtype))


def mean(
    compute: Callable,
    params: Any,
    batches: Iterable,
    objective: Objective,
    mesh: Any = None,
    limit: int = 0,
    model: Any = None,
) -> dict:
    """``sum of sums / sum of weights`` over ``batches`` (the first ``limit``, 0 for all), added in float64 on the host.

    model: whose tokens the batches hold. Raises ``ValueError`` where there is no batch, nothing in them counts, the objective
    refuses one, or the model has no such token.
    """
    # Python floats: a float32 sum over many batches would lose the last ones.
    totals: dict[str, Any] = {}
    for batch in itertools.islice(batches, limit) if limit else batches:
        batch = feed.host(batch)
        feed.check_ids(batch, model)
        objective.weight(batch, np)  # refuses on the host what the loss would take without a word
        batch = parallel.put_batch(batch, mesh) if mesh is not None else batch
        for name, value in jax.device_get(compute(params, batch)).items():
            totals[name] = total(totals.get(name, 0.0), value)
    # Divided once, so that a short last batch counts by its weight.
    return told(totals, objective)


def told(totals: dict[str, Any], objective: Objective) -> dict[str, float]:
    """Mean loss and metrics, from sums over all batches. Raises ``ValueError`` where nothing in them counts."""
    weight = totals.get("weight")
    # Also where there was no batch at all, and hence no "weight".
    if not weight:
        raise ValueError("evaluation has no batch, or none in which anything counts (loss mask, valid, labels)")
    return objective.report({name: value / weight for name, value in totals.items() if name != "weight"})


def evaluate(model: Any, params: Any, batches: Iterable, objective: Any = "lm", mesh: Any = None) -> dict[str, float]:
    """Loss and metrics of plain ``params`` over ``batches``, each target counting once, in whatever batch.

    model: a jft model or any ``apply(params, batch)``. objective: a name or an Objective. mesh: where the batches go;
    default that of the parameters. Returns ``{"loss", "accuracy", "perplexity" (tokens), ...}``.
    """
    objective = find_objective(objective)
    # Batches must lie on the devices of the parameters: jit refuses arrays on two sets of devices.
    mesh = mesh or find_mesh(params)
    return mean(sums(apply_for(objective, model, mesh), objective), params, batches, objective, mesh, model=model)
