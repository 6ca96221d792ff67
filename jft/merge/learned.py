"""Merging whose coefficients are learned: gradient descent on an objective of the merged model, from few or unlabelled data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jft import tree
from jft.delta import Dense, TaskVector
from jft.delta import manifest as manifests
from jft.delta.numeric import wide
from jft.merge.in_memory import stack_axes

Array = jax.Array
Deltas = dict[str, Array]
Objective = Callable[[Any, Any], Array]
Apply = Callable[[Any, Any], Array]


@dataclasses.dataclass(frozen=True)
class Learned:
    """What :func:`learn` ends with: the values, and the objective before each step, ``losses[steps]``."""

    values: Any
    losses: np.ndarray


def learn(
    change: Callable[[Any, Any], Deltas],
    values: Any,
    held: Any,
    *,
    base: Any,
    objective: Objective,
    batches: Iterable[Any],
    optimizer: optax.GradientTransformation,
    steps: int,
) -> Learned:
    """``values`` after ``steps`` steps of ``optimizer`` on ``objective(base + change(values, held), batch)``.

    change: ``change(values, held) -> {path: delta}``, differentiable in the values; held: arrays it needs that do not
    train (task vectors: a :class:`jft.delta.TaskVector` is a pytree, and its encodings become dense only inside the step).
    objective: ``objective(params, batch) -> scalar``, as :func:`entropy` or :func:`cross_entropy` make it. batches: a list,
    read again and again, or an iterator of enough of them. The parameters are those of ``base`` in its dtypes, summed in
    float32 and rounded once, as :func:`jft.delta.apply` does. Raises ``ValueError`` for no batches or too few, and where the
    objective is not finite.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")

    @jax.jit
    def step(values: Any, state: Any, held: Any, base: Any, batch: Any) -> tuple[Any, Any, Array]:
        of = lambda values: objective(added(base, change(values, held)), batch)
        loss, gradient = jax.value_and_grad(of)(values)
        updates, state = optimizer.update(gradient, state, values)
        return optax.apply_updates(values, updates), state, loss

    state, losses = optimizer.init(values), []
    for _, batch in zip(range(steps), _cycled(batches, steps), strict=True):
        values, state, loss = step(values, state, held, base, batch)
        losses.append(loss)
    # Read once, at the end: each step would else wait for the host.
    curve = np.asarray(jnp.stack(losses), np.float64)
    if not np.isfinite(curve).all():
        first = int(np.flatnonzero(~np.isfinite(curve))[0])
        raise ValueError(f"the objective is {curve[first]} at step {first}; look at the batches and the learning rate")
    return Learned(values, curve)


def _cycled(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """``steps`` batches, those of a list or a loader again and again."""
    taken = 0
    while taken < steps:
        before = taken
        for batch in batches:
            yield batch
            taken += 1
            if taken == steps:
                return
        if taken == before:
            raise ValueError(f"there are {taken} batches, and {steps} steps; give more, or a list, which is read again")


def added(base: Any, deltas: Deltas) -> Any:
    """``base + deltas`` in the dtypes of ``base``."""
    flat = tree.flatten(base)
    missing = [path for path in deltas if path not in flat]
    if missing:
        raise ValueError(f"a task vector changes {missing[0]!r}, which the base does not have")
    return tree.like(base, flat | {p: (wide(flat[p]) + d).astype(flat[p].dtype) for p, d in deltas.items()})


def entropy(apply: Apply | Mapping[str, Apply], field: str | None = None) -> Objective:
    """The objective ``mean over examples of -sum_y p(y|x) log p(y|x)``, which needs no labels.

    apply: ``apply(params, batch) -> logits [..., C]``; or one function per task, a batch then being ``{task: its batch}`` and
    the objective the sum over tasks, as in AdaMerging (Yang et al. 2024, arXiv:2310.02575), whose tasks have heads of their
    own. field: of the batch, weights of the examples, 0 or 1 (``valid``).
    """

    def loss(logits: Array, batch: Any) -> Array:
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        return _mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), batch, field)

    return _of_tasks(apply, loss)


def cross_entropy(apply: Apply | Mapping[str, Apply], labels: str = "labels", field: str | None = None) -> Objective:
    """The objective ``mean over examples of -log p(label|x)``; ``apply`` and ``field`` as in :func:`entropy`."""

    def loss(logits: Array, batch: Any) -> Array:
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        return _mean(-jnp.take_along_axis(log_p, batch[labels][..., None], axis=-1)[..., 0], batch, field)

    return _of_tasks(apply, loss)


def _mean(losses: Array, batch: Any, field: str | None) -> Array:
    if field is None:
        return jnp.mean(losses)
    weights = batch[field].astype(jnp.float32)
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1.0)


def _of_tasks(apply: Any, loss: Callable[[Array, Any], Array]) -> Objective:
    if not isinstance(apply, Mapping):
        return lambda params, batch: loss(apply(params, batch), batch)

    def objective(params: Any, batch: Any) -> Array:
        missing = sorted(set(apply) ^ set(batch))
        if missing:
            raise ValueError(f"the batch and the functions must be of the same tasks; {missing[0]!r} is in one alone")
        return jnp.asarray(sum(loss(f(params, batch[task]), batch[task]) for task, f in apply.items()))

    return objective


def dense(taus: Sequence[TaskVector], path: str) -> Array:
    """``[N, ...]`` float32, the delta of a path in every vector, 0 where it has none; traced, encodings are opened here."""
    shape = next(tau[path].shape for tau in taus if path in tau)
    return jnp.stack([tau[path].dense().astype(jnp.float32) if path in tau else jnp.zeros(shape) for tau in taus])


def shapes_of(taus: Sequence[TaskVector]) -> dict[str, tuple[int, ...]]:
    """``{path: shape}`` of all paths of the vectors; ``ValueError`` for changes that are relative to the base."""
    for tau in taus:
        if tau.relative:
            raise ValueError(
                "coefficients of masks and gates are not learned; resolve the vectors first: tau.resolve(base)"
            )
    return {path: tuple(delta.shape) for tau in taus for path, delta in tau.items()}


def stack_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of layers and experts that lead a path: every tensor in them has a coefficient of its own."""
    return shape[: stack_axes(path, len(shape))]


def over(coefficients: Array, like: Array) -> Array:
    """``[N, *stack]`` with axes of size one, to be multiplied with ``like[N, *stack, ...]``."""
    return coefficients.reshape(*coefficients.shape, *(1,) * (like.ndim - coefficients.ndim))


def result(
    taus: Sequence[TaskVector],
    deltas: Mapping[str, Array],
    learned: Learned,
    *,
    base: Any,
    rule: str,
    data: str,
    scale: Any,
    **note: Any,
) -> TaskVector:
    """The merged task vector; its manifest tells the rule, what data were looked at, and the objective before and after."""
    # Once for all vectors: it reads every weight.
    manifests.verify({"base": manifests.common_base(tau.manifest for tau in taus)}, base)
    losses = {"first": float(learned.losses[0]), "last": float(learned.losses[-1]), "steps": len(learned.losses)}
    manifest = manifests.derive([t.manifest for t in taus], "merge", rule=rule, data=data, objective=losses, **note)
    return TaskVector({path: Dense(scale * x) for path, x in deltas.items()}, manifest)


def check_data(data: str, allow_test: bool = True) -> None:
    """``ValueError`` unless ``data`` names what is looked at; learning on test data without saying so is a usual mistake.

    allow_test: whether the name may say, by a word ``test``, that these are test data.
    """
    if not isinstance(data, str) or not data.strip():
        raise ValueError(
            f"data is {data!r}; name the data that the coefficients are learned on: data='mnist/train[:1%]'"
        )
    if not allow_test and re.search(r"(?<![a-z])test(s|ing|set)?(?![a-z])", data.lower()):
        raise ValueError(
            f"data is {data!r}: coefficients are not chosen on test data; name validation data, or say allow_test=True"
        )


def described(values: Any) -> Any:
    """Values as JSON holds them: lists of numbers by path."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64).round(7).tolist(), values)
