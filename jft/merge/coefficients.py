"""Coefficients of any differentiable merge, learned by gradient descent, with or without a constraint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft.delta import TaskVector
from jft.merge import learned
from jft.merge.rule import Vectors, listed

Array = jax.Array


def learn_coefficients(
    merge: Callable[[Any, Sequence[TaskVector]], TaskVector],
    values: Any,
    vectors: Vectors,
    *,
    base: Any,
    objective: learned.Objective,
    batches: Iterable[Any],
    data: str,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 100,
    allow_test: bool = False,
) -> TaskVector:
    """``merge(values, vectors)`` with the values that gradient descent on ``objective`` arrives at.

    merge: ``merge(values, vectors) -> task vector``, traced and differentiable in the values, arrays in any pytree: weights
    of a rule, ``lambda w, taus: ties(taus, weights=w, scope="tensor")``; coefficients of layers
    (:func:`jft.merge.layerwise`); both. Masks and elections are constants to the gradient, as they are steps, and so is which
    singular values are zero; ``karcher`` has no gradient and says so. Rules that trim by whole model (``scope="model"``) want
    vectors whose values are known: let ``merge`` close over them; the program then holds them. values: where it begins.
    objective: ``objective(params, batch) -> scalar``: :func:`jft.merge.entropy`, :func:`jft.merge.cross_entropy`,
    :func:`constrained` for what must be kept. optimizer: by default Adam with a learning rate of 0.01.

    data: a name for what ``batches`` hold; the manifest has it, with the coefficients and the objective at the first and the
    last step. A name that says it is test data is refused without ``allow_test``. Raises ``ValueError`` as
    :func:`jft.merge.learned.learn` does; :class:`jft.delta.BaseMismatch` for another base than that of the vectors.
    """
    learned.check_data(data, allow_test)
    taus = listed(vectors)
    learned.shapes_of(taus)
    # The optimizer wants arrays, and weights are float32.
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)

    def change(values: Any, taus: Sequence[TaskVector]) -> learned.Deltas:
        return {path: delta.dense() for path, delta in merge(values, taus).items()}

    solution = learned.learn(
        change,
        start,
        taus,
        base=base,
        objective=objective,
        batches=batches,
        optimizer=optax.adam(1e-2) if optimizer is None else optimizer,
        steps=steps,
    )
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(solution.values)):
        raise ValueError(
            "the coefficients are not finite; is the rule differentiable, and the learning rate small enough?"
        )
    deltas = jax.jit(change)(solution.values, taus)
    note = {"rule": "learn_coefficients", "coefficients": learned.described(solution.values)}
    return learned.result(taus, deltas, solution, base=base, data=data, scale=1.0, **note)


def constrained(
    objective: learned.Objective, control: learned.Objective, least: float, penalty: float = 10.0
) -> learned.Objective:
    """``objective(params, batch["target"]) + penalty * max(0, least - control(params, batch["control"]))``.

    The constraint of negation, that control stays at 95% of the base's, for gradients. control: something differentiable
    that should stay high, as the mean probability of the right label, which is the accuracy of labels drawn from the model;
    least: 0.95 of its value at the base. penalty: how much of the objective one unit of control is worth; from some size
    on, the constraint holds where there is a minimum. A step may still violate it, and a batch is not the data: the
    constraint holds for sure only of what :func:`jft.merge.negation_search` then chooses on the line from the base to the
    result. Raises ``ValueError`` for a penalty that is not positive.
    """
    if not penalty > 0:
        raise ValueError(f"penalty must be positive, not {penalty}")

    def total(params: Any, batch: Any) -> Array:
        missing = {"target", "control"} - set(batch)
        if missing:
            raise ValueError(f"the batch of a constrained objective has target and control; it lacks {min(missing)!r}")
        violation = jnp.maximum(0.0, least - control(params, batch["control"]))
        return objective(params, batch["target"]) + penalty * violation

    return total
