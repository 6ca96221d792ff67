"""`TaskVector`: what fine-tuning changed, path by path, with arithmetic; `apply` and `revert`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.compiled import program_cache
from jft.delta import file
from jft.delta import manifest as manifests
from jft.delta.encoding import Dense, Encoding, standing_alone
from jft.delta.numeric import wide
from jft.tree import concrete

Array = jax.Array


@jax.tree_util.register_pytree_with_keys_class
class TaskVector:
    """``{path: Encoding}``, a path that is absent being zero, and a manifest (:mod:`jft.delta.manifest`).

    ``a + b``, ``a - b``, ``c * a``, ``-a`` and ``sum([...])`` are exact up to float32 rounding, keep each delta in its
    closest encoding, and note in the manifest what went in. Vectors of different bases are refused. A pytree: its leaves
    are the arrays of the encodings, which may be sharded; the manifest is static. Ilharco et al. 2022, arXiv:2212.04089.
    """

    def __init__(self, deltas: Mapping[str, Encoding], manifest: Mapping[str, Any] | None = None) -> None:
        for path, delta in deltas.items():
            if not isinstance(delta, Encoding):
                raise ValueError(f"the delta of {path!r} is a {type(delta).__name__}; wrap arrays in jft.delta.Dense")
        self.deltas = dict(deltas)
        self.manifest = manifests.check(manifest or {})

    @classmethod
    def between(
        cls, base: Any, tuned: Any, *, dtype: Any = jnp.float32, manifest: Mapping[str, Any] | None = None
    ) -> TaskVector:
        """``tuned - base``, subtracted in float32 and stored as dense ``dtype``; leaves equal bit for bit are dropped.

        manifest: facts to add to it (method, data, seed ...). Raises ``ValueError`` naming the path where the trees or
        shapes differ, where integers changed, or where the difference is not finite.
        """
        before, after = tree.flatten(base), tree.flatten(tuned)
        _same_structure(before, after)
        deltas = {}
        for path, old in before.items():
            delta = _difference(path, old, after[path])
            if delta is not None:
                # Subtracted in float32 first: in bfloat16 most of a small difference would be rounding.
                deltas[path] = Dense(delta.astype(dtype))
        return cls(deltas, manifests.describe(base, operation="difference", **(manifest or {})))

    @classmethod
    def combine(cls, vectors: Sequence[TaskVector], weights: Sequence[Any], *, check: bool = True) -> TaskVector:
        """``sum(weight * vector)``. ``check=False``: even where they belong to different bases."""
        scalars = [_scalar(c) for c in weights]
        manifest = manifests.linear(((c, v.manifest) for c, v in zip(scalars, vectors, strict=True)), check)
        total: dict[str, Encoding] = {}
        for scalar, vector in zip(scalars, vectors, strict=True):
            for path, delta in vector.deltas.items():
                # As it is stored where nothing is scaled: `scaled` makes it float32.
                term = delta if isinstance(scalar, float) and scalar == 1.0 else delta.scaled(scalar)
                # By its name rather than `+`, so that an error names the path.
                total[path] = _with_path(path, total[path].__add__, term) if path in total else term
        return cls(total, manifest)

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return TaskVector.combine([self, other], [1.0, 1.0])

    def __radd__(self, other: Any) -> TaskVector:
        """So that ``sum(vectors)``, which starts at 0, works."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return TaskVector.combine([self, other], [1.0, -1.0])

    def __mul__(self, c: Any) -> TaskVector:
        if isinstance(c, TaskVector):
            raise ValueError("the product of two task vectors has no meaning; a.dot(b) is their inner product")
        return TaskVector.combine([self], [c])

    __rmul__ = __mul__

    def __truediv__(self, c: Any) -> TaskVector:
        return self * (1.0 / c)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def dot(self, other: TaskVector) -> Array:
        """The inner product over all paths, float32 scalar; paths absent from either count zero."""
        paths = [p for p in self.deltas if p in other.deltas]
        terms = [_with_path(p, self.deltas[p].dot, other.deltas[p]) for p in paths]
        return sum(terms, jnp.float32(0))

    def norm(self) -> Array:
        """The Euclidean norm over all paths, float32 scalar."""
        return jnp.sqrt(sum((_with_path(p, delta.norm) ** 2 for p, delta in self.items()), jnp.float32(0)))

    def cosine(self, other: TaskVector) -> Array:
        """``dot / (norm * norm)``, float32 scalar; 0 where either is zero."""
        # A safe denominator on both branches: NaN of the one not taken would reach gradients.
        lengths = self.norm() * other.norm()
        return jnp.where(lengths > 0, self.dot(other) / jnp.where(lengths > 0, lengths, 1), 0)

    @property
    def paths(self) -> list[str]:
        """The paths that changed, in order."""
        return list(self.deltas)

    @property
    def nnz(self) -> int:
        """Entries that may be non-zero: see :attr:`jft.delta.Encoding.nnz`."""
        return sum(delta.nnz for delta in self.deltas.values())

    @property
    def parameters(self) -> int:
        """Parameters of the base; of the paths that changed, where the base is not known."""
        size = sum(tree.size(delta) for delta in self.deltas.values())
        # A head that the base lacks may be part of the vector.
        return max(self.manifest["base"]["parameters"], size) if self.manifest.get("base") else size

    @property
    def density(self) -> float:
        """``nnz / parameters``: the fraction of the base that may differ; 0 for an empty vector."""
        return self.nnz / self.parameters if self.parameters else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the encodings as they are stored, without the manifest."""
        return sum(delta.nbytes for delta in self.deltas.values())

    def __len__(self) -> int:
        return len(self.deltas)

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __contains__(self, path: str) -> bool:
        return path in self.deltas

    def __getitem__(self, path: str) -> Encoding:
        if path not in self.deltas:
            raise KeyError(f"{path}: absent, so zero; .paths lists what changed")
        return self.deltas[path]

    def items(self) -> Iterator[tuple[str, Encoding]]:
        """``(path, delta)`` pairs."""
        return iter(self.deltas.items())

    def __repr__(self) -> str:
        base = self.manifest.get("base", {}).get("fingerprint", "unknown")
        counts = {
            kind: sum(d.kind == kind for d in self.deltas.values())
            for kind in sorted({d.kind for d in self.deltas.values()})
        }
        return f"TaskVector({len(self)} paths, {self.nbytes} bytes, encodings {counts}, base {base})"

    def select(self, patterns: str | Iterable[str]) -> TaskVector:
        """Only the paths that match any of the regular expressions (``re.search``).

        The result describes those paths only: it fits any base that agrees there. A pattern that matches nothing is
        refused with the nearest paths.
        """
        return self._narrowed(patterns, keep=True)

    def exclude(self, patterns: str | Iterable[str]) -> TaskVector:
        """All but the matching paths: ``tau.exclude("^classifier/")`` fits every model with the same backbone."""
        return self._narrowed(patterns, keep=False)

    def _narrowed(self, patterns: str | Iterable[str], keep: bool) -> TaskVector:
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        # Patterns may also name leaves that did not change: the description of the base is narrowed by them.
        paths = dict.fromkeys([*self.deltas, *self.manifest.get("base", {}).get("leaves", ())])
        matches = set(tree.matching(paths, patterns, "select" if keep else "exclude"))
        deltas = {p: d for p, d in self.deltas.items() if (p in matches) == keep}
        note = f"{'select' if keep else 'exclude'} {' | '.join(patterns)}"
        return TaskVector(deltas, manifests.narrow(self.manifest, lambda p: (p in matches) == keep, note))

    def map(self, fn: Callable[[str, Encoding], Encoding | None], operation: str, **options: Any) -> TaskVector:
        """``fn(path, delta)`` for every path, None dropping it; the manifest notes ``operation`` and ``options``."""
        results = {path: fn(path, delta) for path, delta in self.deltas.items()}
        deltas = {path: delta for path, delta in results.items() if delta is not None}
        return TaskVector(deltas, manifests.derive([self.manifest], operation, **options))

    @property
    def relative(self) -> bool:
        """Whether a delta is a function of the base (:attr:`jft.delta.Encoding.relative`)."""
        return any(delta.relative for delta in self.deltas.values())

    def resolve(self, base: Any, check: bool = True) -> TaskVector:
        """The same change of ``base``, in deltas that need no base: masks and gates become entries or dense.

        Inner products, norms and :func:`revert` need that. check, and what is raised, as in :func:`apply`.
        """
        flat = _base_of(self, base, check)
        return TaskVector({p: _with_path(p, d.resolve, flat[p]) for p, d in self.items()}, self.manifest)

    def astype(self, dtype: Any) -> TaskVector:
        """The same with its values stored in ``dtype``; arithmetic still goes through float32."""
        return TaskVector({p: d.astype(dtype) for p, d in self.deltas.items()}, self.manifest)

    def save(self, path: str | os.PathLike, dtype: Any = None) -> None:
        """Write one safetensors file: see :mod:`jft.delta.file`."""
        file.save(dict(self.items()), self.manifest, path, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike, paths: Iterable[str] | None = None) -> TaskVector:
        """Read what :meth:`save` wrote, or only the deltas of ``paths``: see :mod:`jft.delta.file`."""
        return cls(*file.read(path, paths))

    # The manifest is static, and static parts must hash and compare: JSON does, a dict does not.
    def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
        children = tuple((jax.tree_util.DictKey(p), d) for p, d in self.deltas.items())
        return children, (tuple(self.deltas), json.dumps(self.manifest, sort_keys=True))

    def tree_flatten(self) -> tuple[tuple, tuple]:
        return tuple(self.deltas.values()), (tuple(self.deltas), json.dumps(self.manifest, sort_keys=True))

    @classmethod
    def tree_unflatten(cls, aux: tuple, children: Iterable[Any]) -> TaskVector:
        paths, manifest = aux
        # Past __init__: JAX puts placeholders in the place of encodings.
        new = object.__new__(cls)
        new.deltas = dict(zip(paths, children, strict=True))
        new.manifest = json.loads(manifest)
        return new


def apply(base: Any, tau: TaskVector, scale: Any = 1.0, check: bool = True, donate: bool = False) -> Any:
    """``base + scale * tau`` in the dtypes, shardings and containers of ``base``.

    Each weight is computed in float32 and rounded once. check: first verify that ``base`` is the base of ``tau``
    (:class:`jft.delta.BaseMismatch` if not), which reads every weight once; it cannot be done under ``jit``, where it is
    skipped. Leaves of ``base`` that the vector's base does not have are passed through. donate: each weight that changes
    is changed in the memory it has, and must not be used again; sparse deltas of float32 weights then take no copy of
    them. Raises ``ValueError`` for a path or shape that ``base`` does not have.
    """
    flat = _base_of(tau, base, check)
    scalar = _scalar(scale)
    updates = {path: _with_path(path, _apply_delta, delta, flat[path], scalar, donate) for path, delta in tau.items()}
    return tree.like(base, flat | updates)


def _base_of(tau: TaskVector, base: Any, check: bool) -> dict[str, Any]:
    """``base`` by path, with every path of ``tau``; with ``check`` verified, where its values are known."""
    flat = tree.flatten(base)
    missing = [path for path in tau.deltas if path not in flat]
    if missing:
        raise ValueError(
            f"the task vector changes {missing[0]!r}, which these parameters do not have; tau.exclude(pattern) leaves it out"
        )
    # Checksums come to the host, which values under `jit` cannot.
    if check and all(concrete(x) for x in flat.values()):
        manifests.verify(tau.manifest, flat)
    return flat


def revert(params: Any, tau: TaskVector, scale: Any = 1.0, exact: bool = False, donate: bool = False) -> Any:
    """``params - scale * tau``: undoes :func:`apply` as far as floats allow.

    For a weight ``w`` that became ``v``, the result is within ``ulp(v) / 2 + ulp(w)`` of ``w`` for dense and sparse deltas,
    ulp being the spacing of the dtype of the parameters; low rank and sums add their own float32 rounding. Weights the
    vector does not reach are untouched. exact: refuse (:class:`jft.delta.BaseMismatch`) unless the result is, bit for bit,
    the base of the vector. donate: as in :func:`apply`. What must come back exactly is better kept: ``apply`` does not
    consume its base unless told to. Raises ``ValueError`` for a vector with masks or gates, which the result does not tell
    how to undo: revert ``tau.resolve(base)``, or keep the base.
    """
    for path, delta in tau.items():
        # Before anything is computed: with `donate` there is no way back.
        _with_path(path, standing_alone, "reverting", delta)
    # Unchecked: these are not the base, but what became of it.
    base = apply(params, tau, -scale, check=False, donate=donate)
    if exact:
        if not tau.manifest.get("base"):
            raise ValueError("exact=True needs a task vector that knows its base; this one's manifest has no 'base'")
        manifests.verify(tau.manifest, base, "the reverted parameters")
    return base


def _apply_delta(delta: Encoding, w: Any, scale: Any, donate: bool) -> Array:
    # Tracers and NumPy arrays have no sharding to keep; under `jit` the caller's program fuses it.
    if concrete(w) and isinstance(w, jax.Array):
        return _apply_program(w.sharding, donate)(w, delta, scale)
    return delta.apply_to(jnp.asarray(w), scale)


@program_cache(maxsize=256)
def _apply_program(sharding: Any, donate: bool) -> Callable[[Array, Encoding, Any], Array]:
    """One fused program, its result where the weight is: float32 copies live only inside it."""
    program = lambda w, delta, scale: delta.apply_to(w, scale)
    return jax.jit(program, out_shardings=sharding, donate_argnums=0 if donate else ())


@jax.jit
def _subtract(old: Array, new: Array) -> tuple[Array, Array, Array]:
    """The difference, whether any bit differs, whether all is finite."""
    delta = wide(new) - wide(old)
    return delta, _bits_differ(old, new), jnp.all(jnp.isfinite(delta))


@jax.jit
def _bits_differ(old: Array, new: Array) -> Array:
    # As bits: 0.0 and -0.0 differ, and a NaN is equal to itself.
    if jnp.issubdtype(old.dtype, jnp.floating) and old.dtype == new.dtype:
        bits = np.dtype(f"uint{np.dtype(old.dtype).itemsize * 8}")
        old, new = (jax.lax.bitcast_convert_type(x, bits) for x in (old, new))
    return jnp.any(old != new)


def _difference(path: str, old: Any, new: Any) -> Array | None:
    old, new = jnp.asarray(old), jnp.asarray(new)
    if not (jnp.issubdtype(old.dtype, jnp.inexact) and jnp.issubdtype(new.dtype, jnp.inexact)):
        # Step counters and tables of integers may be among the parameters, as long as they do not change.
        if bool(_bits_differ(old, new)):
            raise ValueError(f"{path!r} is {old.dtype} and changed; a task vector holds floating-point weights only")
        return None
    delta, differs, finite = _subtract(old, new)
    if not bool(differs):
        return None
    # Where nothing differs the base may hold infinities; a difference may not.
    if not bool(finite):
        raise ValueError(f"tuned - base is not finite at {path!r}; did the run diverge?")
    return delta


def _same_structure(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    # Both ways: neither tree may have a leaf more.
    for first, second, name, other in ((base, tuned, "base", "tuned"), (tuned, base, "tuned", "base")):
        missing = [path for path in first if path not in second]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"{missing[0]!r}{more} is in {name} but not in {other}; a task vector needs equal trees")
    for path, old in base.items():
        if tuple(old.shape) != tuple(tuned[path].shape):
            raise ValueError(f"{path!r} has shape {tuple(old.shape)} in base but {tuple(tuned[path].shape)} in tuned")


def _scalar(c: Any) -> Any:
    """``c`` as a float, or as a float32 scalar where it is traced; refused unless it is one finite number."""
    if isinstance(c, jax.core.Tracer):
        if c.shape != ():
            raise ValueError(f"a task vector is multiplied by one number, not by an array of shape {c.shape}")
        return c
    # A bool is neither, so `True * tau` is refused.
    dtype = getattr(c, "dtype", None) or np.asarray(c).dtype
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if np.ndim(c) != 0 or not is_real or not np.isfinite(float(c)):
        raise ValueError(f"a task vector is multiplied by one finite number, not {c!r}")
    return float(c)


def _with_path(path: str, fn: Callable, *args: Any) -> Any:
    """``fn(*args)``, its ``ValueError`` naming the path."""
    try:
        return fn(*args)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None
