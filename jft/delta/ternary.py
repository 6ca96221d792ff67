"""`Ternary`: a delta of entries that are all plus or minus one scale, and zero elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.delta.changed import Change
from jft.delta.encoding import Encoding, entry_index
from jft.delta.entries import Entries
from jft.delta.numeric import wide
from jft.delta.registry import by_rule, register, rule
from jft.tree import host

Array = jax.Array


@register("ternary", data=("rows", "columns", "negative", "scale"), static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class Ternary(Encoding):
    """``delta[rows, columns] = -scale where negative else scale``, zero elsewhere; coordinates as in :class:`Entries`.

    negative: bool ``[n]``; scale: float32, a scalar, or ``[L]`` or ``[L, E]`` for one scale a layer or expert: its axes are
    the first of the weight's. In a file the coordinates are Elias-Fano coded and each sign is a bit: of ``n`` entries of
    ``d``, about ``n (log2(d / n) + 3)`` bits. Sums, and what else needs values, go through :attr:`entries`.
    """

    rows: Array
    columns: Array
    negative: Array
    scale: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property

    def __post_init__(self) -> None:
        # The coordinates are checked and sorted there, and the signs with them.
        entries = Entries(self.rows, self.columns, self.negative, self.shape)
        leading = tuple(jnp.shape(self.scale))
        if leading != entries.shape[: len(leading)] or len(leading) >= len(entries.shape):
            raise ValueError(
                f"the scale of ternary entries of a weight of shape {entries.shape} has its first axes, or none, not {leading}"
            )
        if entries.values.dtype != np.bool_:
            raise ValueError(f"the signs of ternary entries are bools, true for minus, not {entries.values.dtype}")
        for name, value in (
            ("rows", entries.rows), ("columns", entries.columns), ("negative", entries.values), ("shape", entries.shape),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, delta: Array, support: Array, scale: Any) -> Ternary:
        """``scale * sign(delta)`` where ``support`` (bool, of its shape) is true and ``delta`` is not zero."""
        signs = Entries.from_dense(jnp.asarray(delta) < 0, support & (jnp.asarray(delta) != 0))
        return cls(signs.rows, signs.columns, signs.values, jnp.asarray(scale, jnp.float32), signs.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @property
    def entries(self) -> Entries:
        """The same with a value for each entry."""
        scale = wide(self.scale)
        if scale.ndim:
            scale = scale[entry_index(self.shape, self.rows, self.columns)[: scale.ndim]]
        values = jnp.where(self.negative, -scale, scale)
        # Past the checks, which hold for these coordinates already.
        new = object.__new__(Entries)
        for name, value in (("rows", self.rows), ("columns", self.columns), ("values", values), ("shape", self.shape)):
            object.__setattr__(new, name, value)
        return new

    def dense(self) -> Array:
        return self.entries.dense()

    def scaled(self, c: Any) -> Ternary:
        return self._with(scale=wide(self.scale) * c)

    def stacked(self) -> Change:
        return self.entries.stacked()

    def add_to(self, w: Array) -> Array:
        return self.entries.add_to(w)

    def apply_to(self, w: Array, scale: Any = 1.0) -> Array:
        return self.entries.apply_to(w, scale)

    def dot_dense(self, value: Array) -> Array:
        return self.entries.dot_dense(value)

    def coordinates(self) -> tuple[Array, Array, Array]:
        return self.entries.coordinates()

    def take(self, rows: Array, columns: Array) -> Array:
        return self.entries.take(rows, columns)

    def written(self, w: Array) -> Array:
        return self.entries.written(w)

    def minus(self, base: Array) -> Entries:
        return self.entries.minus(base)

    def under(self, above: Encoding) -> Encoding:
        return self.entries.under(above)

    def norm(self) -> Array:
        return self.entries.norm()

    @property
    def nnz(self) -> int:
        return self.entries.nnz

    def pack(self) -> tuple[dict[str, Array], dict[str, Any]]:
        tensors, static = Entries(self.rows, self.columns, self.negative, self.shape).pack()
        negative = np.packbits(host(tensors.pop("values")))
        # The last byte may hold up to seven bits more than there are entries.
        count = int(self.rows.shape[0])
        return {**tensors, "negative": negative, "scale": self.scale}, {**static, "count": count}  # type: ignore[dict-item]

    @classmethod
    def unpack(cls, tensors: Mapping[str, Any], static: Mapping[str, Any]) -> Ternary:
        tensors, static = dict(tensors), dict(static)
        if set(tensors) != {"low", "high", "negative", "scale"} or "count" not in static:
            raise ValueError(
                "a ternary delta has fields low, high, negative, scale, shape, coding, crc32, count, not "
                f"{[*tensors, *static]}"
            )
        packed, count = np.asarray(tensors.pop("negative")), int(static.pop("count"))
        if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
            raise ValueError(f"its {count} signs need {-(-count // 8)} bytes, not {packed.dtype} {packed.shape}")
        scale = tensors.pop("scale")
        negative = jnp.asarray(np.unpackbits(packed, count=count).astype(np.bool_))
        signs = Entries.unpack({**tensors, "values": negative}, static)
        return cls(signs.rows, signs.columns, signs.values, scale, signs.shape)


@rule("+", Ternary, Ternary)
def _sum(x: Ternary, y: Ternary) -> Entries | None:
    return by_rule("+", x.entries, y.entries)


@rule("+", Ternary, Entries)
def _sum_with_entries(x: Ternary, y: Entries) -> Entries | None:
    return by_rule("+", x.entries, y)


@rule("dot", Ternary, Ternary)
def _dot(x: Ternary, y: Ternary) -> Array | None:
    return by_rule("dot", x.entries, y.entries)


@rule("dot", Ternary, Entries)
def _dot_with_entries(x: Ternary, y: Entries) -> Array | None:
    return by_rule("dot", x.entries, y)
