"""The forms in which products with selected blocks run: XLA's, a platform's Pallas kernel, and either of them on a mesh.

at ``[gi, gj, n, 2]``, values ``[gi, gj, n, b, c]``: cells of a weight, as :mod:`jft.delta.selected` lays them out.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

Array = jax.Array
Implementation = Literal["pallas", "xla", "interpret"] | None
Names = tuple[str, ...]
# Modules of Pallas kernels by platform, as XLA names it; imported where they are needed, since that takes a third of a second.
KERNELS = {"tpu": "jft.kernels.blocks_tpu", "cuda": "jft.kernels.block_sddmm_gpu"}


class Axes(NamedTuple):
    """Names of mesh axes over which a product is cut. tokens: the rows of x; rows, columns, lead: axes of the weight."""

    tokens: Names = ()
    rows: Names = ()
    columns: Names = ()
    lead: tuple[Names, ...] = ()

    def transposed(self) -> Axes:
        return self._replace(rows=self.columns, columns=self.rows)

    def weight(self, mesh: Any, at_shape: Sequence[int]) -> PartitionSpec | None:
        """The sharding of a weight with cells ``at[*lead, gi, gj, n, 2]``; None where they are not those of devices."""
        free = spread_names(mesh)
        # A layer of a stack has none of the leading axes.
        lead = self.lead[len(self.lead) - (len(at_shape) - 4) :]
        cut = [tuple(name for name in names if name in free) for names in (*lead, self.rows, self.columns)]
        ways = [math.prod(mesh.shape[name] for name in names) for names in cut[-2:]]
        return PartitionSpec(*cut) if free and ways == list(at_shape[-4:-2]) and len(cut) == len(at_shape) - 2 else None

    def on(self, mesh: Any, shape: tuple[int, int, int], grid: Sequence[int]) -> Axes | None:
        """Those of them that cut ``(T, I, O)`` of this ``shape`` in ``mesh``; None where devices cannot work by themselves.

        grid: cells along the weight's rows and columns; an axis that has not as many cells as devices is whole.
        """
        free = spread_names(mesh)
        tokens, rows, columns = (tuple(name for name in names if name in free) for names in self[:3])
        ways = lambda names: math.prod(mesh.shape[name] for name in names)
        rows, columns = (names if ways(names) == g else () for names, g in zip((rows, columns), grid, strict=True))
        # Cells that some axes of a tuple share and others cut do not lie beside each other.
        mixed = any(0 < len(set(names) & set(tokens)) < len(names) for names in (rows, columns))
        if not free or mixed or shape[0] % ways(tokens) or set(rows) & set(columns):
            return None
        return Axes(tokens, rows, columns)


NO_AXES = Axes()


def spread_names(mesh: Any) -> list[str]:
    """Axes of a mesh over which XLA spreads arrays by itself: of more than one device, and not those of a `shard_map`."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1]


def spmm(
    x: Array,
    at: Array,
    values: Array,
    *,
    columns: int,
    implementation: Implementation = None,
    axes: Axes = NO_AXES,
    mesh: Any = None,
    platform: str | None = None,
) -> Array:
    """``x[T, I] @ S`` in ``[T, columns]``; see :func:`jft.kernels.blocks.block_spmm`."""
    kernel = _kernel(implementation, platform)

    def local(x: Array, at: Array, values: Array, columns: int) -> Array:
        b, c = values.shape[-2:]
        values = values.astype(x.dtype)
        refusal = kernel and kernel.refuses_spmm(x, math.prod(at.shape[:-1]), (b, c), columns)
        if kernel is None or _falls_back(implementation, refusal):
            return spmm_xla(x, at, values, columns=columns)
        row, column = _panels(at, (x.shape[1] // b, columns // c))
        return kernel.spmm(
            x, row, column, values.reshape(-1, b, c), columns=columns, interpret=implementation == "interpret"
        )

    if mesh is None:
        return local(x, at, values, columns)
    cut = _Cut.of(axes)

    def on_device(x: Array, at: Array, values: Array) -> Array:
        for axis, names in enumerate(cut.gathered):
            if names:
                values = jax.lax.all_gather(values, names, axis=axis, tiled=True)
        y = local(x, at, values, columns // math.prod(mesh.shape[name] for name in cut.own[1]))
        return jax.lax.psum(y, cut.own[0]) if cut.own[0] else y

    return on_devices(on_device, mesh, (cut.inputs, cut.at, cut.cells), cut.outputs)(x, at, values)


def sddmm(
    x: Array,
    dy: Array,
    at: Array,
    *acc: Array,
    block: tuple[int, int],
    dtype: Any,
    implementation: Implementation = None,
    axes: Axes = NO_AXES,
    mesh: Any = None,
    platform: str | None = None,
) -> Array:
    """``acc + x[:, rows]^T dy[:, columns]`` in ``[gi, gj, n, b, c]``; see :func:`jft.kernels.blocks.block_sddmm`."""
    kernel = _kernel(implementation, platform)

    def local(x: Array, dy: Array, at: Array, *acc: Array, dtype: Any) -> Array:
        refusal = kernel and kernel.refuses_sddmm(x, dy, math.prod(at.shape[:-1]), block, dtype)
        if kernel is None or _falls_back(implementation, refusal):
            return sddmm_xla(x, dy, at, *acc, block=block, dtype=dtype)
        row, column = _panels(at, (x.shape[1] // block[0], dy.shape[1] // block[1]))
        flat = acc[0].reshape(-1, *block) if acc else None
        interpret = implementation == "interpret"
        g = kernel.sddmm(x, dy, row, column, block=block, acc=flat, out_dtype=dtype, interpret=interpret)
        return g.reshape(*at.shape[:-1], *block)

    if mesh is None:
        return local(x, dy, at, *acc, dtype=dtype)
    cut = _Cut.of(axes)

    def on_device(x: Array, dy: Array, at: Array, *acc: Array) -> Array:
        # Sums over devices in float32 too, as those over tokens.
        g = local(x, dy, at, dtype=jnp.promote_types(dtype, jnp.float32))
        for axis, names in enumerate(cut.gathered):
            if names:
                g = jax.lax.psum_scatter(g, names, scatter_dimension=axis, tiled=True)
        g = jax.lax.psum(g, cut.summed) if cut.summed else g
        return sum(acc, g).astype(dtype)  # type: ignore[union-attr]

    specs = (cut.inputs, cut.outputs, cut.at, *(cut.cells for _ in acc))
    return on_devices(on_device, mesh, specs, cut.cells)(x, dy, at, *acc)


def put(w: Array, blocks: Array, values: Array, *, platform: str | None = None) -> Array:
    """``w[L, I, O]`` with ``values[L, n, b, c]`` in its blocks; see :func:`jft.kernels.blocks.stack_put`."""
    result = (
        importlib.import_module("jft.kernels.block_put").stack_put_pallas(w, blocks, values)
        if platform == "tpu"
        else None
    )
    return jax.vmap(put_xla)(w, blocks, values) if result is None else result


def _kernel(implementation: Implementation, platform: str | None) -> Any:
    """The module of Pallas kernels to use, or None for XLA's form."""
    if implementation == "xla":
        return None
    name = KERNELS.get("tpu" if implementation == "interpret" else platform or "")
    if implementation == "pallas" and name is None:
        raise ValueError(
            f"there is no Pallas kernel for {platform or 'this platform'}: leave implementation out, or take 'xla'"
        )
    return name and importlib.import_module(name)


def _falls_back(implementation: Implementation, refusal: str | None) -> bool:
    """Whether XLA's form stands in for a kernel that refuses these shapes; ``ValueError`` where the kernel was demanded."""
    if refusal and implementation is not None:
        raise ValueError(f"the Pallas kernel does not take {refusal}: leave implementation out, or take 'xla'")
    return refusal is not None


# XLA's forms.


def spmm_xla(x: Array, at: Array, values: Array, *, columns: int) -> Array:
    """Panels of x times blocks, summed by column."""
    b, c = values.shape[-2:]
    row, column = _panels(at, (x.shape[1] // b, columns // c))
    parts = _einsum("tnb,nbc->tnc", _take(x, b, row), values.reshape(-1, b, c).astype(x.dtype))
    y = jnp.zeros((x.shape[0], columns // c, c), parts.dtype).at[:, column].add(parts, mode="drop")
    return y.reshape(x.shape[0], columns).astype(x.dtype)


def sddmm_xla(x: Array, dy: Array, at: Array, *acc: Array, block: tuple[int, int], dtype: Any) -> Array:
    """Panels of x times panels of dy."""
    b, c = block
    row, column = _panels(at, (x.shape[1] // b, dy.shape[1] // c))
    g = _einsum("tnb,tnc->nbc", _take(x, b, row), _take(dy, c, column))
    return sum(acc, g.reshape(*at.shape[:-1], b, c)).astype(dtype)  # type: ignore[union-attr]


def gather_xla(w: Array, blocks: Array, *, block: tuple[int, ...]) -> Array:
    """:func:`jft.kernels.block_put.block_gather` by windows of ``lax.gather``."""
    # Plain indexing would make an index for every entry of a block.
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1))
    starts = blocks * jnp.asarray(block, blocks.dtype)
    return jax.lax.gather(w, starts, numbers, block, mode="fill", fill_value=0, unique_indices=True)


def put_xla(w: Array, blocks: Array, values: Array) -> Array:
    """:func:`jft.kernels.block_put.block_put` by windows of ``lax.scatter``."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0, 1)
    )
    starts = blocks * jnp.asarray(values.shape[1:], blocks.dtype)
    # `drop`: padding lies past the end.
    return jax.lax.scatter(w, starts, values.astype(w.dtype), numbers, mode="drop", unique_indices=True)


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    """The products of ``a`` and ``b`` in float32, or wider."""
    sums = jnp.promote_types(a.dtype, jnp.float32)
    accumulate = functools.partial(jnp.einsum, subscripts, preferred_element_type=sums)
    if a.dtype == sums:
        return accumulate(a, b)
    # XLA's CPU backend has no batched product of bfloat16 that is summed in float32.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: accumulate(a.astype(sums), b.astype(sums)), default=accumulate
    )


def _panels(at: Array, counts: tuple[int, int]) -> tuple[Array, Array]:
    """Rows and columns of blocks in the whole weight, ``[gi * gj * n]`` each; ``counts``: its blocks along both axes.

    Padding gets the row and the column past the last.
    """
    gi, gj = at.shape[:2]
    inside = counts[0] // gi, counts[1] // gj
    row = at[..., 0] + jnp.arange(gi, dtype=at.dtype)[:, None, None] * inside[0]
    column = at[..., 1] + jnp.arange(gj, dtype=at.dtype)[None, :, None] * inside[1]
    valid = (at[..., 0] < inside[0]) & (at[..., 1] < inside[1])
    return jnp.where(valid, row, counts[0]).reshape(-1), jnp.where(valid, column, counts[1]).reshape(-1)


def _take(x: Array, size: int, index: Array) -> Array:
    """Panels ``[T, n, size]`` of ``x[T, I]``; zeros past the last."""
    return jnp.take(x.reshape(x.shape[0], x.shape[1] // size, size), index, axis=1, mode="fill", fill_value=0)


# On a mesh.


class _Cut(NamedTuple):
    """How operands lie on a mesh. own, gathered: axes of rows and of columns, that tokens are not cut by, and that they are.

    A device has all cells of a gathered axis in its product, for its own tokens: values are gathered over it and gradients
    summed, each device keeping its part. Of the other axes it has its own cells, inputs and outputs.
    """

    own: tuple[Names, Names]
    gathered: tuple[Names, Names]
    summed: Names
    inputs: PartitionSpec
    outputs: PartitionSpec
    at: PartitionSpec
    cells: PartitionSpec

    @classmethod
    def of(cls, axes: Axes) -> _Cut:
        tokens, *both = axes[:3]
        own = tuple(() if set(names) & set(tokens) else names for names in both)
        gathered = tuple(names if set(names) & set(tokens) else () for names in both)
        summed = tuple(name for name in tokens if name not in (*gathered[0], *gathered[1]))
        inputs, outputs = (PartitionSpec(tokens, names) for names in own)
        return cls(own, gathered, summed, inputs, outputs, PartitionSpec(*own), PartitionSpec(*both))  # type: ignore[arg-type]


def on_devices(function: Callable, mesh: Any, inputs: tuple, output: Any) -> Callable:
    """``function`` of the parts that each device has."""
    # Pallas's interpreter and kernels know nothing of varying axes.
    return functools.partial(jax.shard_map, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False)(function)
