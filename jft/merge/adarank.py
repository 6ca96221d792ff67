"""AdaRank: which singular components of each task vector to merge, learned from the entropy of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft.delta import TaskVector
from jft.merge import learned
from jft.merge.rule import Vectors, in_range, listed

Array = jax.Array
# The mean of the models, where vectors are those of it; and the vectors [N, ...], or their factors U, s, V^T.
Parts = tuple[Array | None, tuple[Array, ...]]
# Half of what a logit has to move to change a mask, as in the released code.
START = 0.1


def adarank(
    vectors: Vectors,
    *,
    base: Any,
    objective: learned.Objective,
    batches: Iterable[Any],
    data: str,
    init: float = 0.3,
    density: float = 1.0,
    temperature: float = 10.0,
    centred: bool = False,
    learning_rate: float = 1e-3,
    steps: int = 10_000,
    scale: Any = 1.0,
) -> TaskVector:
    """``sum_i c_i U_i diag(m_i s_i) V_i^T`` in every matrix, ``sum_i c_i tau_i`` elsewhere; masks m and coefficients c learned.

    ``tau_i = U_i diag(s_i) V_i^T``; ``m = [sigmoid(l / temperature) > 1/2]``, one bit for every singular component of every
    matrix (those of stacks of layers and experts apart), with the straight-through gradient: that of ``sigmoid(l /
    temperature)`` in its place. Logits start at 0.1 for the first ``int(density rank)`` components and -0.1 for the others,
    of which none takes part until its logit turns. Coefficients, one for each task and tensor, start at ``init``; both train
    by Adam with one learning rate. centred: task vectors are those of the average of all models, which is added ("AdaRank +
    CART" of the paper; its configuration for 8 tasks of ViT-B/32 has init 2.3 and density 0.16 there). objective: of the
    paper, :func:`jft.merge.entropy` of one function per task. data: a name for what ``batches`` hold, for the manifest, which
    tells how many components remain, by path and task. Lee et al. 2025, arXiv:2503.22178; released code david3684/AdaRank,
    which masks matrices of attention and MLP alone: leave others out by ``tau.exclude``. Raises ``ValueError`` for options
    out of range, and as :func:`jft.merge.learned.learn` does.
    """
    learned.check_data(data)
    in_range("density", density, 0, 1)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    taus = listed(vectors)
    shapes = learned.shapes_of(taus)
    parts: dict[str, Parts] = {}
    values: dict[str, Any] = {}
    for path, shape in shapes.items():
        deltas, stack = learned.dense(taus, path), learned.stack_of(path, shape)
        mean = jnp.mean(deltas, axis=0) if centred else None
        deltas = deltas - mean if mean is not None else deltas
        matrix = len(shape) - len(stack) == 2
        factors = tuple(jnp.linalg.svd(deltas, full_matrices=False)) if matrix else (deltas,)
        parts[path] = (mean, factors)
        logits = {"logits": _start(factors[1].shape, density)} if matrix else {}
        values[path] = {"coefficients": jnp.full((len(taus), *stack), init, jnp.float32), **logits}

    def change(values: Any, parts: Any) -> learned.Deltas:
        return {path: _merged(value, parts[path], temperature) for path, value in values.items()}

    how = {"base": base, "objective": objective, "batches": batches, "steps": steps}
    solution = learned.learn(change, values, parts, optimizer=optax.adam(learning_rate), **how)
    note = {
        "centred": centred,
        "density": density,
        "temperature": temperature,
        "components": _components(solution.values),
    }
    deltas = jax.jit(change)(solution.values, parts)
    return learned.result(taus, deltas, solution, base=base, rule="adarank", data=data, scale=scale, **note)


def _start(shape: tuple[int, ...], density: float) -> Array:
    kept = jnp.arange(shape[-1]) < int(density * shape[-1])
    return jnp.broadcast_to(jnp.where(kept, START, -START), shape).astype(jnp.float32)


def _merged(value: Any, parts: Parts, temperature: float) -> Array:
    mean, factors = parts
    if len(factors) == 3:
        u, s, vt = factors
        kept = s * straight_through(value["logits"] / temperature)
        deltas = jnp.matmul(u * kept[..., None, :], vt, precision="highest")
    else:
        (deltas,) = factors
    total = jnp.sum(learned.over(value["coefficients"], deltas) * deltas, axis=0)
    return total if mean is None else mean + total


def straight_through(logits: Array) -> Array:
    """1 where ``sigmoid(logits) > 1/2``, else 0, with the derivative of the sigmoid."""
    soft = jax.nn.sigmoid(logits)
    return soft + jax.lax.stop_gradient((soft > 0.5).astype(soft.dtype) - soft)


def _components(values: Any) -> dict[str, list]:
    """How many components remain, by path: for every task, in every layer."""
    logits: Sequence[tuple[str, Array]] = [(p, v["logits"]) for p, v in values.items() if "logits" in v]
    return {p: jnp.sum(x > 0, axis=-1).tolist() for p, x in logits}
