"""RegMean: each matrix as the least-squares fit of what the models' own matrices give on their data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft import tree
from jft.delta import Dense, TaskVector
from jft.delta import manifest as manifests
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
    (stack, layers), products = next(iter(stacks.items())), calibrations[0].paths
    options = {"off_diagonal": off_diagonal, "weights": weights}
    deltas = {p: Dense(x) for p, x in _averaged(taus, flat, weights).items()}
    inside = [p for p in deltas if tree.stack_of(p) == stack]
    for layer in range(layers):
        measured = [
            {
                p: g[layer]
                for p, g in grams(c.at(_weights(flat, deltas, tau, inside, layer)), batches).items()
                if p in inside
            }
            for c, tau in zip(calibrations, taus, strict=True)
        ]
        one = regmean(
            # Under names without the stack: here they are the tensors of one layer.
            [TaskVector({_flat(p): Dense(_dense(tau, p, flat)[layer]) for p in inside}) for tau in taus],
            statistics=[{_flat(p): g for p, g in each.items()} for each in measured],
            **options,
        )
        for p in inside:
            deltas[p] = Dense(deltas[p].dense().at[layer].set(one[_flat(p)].dense()))
    outside = [p for p in products if p in deltas and p not in inside]
    if outside:
        merged = _weights(flat, deltas, taus[0], [], 0)
        measured = [{p: g for p, g in grams(c.at(merged), batches).items() if p in outside} for c in calibrations]
        last = regmean(
            [tau.map(lambda p, d: d if p in outside else None, "select") for tau in taus],
            statistics=measured,
            **options,
        )
        deltas |= dict(last.items())
    note: dict[str, Any] = {"rule": "regmean_plus_plus", "off_diagonal": off_diagonal, "batches": batches}
    manifest = manifests.derive([t.manifest for t in taus], "merge", **note)
    merged_tau = TaskVector(deltas, manifest)
    return merged_tau if isinstance(scale, float) and scale == 1.0 else scale * merged_tau


def _flat(path: str) -> str:
    return path.replace(tree.SEPARATOR, ".")


def _dense(tau: TaskVector, path: str, base: dict[str, Any]) -> Array:
    return tau[path].dense().astype(jnp.float32) if path in tau else jnp.zeros(base[path].shape, jnp.float32)


def _averaged(taus: Sequence[TaskVector], base: dict[str, Any], weights: Any) -> dict[str, Array]:
    averaged = regmean(taus, weights, statistics=[{}] * len(taus))
    return {p: averaged[p].dense() for p in averaged}


def _weights(
    base: dict[str, Any], merged: dict[str, Any], tau: TaskVector, inside: Sequence[str], layer: int
) -> dict[str, Array]:
    """The merged weights so far, layer ``layer`` that of a model."""
    out = {}
    for p, delta in merged.items():
        change = delta.dense()
        if p in inside:
            change = change.at[layer].set(_dense(tau, p, base)[layer])
        out[p] = (base[p].astype(jnp.float32) + change).astype(base[p].dtype)
    return out
