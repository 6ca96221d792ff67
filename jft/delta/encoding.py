"""`Encoding`: the change of one weight, in whatever form is natural; with `Dense` and `Sum`, which close the algebra.

A new encoding is one class in one file, decorated with :func:`register`. It must give ``shape``, ``dtype``, ``dense`` and
``scaled``; everything else has a default that is right, and worth replacing where the encoding can do better. What two
encodings can do together without becoming dense is a :func:`rule`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree

Array = jax.Array
E = TypeVar("E", bound="Encoding")

_KINDS: dict[str, type[Encoding]] = {}
_RULES: dict[tuple[str, type, type], Callable[[Any, Any], Any]] = {}
_COUNTED_AT_ONCE = 2**30


def wide(x: Any) -> Array:
    """``x`` in float32, or as it is where it is wider or complex: the precision all arithmetic on deltas is done in."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.jit
def inner(a: Array, b: Array) -> Array:
    """``sum(a * b)`` in float32, the product never stored."""
    return jnp.sum(wide(a) * wide(b))


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` in full float32, where an accelerator would otherwise round the factors to fewer bits."""
    return jnp.matmul(wide(a), wide(b), precision=jax.lax.Precision.HIGHEST)


def count_nonzero(x: Array) -> int:
    """Non-zero elements, exactly, also beyond 2**31 of them."""
    if x.ndim == 0 or x.size <= _COUNTED_AT_ONCE:
        return int(jnp.count_nonzero(x))
    if x.shape[0] == 1:
        return count_nonzero(x[0])
    pieces = min(x.shape[0], x.size // _COUNTED_AT_ONCE + 1)
    return sum(count_nonzero(piece) for piece in jnp.array_split(x, pieces))


def concrete(x: Any) -> bool:
    """Whether the values of ``x`` can be looked at: not under a transformation, not a shape alone."""
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer)


class Encoding(abc.ABC):
    """The change ``delta`` of one weight.

    Subclasses are frozen dataclasses registered as pytrees: their arrays may be sharded, traced, donated. Leading axes
    (stacked layers, experts) are part of ``shape``. Arithmetic is done in float32 whatever the stored dtype; its results
    are float32 (float64 only where the delta already is).
    """

    kind: ClassVar[str]
    _data: ClassVar[tuple[str, ...]]
    _static: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:  # at run time a subclass may have it as a property or as a field

        @property
        def shape(self) -> tuple[int, ...]:
            """The shape of the weight."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The dtype the values are stored in."""

    @abc.abstractmethod
    def dense(self) -> Array:
        """``delta`` itself, float32, of ``shape``."""

    @abc.abstractmethod
    def scaled(self: E, c: Any) -> E:
        """``c * delta`` for a scalar ``c``, in the same encoding."""

    def add_to(self, w: Array) -> Array:
        """``w + delta`` for a float32 ``w``."""
        return w + self.dense()

    def apply_to(self, w: Array, scale: Any = 1.0) -> Array:
        """``w + scale * delta``, computed in float32 and rounded once, to the dtype of ``w``.

        Raises ``ValueError`` where ``w`` has another shape or is not floating-point.
        """
        if tuple(w.shape) != self.shape:
            raise ValueError(f"a delta of shape {self.shape} cannot be applied to a weight of shape {tuple(w.shape)}")
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            raise ValueError(f"a delta cannot be applied to a weight of dtype {w.dtype}; floating-point weights only")
        return self.scaled(scale).add_to(wide(w)).astype(w.dtype)

    def dot_dense(self, value: Array) -> Array:
        """``sum(delta * value)`` with a dense array of the same shape."""
        return inner(self.dense(), value)

    @property
    def nnz(self) -> int:
        """Entries of ``delta`` that may be non-zero.

        Exact where the encoding holds the entries themselves (stored zeros are not counted), an upper bound where it
        does not (low rank: all of them). Looks at the values, so not under ``jit``.
        """
        return tree.size(self)

    @property
    def nbytes(self) -> int:
        """Bytes the encoding takes as it is stored."""
        return tree.nbytes(self)

    def astype(self: E, dtype: Any) -> E:
        """The same with its floating-point values stored in ``dtype``."""
        return tree.cast(self, dtype)

    def norm(self) -> Array:
        """``sqrt(sum(delta**2))``, float32 scalar."""
        return jnp.sqrt(jnp.maximum(self.dot(self), 0))

    def dot(self, other: Encoding) -> Array:
        """``sum(delta * other)``, float32 scalar, without forming either densely where a rule allows."""
        _same_shape("dot", self, other)
        done = _by_rule("dot", self, other)
        if done is not None:
            return done
        for a, b in ((self, other), (other, self)):
            if isinstance(a, Sum):
                return sum((part.dot(b) for part in a.parts), jnp.float32(0))
        if isinstance(self, Dense):
            return other.dot_dense(self.value)
        return self.dot_dense(other.dense())

    def __add__(self, other: Encoding) -> Encoding:
        """The sum in the closest common encoding; dense once that takes no more memory."""
        if not isinstance(other, Encoding):
            return NotImplemented
        _same_shape("+", self, other)
        if isinstance(self, Dense):
            return Dense(other.add_to(wide(self.value)))
        if isinstance(other, Dense):
            return Dense(self.add_to(wide(other.value)))
        return _compact(_merged(_parts(self), _parts(other)))

    def __neg__(self: E) -> E:
        return self.scaled(-1.0)

    def __sub__(self, other: Encoding) -> Encoding:
        return self + -other

    def __mul__(self: E, c: Any) -> E:
        return self.scaled(c)

    __rmul__ = __mul__

    def pack(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Named tensors and JSON-able constants that :meth:`unpack` makes the same encoding of."""
        return {f: getattr(self, f) for f in self._data}, {f: getattr(self, f) for f in self._static}

    @classmethod
    def unpack(cls: type[E], tensors: Mapping[str, Any], static: Mapping[str, Any]) -> E:
        """The inverse of :meth:`pack`. Raises ``ValueError`` for fields that are missing or make no encoding."""
        if set(tensors) != set(cls._data) or set(static) != set(cls._static):
            raise ValueError(f"a {cls.kind} delta has fields {[*cls._data, *cls._static]}, not {[*tensors, *static]}")
        return cls(**tensors, **static)

    def _with(self: E, **changes: Any) -> E:
        """A copy with some fields changed, not checked again."""
        new = object.__new__(type(self))
        for name in (*self._data, *self._static):
            object.__setattr__(new, name, changes.get(name, getattr(self, name)))
        return new


def register(kind: str, *, data: tuple[str, ...], static: tuple[str, ...] = ()) -> Callable[[type[E]], type[E]]:
    """Class decorator: a frozen dataclass as an encoding and a pytree; ``kind`` is its name in files.

    data: the fields that hold arrays (or tuples of encodings); static: the hashable, JSON-able others.
    """

    def add(cls: type[E]) -> type[E]:
        if kind in _KINDS:
            raise ValueError(f"encoding {kind!r} is registered already")
        cls.kind, cls._data, cls._static = kind, data, static

        def flatten(x: E) -> tuple[tuple, tuple]:
            return tuple(getattr(x, f) for f in data), tuple(getattr(x, f) for f in static)

        def flatten_with_keys(x: E) -> tuple[tuple, tuple]:
            children, aux = flatten(x)
            return tuple(zip(map(jax.tree_util.GetAttrKey, data), children, strict=True)), aux

        def unflatten(aux: tuple, children: Any) -> E:
            # Past __init__: JAX also rebuilds pytrees around placeholders, which no check could accept.
            new = object.__new__(cls)
            for name, value in zip((*data, *static), (*children, *aux), strict=True):
                object.__setattr__(new, name, value)
            return new

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        _KINDS[kind] = cls
        return cls

    return add


def kinds() -> dict[str, type[Encoding]]:
    """Every registered encoding, by its name in files."""
    return dict(_KINDS)


def rule(operation: str, first: type, second: type) -> Callable[[Callable], Callable]:
    """Decorator: how ``operation`` ("+" or "dot") goes for this pair of encodings, in either order.

    The function may return None where it cannot (say, values not known under ``jit``); the default then applies.
    """

    def add(fn: Callable) -> Callable:
        _RULES[operation, first, second] = fn
        return fn

    return add


def _by_rule(operation: str, a: Encoding, b: Encoding) -> Any:
    for x, y in ((a, b), (b, a)):
        fn = _RULES.get((operation, type(x), type(y)))
        if fn is not None:
            return fn(x, y)
    return None


def _same_shape(operation: str, a: Encoding, b: Encoding) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{operation} of deltas of different shapes: {a.shape} and {b.shape}")


def _parts(x: Encoding) -> tuple[Encoding, ...]:
    return x.parts if isinstance(x, Sum) else (x,)


def _merged(parts: tuple[Encoding, ...], others: tuple[Encoding, ...]) -> list[Encoding]:
    """All parts, each of ``others`` merged into the first it has a rule with."""
    result = list(parts)
    for new in others:
        for i, old in enumerate(result):
            merged = _by_rule("+", old, new)
            if merged is not None:
                result[i] = merged
                break
        else:
            result.append(new)
    return result


def _compact(parts: list[Encoding]) -> Encoding:
    whole = parts[0] if len(parts) == 1 else Sum(tuple(parts))
    itemsize = np.dtype(jnp.promote_types(whole.dtype, jnp.float32)).itemsize
    return Dense(whole.dense()) if whole.nbytes >= tree.size(whole) * itemsize else whole


@register("dense", data=("value",))
@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Encoding):
    """Every entry: ``value [...]``."""

    value: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def dense(self) -> Array:
        return wide(self.value)

    def scaled(self, c: Any) -> Dense:
        return self._with(value=wide(self.value) * c)

    def dot_dense(self, value: Array) -> Array:
        return inner(self.value, value)

    @property
    def nnz(self) -> int:
        return count_nonzero(jnp.asarray(self.value))


@register("sum", data=("parts",))
@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Encoding):
    """``sum(parts)`` of encodings that have no closer common form, kept apart: exact, and as small as its parts."""

    parts: tuple[Encoding, ...]

    def __post_init__(self) -> None:
        shapes = {part.shape for part in self.parts}
        if len(shapes) != 1:
            raise ValueError(f"a sum needs at least one part, all of one shape; got shapes {sorted(shapes)}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> Any:
        return jnp.result_type(*(part.dtype for part in self.parts))

    def dense(self) -> Array:
        first, *rest = self.parts
        total = first.dense()
        for part in rest:
            total = part.add_to(total)
        return total

    def scaled(self, c: Any) -> Sum:
        return self._with(parts=tuple(part.scaled(c) for part in self.parts))

    def add_to(self, w: Array) -> Array:
        for part in self.parts:
            w = part.add_to(w)
        return w

    @property
    def nnz(self) -> int:
        return min(tree.size(self), sum(part.nnz for part in self.parts))

    def pack(self) -> tuple[dict[str, Array], dict[str, Any]]:
        tensors: dict[str, Array] = {}
        constants = []
        for i, part in enumerate(self.parts):
            arrays, static = part.pack()
            tensors |= {f"{i}.{name}": array for name, array in arrays.items()}
            constants.append({"kind": part.kind, **static})
        return tensors, {"parts": constants}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Any], static: Mapping[str, Any]) -> Sum:
        parts = []
        for i, constants in enumerate(static.get("parts", ())):
            own = {name.removeprefix(f"{i}."): x for name, x in tensors.items() if name.startswith(f"{i}.")}
            parts.append(kinds()[constants["kind"]].unpack(own, {k: v for k, v in constants.items() if k != "kind"}))
        return cls(tuple(parts))
