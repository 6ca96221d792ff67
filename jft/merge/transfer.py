"""Fine-tuning carried from one base to another: to its next version, to its instruct model, back to the model before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta, tree
from jft.delta import TaskVector, apply, describe_base
from jft.delta.encoding import standing_alone
from jft.merge.in_memory import stack_axes
from jft.merge.rule import in_range
from jft.merge.sums import linear, task_arithmetic


def transfer(tau: TaskVector, target: Any) -> TaskVector:
    """The same change as one of other parameters: ``jft.apply(target, transfer(tau, target))`` is ``target + tau``.

    For the next version of a base, without training: PortLLM, Khan et al. 2024, arXiv:2410.10870; fine-tuning transfer, Lin
    et al. 2025, arXiv:2503.20110. What a task vector is a change of is otherwise checked wherever it is applied. The manifest
    describes ``target``, and the base it comes from under ``transferred_from``. Raises ``ValueError`` for a path or shape
    that ``target`` does not have, and for masks and gates, which are functions of their base: ``tau.resolve(old_base)`` first.
    """
    flat = tree.flatten(target)
    for path, change in tau.items():
        if path not in flat or tuple(flat[path].shape) != change.shape:
            shape = tuple(flat[path].shape) if path in flat else "absent"
            raise ValueError(f"{path!r} has shape {change.shape} in the task vector but is {shape} in the target")
        standing_alone("a transfer", change)
    source = tau.manifest.get("base", {}).get("fingerprint", "unknown")
    manifest = tau.manifest | {"base": describe_base(target), "transferred_from": source}
    return TaskVector(tau.deltas, manifest)


def recycle(bases: Iterable[Any], tune: Callable[[Any], Any]) -> TaskVector:
    """Recycling, then fine-tuning, over the versions of a base: the change of the last of them.

    Of every version, in order: the change so far is added to it, ``tune(params)`` trains from there, and the change is what
    this arrives at less the version. One version is held at a time, so ``bases`` may load them one by one. Lin et al. 2025,
    arXiv:2503.20110, iterative recycling-then-finetuning. Raises ``ValueError`` where there are none.
    """
    tau: TaskVector | None = None
    for base in bases:
        start = base if tau is None else apply(base, transfer(tau, base), check=False)
        tau = TaskVector.between(base, tune(start))
    if tau is None:
        raise ValueError("bases has no versions to tune")
    return tau


def shadow_ft(tau: TaskVector, instruct: Any) -> TaskVector:
    """The tuning of a base as a change of its instruct model: ``instruct + (base_tuned - base)``.

    It is :func:`transfer`; it presumes that the two models are near, which :func:`relative_gap` tells. Shadow-FT, Wu et al.
    2025, arXiv:2505.12716.
    """
    return transfer(tau, instruct)


def relative_gap(base: Any, instruct: Any) -> float:
    """``sum |instruct - base| / (sum |instruct| + sum |base|)`` over all weights; 0 where both are zero.

    Below 0.02 for base and instruct models of one family in Shadow-FT, arXiv:2505.12716. Raises ``ValueError`` for parameters
    that differ in paths or shapes.
    """
    a, b = tree.flatten(base), tree.flatten(instruct)
    unlike = [path for path in a.keys() | b.keys() if path not in a or path not in b or a[path].shape != b[path].shape]
    if unlike:
        raise ValueError(f"{min(unlike)!r} is not in both models, or not in one shape")
    sums = np.sum([np.asarray(_gap(a[path], b[path]), np.float64) for path in a], axis=0)
    return float(sums[0] / sums[1]) if sums[1] else 0.0


@jax.jit
def _gap(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.stack([jnp.sum(jnp.abs(a - b)), jnp.sum(jnp.abs(a)) + jnp.sum(jnp.abs(b))])


def re_adapt(
    knowledge: TaskVector,
    instruct: TaskVector,
    alpha: Any = 1.0,
    beta: Any = 1.0,
    explained: float | None = None,
) -> TaskVector:
    """``alpha * knowledge + beta * instruct``: a base tuned on a domain, made to follow instructions again.

    knowledge: the change that the domain made of the base. instruct: that of its instruct model,
    ``TaskVector.between(base, instruct)``, the reverse engineered adapter. Below 1, ``alpha`` and ``beta`` are the paper's
    partial adaptation. explained: LoRE-Adapt, where the instruct adapter is reduced by :func:`explained_variance` first.
    Fleshman and Van Durme 2024, arXiv:2405.15007.
    """
    adapter = instruct if explained is None else explained_variance(instruct, explained)
    return task_arithmetic([knowledge, adapter], [alpha, beta])


def explained_variance(tau: TaskVector, explained: float) -> TaskVector:
    """Every matrix by the fewest singular vectors with ``sum_kept s**2 >= explained * sum s**2``, in low rank.

    Every layer and expert has its own number; a stack is stored at the largest of them. What is no matrix stays. explained in
    [0, 1]. Fleshman and Van Durme 2024, arXiv:2405.15007.
    """
    in_range("explained", explained, 0, 1)

    def reduced(path: str, change: delta.Encoding) -> delta.Encoding:
        if len(change.shape) - stack_axes(path, len(change.shape)) != 2:
            return change
        u, s, vt = jnp.linalg.svd(change.dense(), full_matrices=False)
        energy = np.cumsum(np.asarray(s, np.float64) ** 2, axis=-1)
        # One is kept while those before it do not explain enough.
        before = np.concatenate([np.zeros_like(energy[..., :1]), energy[..., :-1]], axis=-1)
        kept = before < explained * energy[..., -1:]
        rank = int(kept.sum(axis=-1).max(initial=0))
        s = jnp.where(kept, s, 0)[..., :rank, None]
        return delta.LowRank(u[..., :rank], s * vt[..., :rank, :])

    return tau.map(reduced, "explained_variance", explained=float(explained))


def pre_post(
    tau: TaskVector, weight: float = 0.5, rule: Callable[..., TaskVector] = linear, **options: Any
) -> TaskVector:
    """The merge of a model before fine-tuning, with weight ``1 - weight``, and after it: to keep what it knew of safety.

    tau: the change that fine-tuning made of the aligned model, which is the base here, and so has a change of zero. With
    ``linear`` it is ``weight * tau``. rule, options: another rule with weights, and its options. weight in [0, 1]; the paper
    searches it. Farn et al. 2024, arXiv:2412.19512.
    """
    in_range("weight", weight, 0, 1)
    return rule([TaskVector({}, tau.manifest), tau], [1 - weight, weight], **options)
