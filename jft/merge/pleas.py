"""PLeaS: permute the units of models until they correspond, then fit every matrix to their mean activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.delta import Dense, TaskVector
from jft.delta import manifest as manifests
from jft.delta.numeric import wide
from jft.dot import dot
from jft.merge.regmean import least_norm
from jft.merge.rule import Vectors, listed
from jft.models.core import Hooks
from jft.select.activations import hookable, real
from jft.select.calibration import Calibration

Array = jax.Array
Flat = dict[str, Array]


def align(model: Any, params: Any, to: Any) -> Any:
    """``params`` with hidden units of MLPs and attention heads reordered to be most like those of ``to``; the same function.

    Weight matching (Ainsworth et al. 2022, arXiv:2209.04836): of each layer the order that maximises the sum over units of the
    inner products of all weights in and out of a unit, found exactly as an assignment. Heads with shared keys and values move
    as groups, and inside them. The residual stream keeps its order: embeddings and norms fix it in models of one base. params,
    to: parameters of the jft model, in the float dtype of each. Raises ``ValueError`` for mixtures of experts and for models
    without stacks of layers, or with towers.
    """
    flat, other = tree.flatten(params), tree.flatten(to)
    heads, groups = _heads(model)
    stacks = list(tree.stacks(flat))
    if not stacks:
        raise ValueError("units are aligned in stacks of layers, and these parameters have none")
    out = dict(flat)
    for stack in stacks:
        if f"{stack}/mlp/down/w" in flat:
            out |= _reordered(flat, f"{stack}/mlp", _units(flat, other, f"{stack}/mlp"), ("up", "gate"), "down")
        if f"{stack}/attn/q/w" in flat:
            order, shared = _matched_heads(flat, other, f"{stack}/attn", heads, groups)
            out |= _reordered(flat, f"{stack}/attn", _entries(flat, f"{stack}/attn/q/w", order), ("q", "q_norm"), "o")
            out |= _reordered(
                flat, f"{stack}/attn", _entries(flat, f"{stack}/attn/k/w", shared), ("k", "v", "k_norm"), ""
            )
    return tree.like(params, out)


def pleas(
    vectors: Vectors,
    calibrations: Sequence[Calibration],
    *,
    base: Any,
    batches: int,
    permute: bool = True,
    scale: Any = 1.0,
) -> TaskVector:
    """The model whose every matrix maps the mean of the models' inputs to the mean of their outputs best, seen from the base.

    ``W = argmin |mean_i X_i W - mean_i X_i W_i|^2``, X_i the inputs of a product in model i, whose units are those of the
    first model after :func:`align`; each model runs by itself on the same data. Of equal minima the one nearest to the mean
    of the W_i. All that is no candidate product is the mean of the aligned models. Nasery et al. 2024, arXiv:2407.02447, who
    minimise by Adam in their code (SewoongLab/PLeaS-Merging, ResNets) and may keep units apart that do not match, in a wider
    model; here all are merged, and the minimum is exact. calibrations: of one jft model, on the data of the tasks; their
    ``paths`` are the candidates. batches: of each; their activations in all layers and models are held at once. permute:
    False for models whose units correspond, as they mostly do when fine-tuned from one base.

    Raises ``ValueError`` for no calibrations, for candidates that are experts or no products, and as :func:`align` does.
    """
    taus = listed(vectors)
    if not calibrations:
        raise ValueError("activations are fitted on data: give at least one calibration")
    model, products = hookable(calibrations[0]), calibrations[0].paths
    for path in products:
        if "/experts/" in path or not path.endswith("/w"):
            raise ValueError(
                f"{path!r} is not fitted: choose weights of products, .../w, outside experts, as candidates"
            )
    manifests.verify(manifests.derive([t.manifest for t in taus], "merge"), base)
    start: Flat = {p: wide(x) for p, x in tree.flatten(base).items()}
    models = [start | {p: start[p] + d.dense() for p, d in tau.items()} for tau in taus]
    if permute:
        first = tree.unflatten(models[0])
        models = [models[0], *(tree.flatten(align(model, tree.unflatten(m), first)) for m in models[1:])]
    merged: Flat = {p: jnp.mean(jnp.stack([m[p] for m in models]), axis=0) for p in start}
    trees = [tree.like(base, m) for m in models]
    compute = _Averages(model, frozenset(p.removesuffix("/w") for p in products))
    sums = [c.sums(compute, batches, trees) for c in calibrations]
    for path in products:
        gram, cross = (sum(s[path.removesuffix("/w")][i] for s in sums) for i in (0, 1))
        fitted = _fit if gram.ndim == 2 else lambda *x: jax.lax.map(lambda x: _fit(*x), x)
        merged[path] = fitted(gram, cross, merged[path])
    note: dict[str, Any] = {"rule": "pleas", "permute": permute, "batches": batches}
    manifest = manifests.derive([t.manifest for t in taus], "merge", **note)
    return TaskVector({p: Dense(scale * (merged[p] - x)) for p, x in start.items()}, manifest)


def _fit(gram: Array, cross: Array, near: Array) -> Array:
    """The W nearest to ``near`` among the minima of ``|X W - Y|``, gram ``X^T X`` and cross ``X^T Y``."""
    return near + least_norm(gram, cross - jnp.matmul(gram, near, precision="highest"))


# A value rather than a closure: `sums` compiles one program for equal ones.
@dataclasses.dataclass(frozen=True)
class _Averages:
    """``X^T X`` and ``X^T Y`` over real tokens, X and Y the means over models of inputs and outputs of products."""

    model: Any
    names: frozenset[str]

    def __call__(self, params: Any, batch: Any, models: Sequence[Any]) -> Any:
        def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
            y = dot(x, w)
            if name not in self.names:
                return y, None
            keep = real(name, x.shape[:-1], batch)[..., None]
            return y, tuple((z.astype(jnp.float32) * keep).reshape(-1, z.shape[-1]) for z in (x, y))

        reads = [self.model.apply(m, batch, Hooks(product=product))[1] for m in models]
        means = jax.tree.map(lambda *z: sum(z) / len(z), *reads)
        moment = lambda x, y: jnp.einsum("...ni,...no->...io", x, y, precision="highest")
        return {name: (moment(x, x), moment(x, y)) for name, (x, y) in means.items()}


def _heads(model: Any) -> tuple[int, int]:
    """Query heads, and heads of keys and values."""
    config = getattr(model.config, "backbone", model.config)
    if getattr(config, "experts", None) is not None:
        raise ValueError("the units of experts are not aligned; permute=False keeps their order")
    if not hasattr(config, "heads"):
        raise ValueError(f"a {type(config).__name__} has no number of heads to align; permute=False keeps their order")
    return config.heads, getattr(config, "kv_heads", None) or config.heads


def _reordered(flat: Flat, prefix: str, order: np.ndarray, into: tuple[str, ...], out: str) -> Flat:
    """Leaves of products that write into units (their columns, biases and norms) and that read them (rows)."""
    index, changed = jnp.asarray(order), {}
    for name in into:
        for leaf in ("w", "b", "scale"):
            path = f"{prefix}/{name}/{leaf}"
            # A norm over one head has a scale that all heads share.
            if path in flat and flat[path].shape[-1] == order.shape[-1]:
                i = index[:, None] if flat[path].ndim == 3 else index
                changed[path] = jnp.take_along_axis(flat[path], i, axis=-1)
    if out:
        path = f"{prefix}/{out}/w"
        changed[path] = jnp.take_along_axis(flat[path], index[..., None], axis=-2)
    return changed


def _rows(flat: Flat, prefix: str, into: tuple[str, ...], out: str) -> np.ndarray:
    """All weights of each unit, float64 ``[L, units, weights]``."""
    parts = []
    for name in into:
        if f"{prefix}/{name}/w" in flat:
            parts.append(np.swapaxes(np.asarray(flat[f"{prefix}/{name}/w"], np.float64), -1, -2))
        if f"{prefix}/{name}/b" in flat:
            parts.append(np.asarray(flat[f"{prefix}/{name}/b"], np.float64)[..., None])
    if out:
        parts.append(np.asarray(flat[f"{prefix}/{out}/w"], np.float64))
    return np.concatenate(parts, axis=-1)


def _units(flat: Flat, other: Flat, prefix: str) -> np.ndarray:
    """``[L, F]``: the unit of ``flat`` that stands for each of ``other``."""
    ours, theirs = (_rows(x, prefix, ("up", "gate"), "down") for x in (flat, other))
    return np.stack([_assignment(b @ a.T)[0] for a, b in zip(ours, theirs, strict=True)])


def _matched_heads(flat: Flat, other: Flat, prefix: str, heads: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """``[L, H]`` and ``[L, KV]``: the heads of ``flat`` that stand for those of ``other``; queries follow their keys."""
    per = heads // groups
    query = [_rows(x, prefix, ("q",), "o") for x in (flat, other)]
    shared = [_rows(x, prefix, ("k", "v"), "") for x in (flat, other)]
    orders, groups_order = [], []
    for layer in range(len(query[0])):
        # [H, all weights of a head]; a head's K entries keep their order, which rotary embeddings fix.
        a, b = (x[layer].reshape(heads, -1) for x in query)
        one, two = (x[layer].reshape(groups, -1) for x in shared)
        likeness, inside = two @ one.T, np.zeros((groups, groups, per), np.int64)
        for i in range(groups):
            for j in range(groups):
                block = b[i * per : (i + 1) * per] @ a[j * per : (j + 1) * per].T
                inside[i, j], value = _assignment(block)
                likeness[i, j] += value
        chosen = _assignment(likeness)[0]
        groups_order.append(chosen)
        orders.append(np.concatenate([chosen[i] * per + inside[i, chosen[i]] for i in range(groups)]))
    return np.stack(orders), np.stack(groups_order)


def _entries(flat: Mapping[str, Any], path: str, order: np.ndarray) -> np.ndarray:
    """``[L, heads K]``: an order of heads as one of their entries."""
    size = flat[path].shape[-1] // order.shape[-1]
    return (order[..., None] * size + np.arange(size)).reshape(len(order), -1)


def _assignment(likeness: np.ndarray) -> tuple[np.ndarray, float]:
    """The column for each row with the largest sum, and the sum."""
    # Here, since SciPy is large and little else needs it.
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(likeness, maximize=True)
    return columns, float(likeness[rows, columns].sum())
