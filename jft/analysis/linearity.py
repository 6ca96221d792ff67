"""The difference of a model from its linearization along a task vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import parallel, tangent
from jft.analysis.interpolation import grid, params_at, weighing
from jft.compiled import program_cache
from jft.delta import TaskVector
from jft.train import evaluation, feed
from jft.train.objectives import Objective
from jft.train.state import find_mesh
from jft.train.step import apply_of

GRID = grid(0, 1, 11)


def linearity(
    model: Any,
    params: Any,
    tau: TaskVector,
    batches: Iterable[Any],
    objective: Objective,
    grid: Sequence[float] = GRID,
) -> list[dict[str, Any]]:
    """A row for each coefficient ``a``: ``f(theta0 + a tau)`` against ``f_lin(a tau) = f(theta0) + a J tau``.

    error: ``||f - f_lin|| / ||f - f(theta0)||``, over the outputs that count; 0 where the model is linear along tau, and
    None where nothing moved. cosine: between the two changes of the outputs. agreement: the share of equal predictions.
    standard, linearized: dicts of loss and metrics of either. Norms are sums in float64 over batches; one tangent pass of
    each batch serves all coefficients.

    Raises ``ValueError`` for objectives whose examples have no prediction of their own, and data in which nothing counts.
    """
    mesh = find_mesh(params)
    apply = apply_of(model, mesh)
    f_lin = tangent.linearize(apply, params)
    program = _compare(apply, weighing(objective))
    totals: list[dict[str, Any]] = [{} for _ in grid]
    for batch in batches:
        host = feed.host(batch)
        feed.check_ids(host, model)
        # On the host the objective refuses a batch that it would take silently under jit.
        objective.weight(host, np)
        device_batch = parallel.put_batch(host, mesh)
        # One tangent pass serves every coefficient.
        f0, step = tangent.tangents(f_lin, [tau], device_batch)
        for a, total in zip(grid, totals, strict=True):
            sums = program(params_at(params, [tau], [a]), f0, step, jnp.float32(a), device_batch)
            _add(total, jax.device_get(sums))
    return [_row(float(a), total, objective) for a, total in zip(grid, totals, strict=True)]


@program_cache
def _compare(apply: Any, objective: Any) -> Any:
    """Jitted ``(params, f(theta0), J tau [1, ...], a, batch) -> sums over the batch``."""

    def run(params: Any, f0: Any, step: Any, a: Any, batch: Any) -> dict[str, Any]:
        y, linear = apply(params, batch), tangent.combined(f0, step, a[None])
        weights = objective.weights(batch)
        change, linear_change = (x.astype(jnp.float32) - f0.astype(jnp.float32) for x in (y, linear))
        each = {
            "apart": jnp.square(change - linear_change),
            "change": jnp.square(change),
            "straight": jnp.square(linear_change),
            "product": change * linear_change,
        }
        # An output is in a norm or not; how much it weighs is about the loss.
        counts = (weights > 0).astype(jnp.float32)[..., None]
        sums: dict[str, Any] = {name: jnp.sum(x * counts) for name, x in each.items()}
        agree = jnp.argmax(y, axis=-1) == jnp.argmax(linear, axis=-1)
        sums["same"] = jnp.sum(weights * agree)
        both = {
            name: evaluation.batch_sums(objective, x, batch) for name, x in (("standard", y), ("linearized", linear))
        }
        return {**sums, **both, "weight": both["standard"]["weight"]}

    return jax.jit(run)


def _add(total: dict[str, Any], sums: dict[str, Any]) -> None:
    for name, value in sums.items():
        if isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        else:
            total[name] = evaluation.total(total.get(name, 0.0), value)


def _row(a: float, total: dict[str, Any], objective: Objective) -> dict[str, Any]:
    # Refuses data in which nothing counts, before anything is divided by its weight.
    both = {name: evaluation.told(total[name], objective) for name in ("standard", "linearized")}
    weight = total["weight"]
    norms = (total["change"] * total["straight"]) ** 0.5
    # At the base nothing changes, whatever two programs round differently.
    return {
        "coefficient": a,
        "error": (total["apart"] / total["change"]) ** 0.5 if a and total["change"] else None,
        "cosine": total["product"] / norms if a and norms else None,
        "agreement": total["same"] / weight,
        **both,
    }
