"""aTLAS: a coefficient for each task and parameter block, learned from a few examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft import tree
from jft.delta import TaskVector
from jft.merge import learned
from jft.merge.rule import Vectors, listed

Array = jax.Array


def atlas(
    vectors: Vectors,
    *,
    base: Any,
    objective: learned.Objective,
    batches: Iterable[Any],
    data: str,
    partitions: int = 1,
    matrices_only: bool = False,
    learning_rate: float = 1e-1,
    weight_decay: float = 0.1,
    steps: int = 100,
    seed: int = 0,
    scale: Any = 1.0,
) -> TaskVector:
    """``sum_i c_ib tau_i`` in block b, a tensor (one of a stack of layers or experts is one), with c learned from zero.

    AdamW with learning rate 0.1 and decay 0.1 is what the paper does for few shots (0.001 for unlabelled data). objective:
    ``objective(params, batch)``: :func:`jft.merge.cross_entropy` of a few labelled examples, :func:`jft.merge.entropy` of
    unlabelled ones, or its negative on a task to forget. Zhang et al. 2024, arXiv:2407.02880.

    partitions: K, aTLAS x K: entries of a tensor are drawn into K sets, each with coefficients of its own; the draw depends on
    the seed and the path (in the released code fredzzhang/atlas, tensors of one shape share it). matrices_only: as that code
    does where K > 1, vectors and scalars do not change at all; the paper says nothing of it. data: a name for what
    ``batches`` hold, for the manifest, which tells the coefficients as well where there are no partitions. Raises
    ``ValueError`` for partitions outside [1, 256], and as :func:`jft.merge.learned.learn` does.
    """
    learned.check_data(data)
    if not 1 <= partitions <= 256:
        raise ValueError(f"partitions must be between 1 and 256, not {partitions}")
    taus = listed(vectors)
    shapes = learned.shapes_of(taus)
    stacks = {path: learned.stack_of(path, shape) for path, shape in shapes.items()}
    if matrices_only:
        stacks = {path: stack for path, stack in stacks.items() if len(shapes[path]) - len(stack) == 2}
    key = jax.random.key(seed)
    sets = {path: _partition(tree.key_for(key, path), shapes[path], partitions) for path in stacks}
    # [N, *stack, K]: the set comes last.
    start = {path: jnp.zeros((len(taus), *stack, partitions), jnp.float32) for path, stack in stacks.items()}

    def change(values: Any, held: Any) -> learned.Deltas:
        taus, sets = held
        return {path: _weighted(learned.dense(taus, path), c, sets[path]) for path, c in values.items()}

    how = {"base": base, "objective": objective, "batches": batches, "steps": steps}
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
    solution = learned.learn(change, start, (taus, sets), optimizer=optimizer, **how)
    note = {"partitions": partitions, "matrices_only": matrices_only, "seed": seed}
    if partitions == 1:
        note["coefficients"] = learned.described({path: c[..., 0] for path, c in solution.values.items()})
    deltas = jax.jit(change)(solution.values, (taus, sets))
    return learned.result(taus, deltas, solution, base=base, rule="atlas", data=data, scale=scale, **note)


def _partition(key: Array, shape: tuple[int, ...], partitions: int) -> Array | None:
    """The set, 0 to K - 1, of each entry; one byte each."""
    return None if partitions == 1 else jax.random.randint(key, shape, 0, partitions, jnp.int32).astype(jnp.uint8)


def _weighted(deltas: Array, coefficients: Array, sets: Array | None) -> Array:
    """``sum_i c_i[set] tau_i`` with deltas ``[N, *stack, ...]``, coefficients ``[N, *stack, K]`` and sets ``[*stack, ...]``."""
    if sets is None:
        return jnp.sum(learned.over(coefficients[..., 0], deltas) * deltas, axis=0)
    total = jnp.zeros(deltas.shape[1:], jnp.float32)
    # One set after the other: a table of coefficients of all entries would be N times as large as the model.
    for k in range(coefficients.shape[-1]):
        total += jnp.where(sets == k, jnp.sum(learned.over(coefficients[..., k], deltas) * deltas, axis=0), 0)
    return total
