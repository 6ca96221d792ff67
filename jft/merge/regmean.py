"""RegMean: each matrix as the least-squares fit of what the models' own matrices give on their data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft import tree
from jft.delta import Dense, TaskVector
from jft.delta import manifest as manifests
from jft.delta.numeric import wide
from jft.merge.fisher import mean
from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, Vectors, in_range, listed
from jft.select.calibration import Calibration
from jft.select.grams import grams

Array = jax.Array


@register(
    paper="Jin et al. 2023, arXiv:2212.09849",
    presets={"paper": {}, "fusionbench": {"off_diagonal": 0.95}},
)
def regmean(*, off_diagonal: float = 0.9) -> Rule:
    """``(sum_i w_i G_i)^-1 sum_i w_i G_i tau_i``, G_i = X_i^T X_i the Gram matrix of the inputs of a matrix ``[in, out]``.

    The minimum of ``sum_i |X_i W - X_i W_i|^2``; of parameters the formula is the same, the base drops out. statistics:
    ``{path: [..., I, I]}`` per model from :func:`jft.select.grams.grams`; paths without are averaged with the weights.
    Entries of G off its diagonal are first multiplied by ``off_diagonal``: 0.9 in the paper (0.1 for T5), 0.95 in FusionBench
    for CLIP (0.6 for GPT-2). Where the sum of the G is singular (inputs that are always zero, fewer tokens than inputs), the
    change is that of least norm, by eigenvalues above ``I * 1.2e-7`` of the largest; an inverse has none. Raises
    ``ValueError`` for ``off_diagonal`` outside [0, 1] and statistics of another shape.
    """
    in_range("off_diagonal", off_diagonal, 0, 1)
    return Rule(merge=_regmean, options={"off_diagonal": float(off_diagonal)}, statistics=True)


def _regmean(tensor: Tensor, off_diagonal: float) -> Array:
    weights = tensor.weighted()
    if tensor.statistics is None:
        return mean(tensor.deltas, weights)
    check_gram("Gram matrix", tensor.statistics, tensor.deltas, -2)
    gram = weights * reduced(tensor.statistics, off_diagonal)
    target = jnp.einsum("nij,njo->io", gram, tensor.deltas, precision="highest")
    return least_norm(jnp.sum(gram, axis=0), target)


def reduced(gram: Array, off_diagonal: float) -> Array:
    """Matrices with their entries off the diagonal multiplied by ``off_diagonal``."""
    return gram * jnp.where(jnp.eye(gram.shape[-1], dtype=bool), 1.0, off_diagonal)


def check_gram(name: str, gram: Array, deltas: Array, axis: int) -> None:
    """``ValueError`` unless ``gram[N, D, D]`` is of axis ``axis`` of the matrices ``deltas[N, in, out]``."""
    if deltas.ndim != 3 or gram.shape[1:] != (deltas.shape[axis],) * 2:
        raise ValueError(f"a {name} has shape {gram.shape[1:]}, and the weight {deltas.shape[1:]}")


def least_norm(a: Array, b: Array) -> Array:
    """The X of least norm among the minima of ``|a X - b|``, a symmetric ``[D, D]``, b ``[D, O]``."""
    values, vectors = jnp.linalg.eigh(a)
    size = jnp.abs(values)
    kept = size > a.shape[0] * jnp.finfo(a.dtype).eps * jnp.max(size)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
    product = lambda x, y: jnp.matmul(x, y, precision="highest")
    return product(vectors, inverse[:, None] * product(vectors.T, b))


def regmean_plus_plus(
    vectors: Vectors,
    calibrations: Sequence[Calibration],
    *,
    base: Any,
    batches: int,
    weights: Any = None,
    off_diagonal: float = 0.95,
    scale: Any = 1.0,
) -> TaskVector:
    """:func:`regmean`, layer after layer, each on what the layers merged before it give (arXiv:2508.03121).

    For layer l and model i the Gram matrices are those of the data of task i in a model whose layers before l are merged and
    whose layer l is that of model i: the layer's input is the merged model's, and what its later products read is computed
    from it by the layer of model i. So does the released code, as FusionBench has it. All other weights are averaged first,
    embeddings and norms among them; products outside layers that are candidates (a head) come last, on the merged layers.
    calibrations: of one jft model with one stack of layers, one for each task, on its data; their weights are replaced, and
    their ``paths`` are the matrices to fit. batches: how many are read, once for every layer, each time by a whole forward
    pass. Nguyen et al. 2025. Raises ``ValueError`` for another number of calibrations than vectors, and for models of more
    stacks or none.
    """
    taus = listed(vectors)
    if len(calibrations) != len(taus):
        raise ValueError(f"{len(calibrations)} calibrations for {len(taus)} task vectors; give one of each task")
    flat = tree.flatten(base)
    stacks = tree.stacks(flat)
    if len(stacks) != 1:
        raise ValueError(f"layers are merged one after the other in models with one stack of them, not {len(stacks)}")
    for tau in taus:
        manifests.verify(tau.manifest, flat)
    options = {"off_diagonal": off_diagonal, "weights": weights}
    averages = regmean(taus, statistics=[{}] * len(taus), **options)
    merged = {path: delta.dense() for path, delta in averages.items()}
    ((stack, layers),) = stacks.items()
    inside = [path for path in merged if tree.stack_of(path) == stack]
    for layer in range(layers):
        # Stacks of one layer, so that experts stay apart.
        one = [{path: _dense(tau, path, flat)[layer : layer + 1] for path in inside} for tau in taus]
        statistics = []
        for changes, calibration in zip(one, calibrations, strict=True):
            mixed = merged | {path: merged[path].at[layer].set(x[0]) for path, x in changes.items()}
            every = grams(calibration.at(_added(flat, mixed)), batches)
            statistics.append({path: every[path][layer : layer + 1] for path in inside if path in every})
        vectors_of_layer = [TaskVector({path: Dense(x) for path, x in changes.items()}) for changes in one]
        for path, delta in regmean(vectors_of_layer, statistics=statistics, **options).items():
            merged[path] = merged[path].at[layer].set(delta.dense()[0])
    rest = [path for path in calibrations[0].paths if path in merged and path not in inside]
    if rest:
        last_grams = [grams(calibration.at(_added(flat, merged)), batches) for calibration in calibrations]
        others = [TaskVector({path: Dense(_dense(tau, path, flat)) for path in rest}) for tau in taus]
        last = regmean(others, statistics=[{path: g[path] for path in rest} for g in last_grams], **options)
        merged |= {path: delta.dense() for path, delta in last.items()}
    note: dict[str, Any] = {"rule": "regmean_plus_plus", "off_diagonal": off_diagonal, "batches": batches}
    manifest = manifests.derive([t.manifest for t in taus], "merge", **note)
    return TaskVector({path: Dense(scale * x) for path, x in merged.items()}, manifest)


def _dense(tau: TaskVector, path: str, base: dict[str, Any]) -> Array:
    return wide(tau[path].dense()) if path in tau else jnp.zeros(base[path].shape, jnp.float32)


def _added(base: dict[str, Any], deltas: dict[str, Array]) -> dict[str, Array]:
    """The weights that change, in the dtypes of the base."""
    return {path: (wide(base[path]) + x).astype(base[path].dtype) for path, x in deltas.items()}
