"""`Curvature`: the Gram matrix of a model's Jacobian over a task's data, as Kronecker factors, in a file of its own."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft import safetensors_files, strict_json, tree
from jft.delta.manifest import BaseMismatch

Array = jax.Array
FORMAT = "jft.curvature"
VERSION = 1


# Compared by identity: arrays have no hash, and a compiled step holds them.
@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    """``G = E_x J(x)^T J(x)`` at a base, for each matrix ``A (x) B``: ``tau^T G tau = sum tr(D^T A D B)``.

    factors: ``{path/w: {"inputs": A [..., I + 1, I + 1], "outputs": B [..., O, O]}}``, float32. D is the change ``[I, O]`` of a
    weight with that of its bias, ``path/b``, as its last row. What has no factors (norms, embeddings) does not count.
    examples: how many they are the mean over. base: the fingerprint of the weights (:func:`jft.tree.fingerprint`).

    Porrello et al. 2026, arXiv:2602.17385.
    """

    factors: Mapping[str, Mapping[str, Array]]
    examples: float
    base: str

    @classmethod
    def of(cls, factors: tuple[Mapping[str, Mapping[str, Array]], float], params: Any) -> Curvature:
        """From what :func:`jft.select.grams.jacobian_factors` gives, of a model at ``params``."""
        return cls(*factors, base=tree.fingerprint(params))

    def __call__(self, changes: Mapping[str, Array]) -> Array:
        """``tau^T G tau`` in float32, tau ``{path: change}``; paths may be missing, and do not move."""
        total = jnp.float32(0)
        for path, factor in self.factors.items():
            bias = path.removesuffix("/w") + "/b"
            if path in changes or bias in changes:
                total = total + _quadratic(factor["inputs"], factor["outputs"], changes.get(path), changes.get(bias))
        return total

    def verify(self, params: Any) -> None:
        """Raise :class:`jft.delta.manifest.BaseMismatch` unless ``params`` are the base bit for bit."""
        found = tree.fingerprint(params)
        if found != self.base:
            raise BaseMismatch(
                f"the curvature is of a base with fingerprint {self.base}; these parameters have {found}"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all: tensors ``PATH|inputs`` and ``PATH|outputs``."""
        tensors = {f"{p}|{name}": tree.host(x) for p, pair in self.factors.items() for name, x in pair.items()}
        header = {"format": FORMAT, "version": VERSION, "examples": self.examples, "base": self.base}
        if jax.process_index() == 0:
            safetensors_files.save(tensors, path, {"jft": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Curvature:
        """Read what :meth:`save` wrote; ``ValueError`` for another file."""
        tensors = safetensors_files.Tensors(path)
        header = strict_json.loads(tensors.metadata.get("jft", "{}"), path)
        if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
            raise ValueError(f"{path} is no curvature of version {VERSION} or lower")
        strict_json.need(header, {"examples": strict_json.POSITIVE, "base": strict_json.TEXT}, path)
        factors: dict[str, dict[str, Array]] = {}
        for key in tensors:
            name, _, field = key.rpartition("|")
            factors.setdefault(name, {})[field] = jnp.array(tensors.array(key))
        for name, pair in factors.items():
            if set(pair) != {"inputs", "outputs"}:
                raise ValueError(f"{path} is no curvature: {name!r} has {', '.join(pair)}, not inputs and outputs")
        return cls(dict(sorted(factors.items())), header["examples"], header["base"])


def merged(curvatures: Sequence[Curvature]) -> Curvature:
    """One pair of factors for many tasks, as in TAK's code: ``A = sum n_t A_t / sum n_t``, ``B = sum B_t``, n_t its examples.

    Of one task the same. Of equal tasks the sum of theirs. In general no sum of Kronecker products, which would need the
    factors of all. Raises ``ValueError`` for none, and for those of different bases or weights.
    """
    if not curvatures:
        raise ValueError("there is no curvature to merge")
    first, examples = curvatures[0], sum(c.examples for c in curvatures)
    for other in curvatures[1:]:
        if other.base != first.base or set(other.factors) != set(first.factors):
            raise ValueError("curvatures of different bases or weights cannot be merged")
    shares = [c.examples / examples for c in curvatures]
    factors = {
        path: {
            "inputs": _weighted(shares, [c.factors[path]["inputs"] for c in curvatures]),
            "outputs": _weighted([1.0] * len(curvatures), [c.factors[path]["outputs"] for c in curvatures]),
        }
        for path in first.factors
    }
    return Curvature(factors, examples, first.base)


def _weighted(weights: Sequence[float], arrays: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, [c * x for c, x in zip(weights, arrays, strict=True)])


def _quadratic(A: Array, B: Array, w: Array | None, b: Array | None) -> Array:
    """``sum over stacked matrices of tr(D^T A D B)``, D of ``w`` above ``b``."""
    lead, rows, columns = A.shape[:-2], A.shape[-1] - 1, B.shape[-1]
    w = jnp.zeros((*lead, rows, columns)) if w is None else w
    b = jnp.zeros((*lead, columns)) if b is None else b
    D = jnp.concatenate([w, b[..., None, :]], axis=-2)
    # HIGHEST: a quadratic form of nearly cancelling terms.
    left = jnp.einsum("...ij,...jo->...io", A, D, precision="highest")
    return jnp.sum(left * jnp.einsum("...io,...op->...ip", D, B, precision="highest"))
