"""Model soups: averages of models tuned from one base, of those that help or with weights that are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta import TaskVector, apply
from jft.delta.manifest import verify
from jft.merge.rule import Vectors, listed
from jft.merge.sums import average

if TYPE_CHECKING:
    import optax


def greedy_soup(
    base: Any, vectors: Vectors, evaluate: Callable[[Any], float], *, strict: bool = True, check: bool = True
) -> TaskVector:
    """The mean of the models that raise the held-out score of the mean, tried from the best of them to the worst.

    evaluate: parameters -> a score on held-out data, the higher the better. It is called ``2 N - 1`` times, with one set of
    merged parameters at a time. A model whose own score is no finite number is left out; equal scores are tried in the
    order of ``vectors``. strict: a mean of the same score as the last is refused, as released code does; False takes it, as
    the paper's algorithm does. The manifest says which went in (``ingredients``: names, or positions in a list) and the
    ``score``. check: verify that ``base`` is the base of the vectors. Wortsman et al. 2022, arXiv:2203.05482; released code
    mlfoundations/model-soups. Raises ``ValueError`` where no score is finite.
    """
    candidates = _named(vectors)
    _verify(base, candidates, check)

    def score(names: list[Any]) -> float:
        return float(evaluate(apply(base, average([candidates[name] for name in names]), check=False)))

    scores = {name: score([name]) for name in candidates}
    order = sorted((name for name in scores if np.isfinite(scores[name])), key=lambda name: -scores[name])
    if not order:
        raise ValueError(f"no model has a finite score: {list(scores.values())}")
    soup, best = order[:1], scores[order[0]]
    for name in order[1:]:
        new = score([*soup, name])
        if new > best or (new == best and not strict):
            soup, best = [*soup, name], new
    return _described(average([candidates[name] for name in soup]), rule="greedy_soup", ingredients=soup, score=best)


def learned_soup(
    base: Any,
    vectors: Vectors,
    objective: Callable[..., Any],
    *,
    batches: Iterable[Any] | None = None,
    steps: int = 100,
    optimizer: optax.GradientTransformation | None = None,
    check: bool = True,
) -> TaskVector:
    """``sum_i softmax(a)_i * vectors[i]`` with the ``a`` that a gradient descent on ``objective`` arrives at.

    objective: ``objective(params)``, or ``objective(params, batch)`` with ``batches``, a differentiable loss on held-out
    data, jit-compiled. ``a`` begins at 0, the uniform soup. steps: how many are made, fewer where ``batches`` end. optimizer:
    by default AdamW with a learning rate of 0.1, the paper's. All vectors are in memory together. The manifest has the
    ``ingredients`` and their ``weights``. The paper also learns a temperature of the logits: that is part of an objective.
    Wortsman et al. 2022, arXiv:2203.05482, appendix. Raises ``ValueError`` where the weights do not stay finite.
    """
    # Imported here: nothing else of merging trains.
    import optax

    candidates = _named(vectors)
    _verify(base, candidates, check)
    taus = list(candidates.values())
    optimizer = optax.adamw(0.1) if optimizer is None else optimizer

    @jax.jit
    def step(logits: Any, state: Any, base: Any, taus: list[TaskVector], batch: tuple) -> tuple[Any, Any]:
        def loss(logits: Any) -> Any:
            soup = TaskVector.combine(taus, list(jax.nn.softmax(logits)))
            return objective(apply(base, soup, check=False), *batch)

        updates, state = optimizer.update(jax.grad(loss)(logits), state, logits)
        return optax.apply_updates(logits, updates), state

    logits: Any = jnp.zeros(len(taus), jnp.float32)
    state = optimizer.init(logits)
    inputs = ((),) * steps if batches is None else ((batch,) for batch in batches)
    for _, batch in zip(range(steps), inputs, strict=False):
        logits, state = step(logits, state, base, taus, batch)
    weights = np.asarray(jax.nn.softmax(logits), np.float64).tolist()
    if not np.all(np.isfinite(weights)):
        raise ValueError(f"the learned weights are not finite: {weights}; is the objective, or is its rate too high?")
    soup = TaskVector.combine(taus, weights)
    return _described(soup, rule="learned_soup", ingredients=list(candidates), weights=weights)


def _named(vectors: Vectors) -> dict[Any, TaskVector]:
    taus = listed(vectors)
    return dict(zip(vectors if isinstance(vectors, Mapping) else range(len(taus)), taus, strict=True))


def _verify(base: Any, candidates: Mapping[Any, TaskVector], check: bool) -> None:
    # Once, not for every set of merged parameters.
    if check:
        for tau in candidates.values():
            verify(tau.manifest, base)


def _described(tau: TaskVector, **facts: Any) -> TaskVector:
    return TaskVector(tau.deltas, tau.manifest | facts)
