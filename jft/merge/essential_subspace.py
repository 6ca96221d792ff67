"""Essential subspace merging: the directions in which each model moves the outputs of a layer, on a few of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft.delta import Dense, TaskVector
from jft.delta import manifest as manifests
from jft.delta.encoding import Encoding
from jft.delta.numeric import wide
from jft.merge.in_memory import merge, stack_axes
from jft.merge.rule import Rule, Tensor, Vectors, listed, weights_of
from jft.merge.singular_vectors import side_by_side, tsv_m
from jft.merge.spectral import product, svd, transposed, weighted

Array = jax.Array
Moments = Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]


def esm(
    vectors: Vectors,
    weights: Any = None,
    *,
    moments: Moments,
    power: float = 2.0,
    spread: float = 0.15,
    gain: float = 2.0,
    layer_power: float = 2.0,
    scale: Any = 1.0,
) -> TaskVector:
    """ESM: the leading principal directions of each model's change of the outputs, polarised in scale, made orthogonal.

    moments: for each vector ``{path: X^T X}``, ``[..., in, in]``, of the inputs X of the layer in the fine-tuned model on a
    few samples (32 in the paper) of its task; their scale does not matter. Deltas of other paths are merged by ``tsv_m``,
    as released code does with attention outputs. For a delta D ``[in, out]`` of model i, written with ``m = out // N``:

        P_i, e_i   the m leading eigenvectors and eigenvalues of D^T X^T X D, the second moment of the change of outputs
        g_i        (e_i / mean e_i)^spread, divided by its mean
        V_i        ||D||^power D P_i diag(g_i),   U_i = P_i diag(g_i)
        V          [V_1 .. V_N] / (mean ||D||)^power, its rows times (row norm / mean row norm)^power
        merged     gain  mean s(V)  mean s(U)  polar(V) polar(U)^T,   s being singular values

    and every layer of a stack is multiplied by (norm / mean norm over the layers)^layer_power, those merged by ``tsv_m`` too.
    Layers that no stack holds are left alone. weights multiply the deltas first.

    Li et al. 2026, arXiv:2602.20208 and 2606.19164. The formula and its constants are those of the code released for CLIP,
    kiddo127/ESM; that for RoBERTa is ``power=0, gain=1``. Raises ``ValueError`` where moments do not fit the vectors.
    """
    taus = listed(vectors)
    given = _checked(taus, moments, list(vectors) if isinstance(vectors, Mapping) else None)
    numbers = weights_of(weights, len(taus))
    paths = list(dict.fromkeys(path for tau in taus for path in tau))
    within = [TaskVector({p: d for p, d in tau.items() if p in given[0]}, tau.manifest) for tau in taus]
    outside = [TaskVector({p: d for p, d in tau.items() if p not in given[0]}, tau.manifest) for tau in taus]
    shifts = [
        TaskVector({path: Dense(shift(moment[path], delta.dense())) for path, delta in tau.items()}, tau.manifest)
        for tau, moment in zip(within, given, strict=True)
    ]
    rule = Rule(
        merge=_merge,
        options={"power": power, "spread": spread, "gain": gain},
        parameters={"weight": [*numbers, *numbers]},
    )
    results: dict[str, Encoding] = {}
    if any(len(tau) for tau in within):
        results |= merge(rule, [*within, *shifts]).deltas
    if any(len(tau) for tau in outside):
        results |= tsv_m(outside, weights).deltas
    if layer_power:
        results = {path: _polarised(path, delta, layer_power) for path, delta in results.items()}
    constants: dict[str, Any] = {"power": power, "spread": spread, "gain": gain, "layer_power": layer_power}
    manifest = manifests.derive([tau.manifest for tau in taus], "merge", rule="esm", **constants)
    return TaskVector({path: results[path].scaled(scale) for path in paths}, manifest)


@jax.jit
def shift(moment: Any, delta: Array) -> Array:
    """A matrix ``[..., in, out]`` with the second moment of the change of outputs, ``delta^T moment delta``."""
    values, basis = jnp.linalg.eigh(wide(moment))
    return jnp.sqrt(jnp.maximum(values, 0))[..., :, None] * product(transposed(basis), delta)


def _merge(tensor: Tensor, power: float, spread: float, gain: float) -> Array:
    count = len(tensor.deltas) // 2
    deltas, shifts = jnp.split(weighted(tensor), 2)
    outputs = deltas.shape[2]
    kept = outputs // count
    _, s, vt = svd(shifts)
    directions = transposed(vt[:, :kept])
    # Eigenvalues beyond the rank are zero and count in the means.
    growth = _ratio(s[:, :kept] ** 2, _mean(s[:, :kept] ** 2, kept)) ** spread
    growth = _ratio(growth, _mean(growth, kept))[:, None, :]
    norms = jnp.linalg.norm(deltas, axis=(1, 2))
    size = _ratio(norms, jnp.mean(norms)) ** power
    u = side_by_side(directions * growth)
    v = side_by_side(size[:, None, None] * product(deltas, directions) * growth)
    rows = jnp.linalg.norm(v, axis=1, keepdims=True)
    v = v * _ratio(rows, jnp.mean(rows)) ** power
    return gain * product(_flattened(v, count * kept), transposed(_flattened(u, count * kept)))


def _flattened(x: Array, columns: int) -> Array:
    """The matrix with all singular values at their mean, as if it had ``columns`` columns."""
    u, s, vt = svd(x)
    return jnp.sum(s) / max(min(len(x), columns), 1) * product(u, vt)


def _polarised(path: str, delta: Encoding, power: float) -> Encoding:
    stack = stack_axes(path, len(delta.shape))
    if stack == 0 or len(delta.shape) - stack != 2:
        return delta
    x = delta.dense()
    norms = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    return Dense(x * _ratio(norms, jnp.mean(norms, axis=0, keepdims=True)) ** power)


def _mean(x: Array, count: int) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True) / max(count, 1)


def _ratio(x: Array, y: Array) -> Array:
    """``x / y``, and 0 where y is."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _checked(taus: Sequence[TaskVector], moments: Moments, names: list[str] | None) -> list[Mapping[str, Any]]:
    """The moments in the order of the vectors."""
    if isinstance(moments, Mapping):
        if names is None or set(names) != set(moments):
            raise ValueError(f"moments are for {sorted(moments)}; they must have the names of the vectors, {names}")
        given = [moments[name] for name in names]
    else:
        given = list(moments)
    if len(given) != len(taus):
        raise ValueError(f"moments must be one per vector ({len(taus)} of them), not {len(given)}")
    shapes = {path: delta.shape for tau in taus for path, delta in tau.items()}
    for moment in given:
        if set(moment) != set(given[0]):
            raise ValueError(f"moments of {min(set(moment) ^ set(given[0]))!r} are there for some vectors only")
        for path, x in moment.items():
            shape = shapes.get(path, ())
            if stack_axes(path, len(shape)) + 2 != len(shape) or x.shape != (*shape[:-1], shape[-2]):
                raise ValueError(f"the moment of {path!r} has shape {x.shape}, which does not fit a delta of {shape}")
    return given
