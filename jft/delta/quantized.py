"""`Quantized`: a delta of integers of 2 to 8 bits with a scale for every group of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jft.delta.changed import COLUMNS, ROWS
from jft.delta.encoding import Encoding
from jft.delta.numeric import wide
from jft.delta.registry import register
from jft.tree import host

Array = jax.Array
_SHRINKAGES = 40  # scales that a search tries for a group: from that of the largest magnitude down to 1/40 of it


@register("quantized", data=("codes", "scale"), static=("shape", "bits", "group", "axis"))
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(Encoding):
    """``delta = scale * q``, q integers of ``bits`` bits, one scale for every ``group`` of them along ``axis`` (-1 or -2).

    With ``n`` entries along that axis, which is moved to the end: codes uint8 ``[..., bits, ceil(n / 8)]``, plane j holding
    bit j of every q in two's complement (``jnp.packbits``), so that any width takes its bits and no more; scale float32
    ``[..., ceil(n / group)]``. :meth:`of` quantizes.
    """

    codes: Array
    scale: Array
    shape: tuple[int, ...]  # type: ignore[misc]  # a field in place of the property
    bits: int
    group: int
    axis: int = COLUMNS

    def __post_init__(self) -> None:
        # A file gives the shape as a list; static fields must hash.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        _check(self.shape, self.bits, self.group, self.axis)
        *lead, n = _swapped(self.shape, self.axis)
        codes, scale = (*lead, self.bits, -(-n // 8)), (*lead, -(-n // self.group))
        if tuple(self.codes.shape) != codes or self.codes.dtype != jnp.uint8 or tuple(self.scale.shape) != scale:
            raise ValueError(
                f"{self.bits} bits of a weight of shape {self.shape} in groups of {self.group} are uint8 {codes} with scales "
                f"{scale}, not {self.codes.dtype} {tuple(self.codes.shape)} and {tuple(self.scale.shape)}"
            )

    @classmethod
    def of(
        cls, delta: Array, bits: int, group: int | None = None, axis: int = COLUMNS, search: bool = False
    ) -> Quantized:
        """``q = round(delta / scale)``, symmetric: ``|q| <= m = 2**(bits - 1) - 1`` and ``scale = max |delta| / m``.

        group: None is the whole axis. search: of scales down to a fortieth of that, which clip the largest, the one with the
        least squared error in its group; few bits need it. A group of zeros has scale 0.
        """
        delta = jnp.asarray(delta)
        # Before the extent is read, which a scalar does not have.
        _check(delta.shape, bits, 1 if group is None else group, axis)
        extent = delta.shape[axis]
        group = max(1, extent if group is None else min(group, extent))
        codes, scale = _quantize(wide(delta), bits, group, axis, search)
        return cls(codes, scale, delta.shape, bits, group, axis)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def dense(self) -> Array:
        return _dequantize(self.codes, self.scale, self.shape, self.bits, self.group, self.axis)

    def scaled(self, c: Any) -> Quantized:
        return self._with(scale=wide(self.scale) * c)

    def scaled_along(self, c: Array) -> Quantized:
        """The same with the vectors along ``axis`` multiplied by ``c [...]``, one number each."""
        return self._with(scale=wide(self.scale) * c[..., None])

    @property
    def nnz(self) -> int:
        any_bit = functools.reduce(jnp.bitwise_or, [self.codes[..., j, :] for j in range(self.bits)])
        # Each row in int32, the total on the host, which may be beyond 2**31.
        return int(host(jnp.sum(jax.lax.population_count(any_bit), axis=-1, dtype=jnp.int32)).sum(dtype="int64"))


def _check(shape: tuple[int, ...], bits: int, group: int, axis: int) -> None:
    if bits not in range(2, 9):
        raise ValueError(f"bits must be from 2 to 8, not {bits}")
    if group < 1:
        raise ValueError(f"group must be 1 or more, not {group}")
    if axis not in (ROWS, COLUMNS) or len(shape) < -axis:
        raise ValueError(f"a weight of shape {tuple(shape)} has no axis {axis} to group along; it may be -1 or -2")


def _swapped(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape if axis == COLUMNS else (*shape[:-2], shape[-1], shape[-2])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(delta: Array, bits: int, group: int, axis: int, search: bool) -> tuple[Array, Array]:
    x = jnp.moveaxis(delta, axis, -1)
    *lead, n = x.shape
    most = 2 ** (bits - 1) - 1
    groups = -(-n // group)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, groups * group - n)]).reshape(*lead, groups, group)
    scale = jnp.max(jnp.abs(x), axis=-1, initial=0) / most
    if search:
        scale = _least_error(x, scale, most)
    q = _round(x, scale, most).reshape(*lead, -1)[..., :n]
    planes = [jnp.packbits((q >> j & 1).astype(jnp.uint8), axis=-1) for j in range(bits)]
    return jnp.stack(planes, axis=-2), scale


def _round(x: Array, scale: Array, most: int) -> Array:
    # A group of zeros has no scale to divide by.
    safe = jnp.where(scale == 0, 1, scale)[..., None]
    return jnp.clip(jnp.round(x / safe), -most, most).astype(jnp.int32)


def _least_error(x: Array, widest: Array, most: int) -> Array:
    def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale = widest * (1 - i / _SHRINKAGES)
        error = jnp.sum((x - scale[..., None] * _round(x, scale, most)) ** 2, axis=-1)
        better = error < best[0]
        return jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])

    return jax.lax.fori_loop(0, _SHRINKAGES, step, (jnp.full_like(widest, jnp.inf), widest))[1]


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _dequantize(codes: Array, scale: Array, shape: tuple[int, ...], bits: int, group: int, axis: int) -> Array:
    n = _swapped(shape, axis)[-1]
    plane = lambda j: jnp.unpackbits(codes[..., j, :], axis=-1, count=n).astype(jnp.int32) << j
    # Two's complement: the highest bit counts negative.
    q = functools.reduce(jnp.add, map(plane, range(bits - 1))) - plane(bits - 1)
    scales = jnp.repeat(wide(scale), group, axis=-1, total_repeat_length=scale.shape[-1] * group)[..., :n]
    return jnp.moveaxis(q * scales, -1, axis)
