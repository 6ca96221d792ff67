"""The diagonal of the Fisher information of classifiers, exact, and what is computed in its place elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft import tree

Array = jax.Array
Labels = Literal["expected", "sampled", "data"]
Logits = Callable[[Any, Any], Array]


def fisher_diagonal(
    logits: Logits,
    params: Any,
    batches: Iterable[Any],
    *,
    labels: Labels = "expected",
    field: str = "labels",
    chunk: int = 1,
    key: Array | None = None,
) -> dict[str, Array]:
    """``{path: mean over examples of E_y (d log p(y|x) / d w)^2}``, float32, from one gradient per example and class.

    logits: ``logits(params, batch) -> [B, C]``. Every array of a batch has the examples first. labels: the expectation is over
    the model's own prediction, ``expected``: exact, C backward passes an example (Matena and Raffel 2022, arXiv:2111.09832, and
    what "Fisher information" is); ``sampled``: one draw of it an example, by ``key``; or y is that of the ``data``, in
    ``batch[field]``: the empirical Fisher information, another quantity, which vanishes where the model is right. chunk:
    examples whose gradients are held at once. Of jft's models and their objectives the ``squares`` of a calibration give
    the last two, in fewer passes. Raises ``ValueError`` for unknown labels and for no batches.
    """
    if labels not in ("expected", "sampled", "data"):
        raise ValueError(f"labels is {labels!r}; choose one of expected, sampled, data")
    if labels == "sampled" and key is None:
        raise ValueError("labels='sampled' draws; give a key")

    @jax.jit
    def add(total: Any, params: Any, batch: Any, key: Any) -> Any:
        size = jax.tree.leaves(batch)[0].shape[0]
        together = math.gcd(size, chunk)
        parts = jax.tree.map(lambda x: x.reshape(size // together, together, *x.shape[1:]), batch)
        keys = None if key is None else jax.random.split(key, size).reshape(-1, together)

        def step(total: Any, part: Any) -> tuple[Any, None]:
            squares = jax.vmap(lambda x, k: _squares(logits, params, x, labels, field, k))(*part)
            return jax.tree.map(lambda a, x: a + jnp.sum(x, axis=0), total, squares), None

        return jax.lax.scan(step, total, (parts, keys))[0]

    total, count = _zeros(params), 0
    for i, batch in enumerate(batches):
        total = add(total, params, batch, None if key is None else jax.random.fold_in(key, i))
        count += jax.tree.leaves(batch)[0].shape[0]
    return _mean(total, count)


def _squares(logits: Logits, params: Any, example: Any, labels: str, field: str, key: Any) -> Any:
    """Squared gradients of one example, the expectation over its label taken."""
    log_p, pullback = jax.vjp(
        lambda p: jax.nn.log_softmax(logits(p, jax.tree.map(lambda x: x[None], example))[0].astype(jnp.float32)), params
    )
    square = lambda y: jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), pullback(_one_hot(y, log_p))[0])
    if labels == "data":
        return square(example[field])
    if labels == "sampled":
        return square(jax.random.categorical(key, log_p))

    def step(total: Any, y: Array) -> tuple[Any, None]:
        return jax.tree.map(lambda a, x: a + jnp.exp(log_p[y]) * x, total, square(y)), None

    return jax.lax.scan(step, _zeros(params), jnp.arange(len(log_p)))[0]


def squared_batch_sums(logits: Logits, params: Any, batches: Iterable[Any]) -> dict[str, Array]:
    """``{path: sum over batches of (d/dw sum_b sum_y sqrt(p_by) log p_by)^2 / examples}``, p held constant in the root.

    What MergeLM (yule-BUAA) and FusionBench merge by as "Fisher weights": one backward pass a batch. The square of the sum has
    the products of different examples and classes, which the diagonal of the Fisher information has not, and depends on how
    the data are cut into batches. ``logits`` and batches as in :func:`fisher_diagonal`.
    """

    def objective(params: Any, batch: Any) -> Array:
        log_p = jax.nn.log_softmax(logits(params, batch).astype(jnp.float32))
        return jnp.sum(jnp.exp(jax.lax.stop_gradient(log_p) / 2) * log_p)

    @jax.jit
    def add(total: Any, params: Any, batch: Any) -> Any:
        gradient = jax.grad(objective)(params, batch)
        return jax.tree.map(lambda a, g: a + jnp.square(g.astype(jnp.float32)), total, gradient)

    total, count = _zeros(params), 0
    for batch in batches:
        total = add(total, params, batch)
        count += jax.tree.leaves(batch)[0].shape[0]
    return _mean(total, count)


def _one_hot(y: Array, like: Array) -> Array:
    return jax.nn.one_hot(y, like.shape[0], dtype=like.dtype)


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)


def _mean(total: Any, count: int) -> dict[str, Array]:
    if not count:
        raise ValueError("there are no batches to compute Fisher information from")
    return {path: x / count for path, x in tree.flatten(total).items()}
