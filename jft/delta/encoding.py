"""`Encoding`: the change of one weight, in whatever form is natural; with `Dense` and `Sum`, which close the algebra.

A new encoding is one class in one file, decorated with :func:`jft.delta.register`. It must give ``shape``, ``dtype``,
``dense`` and ``scaled``; everything else has a default that is right, and worth replacing where the encoding can do
better. What two encodings can do together without becoming dense is a :func:`jft.delta.rule`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.delta.changed import Change, Leaf
from jft.delta.numeric import count_nonzero, inner, wide
from jft.delta.registry import by_rule, kinds, register

Array = jax.Array
E = TypeVar("E", bound="Encoding")


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

    @property
    def relative(self) -> bool:
        """Whether ``delta`` is a function of the weight it is added to (masks, gates), not a value of its own.

        Such a delta applies, scales, adds up (in a :class:`Sum`, all parts of which see the base) and saves as any other. What
        needs its value, :meth:`dense`, :meth:`dot`, :meth:`norm`, needs the base, and raises ``ValueError`` without it.
        """
        return False

    def resolve(self, base: Array) -> Encoding:
        """The same change of ``base`` as an encoding that is not :attr:`relative`; itself where it is none."""
        return self

    @abc.abstractmethod
    def dense(self) -> Array:
        """``delta`` itself, float32, of ``shape``. Raises ``ValueError`` where it is :attr:`relative`."""

    @abc.abstractmethod
    def scaled(self: E, c: Any) -> E:
        """``c * delta`` for a scalar ``c``, in the same encoding."""

    def stacked(self) -> Change:
        """The same in the form in which programs hold it; whole where there is none, or indices cannot be looked at."""
        # Some encodings are forms of change already: what files and programs hold is the same.
        return self if isinstance(self, Change) else Dense(self.dense())

    def add_to(self, w: Array) -> Array:
        """``w + delta`` for a float32 ``w``."""
        return w + self.dense()

    def apply_to(self, w: Array, scale: Any = 1.0) -> Array:
        """``w + scale * delta``, computed in float32 and rounded once, to the dtype of ``w``.

        Raises ``ValueError`` where ``w`` has another shape or is not floating-point.
        """
        self._fits(w)
        return self.scaled(scale).add_to(wide(w)).astype(w.dtype)

    def _fits(self, w: Array) -> None:
        if tuple(w.shape) != self.shape:
            raise ValueError(f"a delta of shape {self.shape} cannot be applied to a weight of shape {tuple(w.shape)}")
        # An integer would round the change away without a word.
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            raise ValueError(f"a delta cannot be applied to a weight of dtype {w.dtype}; floating-point weights only")

    def dot_dense(self, value: Array) -> Array:
        """``sum(delta * value)`` with a dense array of the same shape."""
        return inner(self.dense(), value)

    def coordinates(self) -> tuple[Array, Array, Array] | None:
        """``(rows, columns, values)``, each ``[n]``, of the entries an encoding stores; None where it stores no entries.

        The weight is the matrix ``[prod(shape[:-1]), shape[-1]]``; a vector is one row.
        """
        return None

    def take(self, rows: Array, columns: Array) -> Array:
        """``delta[rows, columns]``, ``[n]``, of the same matrix."""
        return self.dense()[entry_index(self.shape, rows, columns)]

    @property
    def nnz(self) -> int:
        """Entries of ``delta`` that may be non-zero.

        Exact where the encoding holds the entries themselves (stored zeros are not counted), an upper bound where it
        does not (low rank: all of them). Looks at the values, so not under ``jit``.
        """
        return tree.size(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of the encoding; in a file entries take less (:mod:`jft.delta.elias_fano`)."""
        return tree.nbytes(self)

    def astype(self: E, dtype: Any) -> E:
        """The same with its floating-point values stored in ``dtype``."""
        return tree.cast(self, dtype)

    def norm(self) -> Array:
        """``sqrt(sum(delta**2))``, float32 scalar."""
        # Where parts cancel, rounding may leave the sum of squares below zero.
        return jnp.sqrt(jnp.maximum(self.dot(self), 0))

    def dot(self, other: Encoding) -> Array:
        """``sum(delta * other)``, float32 scalar, without forming either densely unless both have no closer form."""
        _same_shape("dot", self, other)
        standing_alone("the inner product or norm", self, other)
        # From the closest form to the widest: a rule for the pair, parts of a sum, one dense side, entries, both dense.
        product = by_rule("dot", self, other)
        if product is not None:
            return product
        for a, b in ((self, other), (other, self)):
            if isinstance(a, Sum):
                return sum((part.dot(b) for part in a.parts), jnp.float32(0))
        if isinstance(self, Dense):
            return other.dot_dense(self.value)
        if isinstance(other, Dense):
            return self.dot_dense(other.value)
        # Entries of the smaller one are looked up in the other.
        for a, b in sorted(((self, other), (other, self)), key=lambda pair: pair[0].nbytes):
            entries = a.coordinates()
            if entries is not None:
                rows, columns, values = entries
                return inner(values, b.take(rows, columns))
        return self.dot_dense(other.dense())

    # An encoding may also hold values themselves, those of a weight where it stores any, and not a change of them.

    def written(self, w: Array) -> Array:
        """``w`` with these values in place of its own, in its dtype."""
        return self.dense().astype(w.dtype)

    def minus(self, base: Array) -> Encoding:
        """The change from ``base`` to these values, float32."""
        return Dense(self.dense() - wide(base))

    def under(self, above: Encoding) -> Encoding:
        """These values and those of ``above``, which count where both store some. Not under ``jit``."""
        return above if isinstance(above, Dense) else Dense(above.written(self.dense()))

    def __add__(self, other: Encoding) -> Encoding:
        """The sum in the closest common encoding; dense once that takes no more memory."""
        if not isinstance(other, Encoding):
            return NotImplemented
        _same_shape("+", self, other)
        return _compact(_merge(_parts(self), _parts(other)))

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
        # The checks hold for the fields it is made of, and could not look at values that are traced.
        new = object.__new__(type(self))
        for name in (*self._data, *self._static):
            object.__setattr__(new, name, changes.get(name, getattr(self, name)))
        return new


def entry_index(shape: tuple[int, ...], rows: Array, columns: Array) -> tuple[Array, ...]:
    """The index into a weight of ``shape`` of entries of the matrix ``[prod(shape[:-1]), shape[-1]]``.

    One index per axis: reshaping a sharded weight would gather it, and no flat id of an entry need fit int32. Rows past
    the end stay past the end.
    """
    return (*unravel(rows, shape[:-1]), columns)


def unravel(flat: Array, extents: tuple[int, ...]) -> tuple[Array, ...]:
    """``flat`` as one index per axis; the first is not wrapped. None for no extents."""
    index = []
    # The last axis varies fastest. The first takes what remains, so that ids past the end stay past it.
    for extent in reversed(extents[1:]):
        index.append(flat % extent)
        flat = flat // extent
    return (flat, *reversed(index)) if extents else ()


def standing_alone(operation: str, *encodings: Encoding) -> None:
    """Refuse ``operation`` where an encoding is relative to a base that is not there."""
    for x in encodings:
        if x.relative:
            raise ValueError(
                f"{operation} of a delta of encoding {x.kind!r} needs the base it is relative to; "
                "resolve(base), of the delta or of the TaskVector, gives one that stands alone"
            )


def _same_shape(operation: str, a: Encoding, b: Encoding) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{operation} of deltas of different shapes: {a.shape} and {b.shape}")


def _parts(x: Encoding) -> tuple[Encoding, ...]:
    return x.parts if isinstance(x, Sum) else (x,)


def _merge(parts: tuple[Encoding, ...], others: tuple[Encoding, ...]) -> list[Encoding]:
    """All parts, each of ``others`` merged into the first that has a rule for the two."""
    result = list(parts)
    for new in others:
        for i, old in enumerate(result):
            total = _merge_pair(old, new)
            if total is not None:
                result[i] = total
                break
        else:
            result.append(new)
    return result


def _merge_pair(a: Encoding, b: Encoding) -> Encoding | None:
    for x, y in ((a, b), (b, a)):
        # A mask or gate changes the base, not the part it would be added to.
        if isinstance(x, Dense) and not y.relative:
            return Dense(y.add_to(wide(x.value)))
    return by_rule("+", a, b)


def _compact(parts: list[Encoding]) -> Encoding:
    """The sum of ``parts``; those that need no base as one dense array, once that takes no more memory."""
    # Masks and gates have no dense value without the base.
    absolute = [part for part in parts if not part.relative]
    if absolute:
        total = _sum_of(absolute)
        # That of the dense result, whatever the parts are stored in.
        itemsize = np.dtype(jnp.promote_types(total.dtype, jnp.float32)).itemsize
        if total.nbytes >= tree.size(total) * itemsize:
            absolute = [Dense(total.dense())]
    return _sum_of([*absolute, *(part for part in parts if part.relative)])


def _sum_of(parts: list[Encoding]) -> Encoding:
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


@register("dense", data=("value",))
@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Encoding, Change):
    """Every entry: ``value [...]``."""

    value: Array
    factors = ("value",)
    is_array = True
    leaves = Leaf()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def dense(self) -> Array:
        return wide(self.value)

    def whole(self, dtype: Any) -> Array:
        return self.value.astype(dtype)

    def transposed(self) -> Dense:
        return self._with(value=jnp.swapaxes(self.value, -1, -2))

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
        standing_alone("the dense value", self)
        first, *rest = self.parts
        total = first.dense()
        for part in rest:
            total = part.add_to(total)
        return total

    def scaled(self, c: Any) -> Sum:
        return self._with(parts=tuple(part.scaled(c) for part in self.parts))

    @property
    def relative(self) -> bool:
        return any(part.relative for part in self.parts)

    def resolve(self, base: Array) -> Encoding:
        # By `+`, not as a Sum again: parts that had to stay apart may merge once they need no base.
        first, *rest = (part.resolve(base) for part in self.parts)
        return sum(rest, first)

    def add_to(self, w: Array) -> Array:
        # Every part is one of w, not of what the parts before it made of w; the first, a mask or gate, is exact.
        total = w
        for i, part in enumerate(sorted(self.parts, key=lambda part: not part.relative)):
            total = (part.resolve(w) if i else part).add_to(total)
        return total

    def take(self, rows: Array, columns: Array) -> Array:
        return sum((part.take(rows, columns) for part in self.parts), jnp.float32(0))

    def astype(self, dtype: Any) -> Sum:
        return self._with(parts=tuple(part.astype(dtype) for part in self.parts))

    @property
    def nnz(self) -> int:
        # Parts may overlap: an upper bound.
        return min(tree.size(self), sum(part.nnz for part in self.parts))

    def pack(self) -> tuple[dict[str, Array], dict[str, Any]]:
        return pack_parts(self.parts)

    @classmethod
    def unpack(cls, tensors: Mapping[str, Any], static: Mapping[str, Any]) -> Sum:
        return cls(unpack_parts(tensors, static))


def pack_parts(parts: Sequence[Encoding]) -> tuple[dict[str, Array], dict[str, Any]]:
    """What :meth:`Encoding.pack` gives for an encoding made of others."""
    tensors: dict[str, Array] = {}
    constants = []
    for i, part in enumerate(parts):
        arrays, static = part.pack()
        tensors |= {f"{i}.{name}": array for name, array in arrays.items()}
        # A file names the kind of the whole, not of its parts.
        constants.append({"kind": part.kind, **static})
    return tensors, {"parts": constants}


def unpack_parts(tensors: Mapping[str, Any], static: Mapping[str, Any]) -> tuple[Encoding, ...]:
    """The inverse of :func:`pack_parts`."""
    parts = []
    for i, constants in enumerate(static.get("parts", ())):
        # With the point, or part 1 would take the fields of part 10.
        arrays = {name.removeprefix(f"{i}."): x for name, x in tensors.items() if name.startswith(f"{i}.")}
        parts.append(kinds()[constants["kind"]].unpack(arrays, {k: v for k, v in constants.items() if k != "kind"}))
    return tuple(parts)
