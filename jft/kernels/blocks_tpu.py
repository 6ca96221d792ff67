"""Pallas kernels for TPU of the products with selected blocks: x and dy pass through the chip once, sums stay in its VMEM.

:func:`sddmm` keeps the float32 sums of all blocks (64 KiB each, of 128 x 128) in VMEM while tiles of tokens stream by. Where
they do not fit, blocks are taken in groups, sorted by column, and x streams once for each group, dy once in all: a tile of dy
is one panel of columns, and a group meets only its own panels. :func:`spmm` keeps the values of all blocks there, and the
float32 sums of one tile of outputs.

The chip multiplies 128 x 128 at once, so blocks are multiples of 128.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jft.kernels import tuning
from jft.kernels.pallas import LANES, parity

Array = jax.Array
# Blocks in one pass of an inner loop: with fewer, the multiplier waits for the first rows of each.
UNROLL = 8


def vmem() -> int:
    """Bytes of VMEM that a kernel may take: seven eighths of the chip's, or of the smallest of those since v5e."""
    try:
        # The chip that is here, or that of the mesh in whose context a program is lowered.
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        capacity = 64 * 2**20
    return capacity // 8 * 7


@dataclasses.dataclass(frozen=True)
class Config:
    """tile: tokens of a grid step. panels: of dy's columns. groups: of blocks. unroll: blocks in one pass of the loop."""

    tile: int
    panels: int = 1
    groups: int = 1
    unroll: int = UNROLL

    def passes(self, tokens: int, n: int) -> int:
        """Passes of the inner loop over all steps, if every group meets one panel; others add a part of a pass each."""
        return -(-tokens // self.tile) * self.groups * math.ceil(math.ceil(n / self.groups) / self.unroll)

    def vmem(self, inputs: int, outputs: int, n: int, block: tuple[int, int], itemsize: int, out_itemsize: int) -> int:
        """Bytes of VMEM: two buffers of each tile, the sums, and two blocks on their way out."""
        tiles = 2 * self.tile * (inputs + outputs // self.panels) * itemsize
        cells = math.prod(block)
        return tiles + (-(-n // self.groups) + 1) * cells * 4 + 2 * cells * out_itemsize


def heuristic(
    tokens: int, inputs: int, outputs: int, n: int, block: tuple[int, int], itemsize: int, out_itemsize: int = 4
) -> Config | None:
    """The configuration of :func:`sddmm` that moves fewest bytes, with the largest tiles, within :func:`vmem`; or None."""
    sublanes = 32 // itemsize
    tiles = [t for t in (1024, 512, 256, 128) if t < 2 * tokens] or [-(-tokens // sublanes) * sublanes]
    panels = [p for p in (1, 2, 4, 8, 16, 32) if outputs // block[1] % p == 0]
    # Every group streams x once more. Panels cost a sort; small tiles load and store the sums more often.
    order = sorted(itertools.product(tiles, panels), key=lambda c: (-min(c[0], 512), c[1], -c[0]))
    for groups, (tile, panel) in itertools.product(range(1, 9), order):
        config = Config(tile, panel, groups)
        if config.vmem(inputs, outputs, n, block, itemsize, out_itemsize) <= vmem():
            return config
    return None


def candidates(x: Any, dy: Any, n: int, block: tuple[int, int], out_dtype: Any) -> list[Config]:
    """Configurations of :func:`sddmm` to be timed, the heuristic's first."""
    first = config_of(x, dy, n, block, out_dtype)
    if first is None:
        return []
    sizes = jnp.dtype(x.dtype).itemsize, jnp.dtype(out_dtype).itemsize
    others = (
        Config(tile, panels, first.groups, unroll)
        for tile, panels, unroll in itertools.product((256, 512, 1024, 2048), (1, 2, 4), (4, 8))
        if tile <= x.shape[0] and dy.shape[1] // block[1] % panels == 0
    )
    fitting = (config for config in others if config.vmem(x.shape[1], dy.shape[1], n, block, *sizes) <= vmem())
    return list(dict.fromkeys([first, *fitting]))


def refuses_sddmm(x: Any, dy: Any, n: int, block: tuple[int, int], out_dtype: Any) -> str | None:
    """What of these shapes and dtypes :func:`sddmm` does not take; None where it takes them."""
    refusal = _refuses(x, n, block)
    if refusal is None and not config_of(x, dy, n, block, out_dtype):
        refusal = f"{n} blocks beside tiles of {x.shape[1]} + {dy.shape[1]} columns, which do not fit into VMEM"
    return refusal


def _refuses(x: Any, n: int, block: tuple[int, int]) -> str | None:
    if any(size % LANES for size in block):
        return f"blocks of {block[0]} x {block[1]} (multiples of {LANES} it does)"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{x.dtype} (bfloat16 and float32 it does)"
    if not n or not x.shape[0]:
        return "no blocks or no tokens"
    return None


def config_of(x: Any, dy: Any, n: int, block: tuple[int, int], out_dtype: Any) -> Config | None:
    """The configuration of :func:`sddmm` that was fastest where it was timed, else the heuristic's; None for none."""
    timed = tuning.lookup(tuning.sddmm_case(x, dy, n, block))
    if timed is not None:
        return Config(**timed)
    sizes = jnp.dtype(x.dtype).itemsize, jnp.dtype(out_dtype).itemsize
    return heuristic(x.shape[0], x.shape[1], dy.shape[1], n, block, *sizes)


def sddmm(
    x: Array,
    dy: Array,
    row: Array,
    column: Array,
    *,
    block: tuple[int, int],
    acc: Array | None = None,
    out_dtype: Any = jnp.float32,
    config: Config | None = None,
    interpret: Any = False,
) -> Array:
    """``acc[n] + x[:, row n]^T dy[:, column n]``, ``[n, b, c]``, for x ``[T, I]``, dy ``[T, O]``, row and column int32 ``[n]``.

    Rows and columns count blocks; past the end is padding, which adds nothing. Tokens that are no multiple of the tile are
    padded (a copy of x and dy).
    """
    (tokens, inputs), outputs, n = x.shape, dy.shape[1], row.shape[0]
    config = config or config_of(x, dy, n, block, out_dtype)
    assert config is not None, "refuses_sddmm is asked first"
    missing = -tokens % config.tile
    if missing:
        x, dy = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x, dy))
    m = -(-n // config.groups)
    width = outputs // config.panels
    panel = jnp.minimum(column // (width // block[1]), config.panels - 1)
    # By panel, so that a group meets few; with one panel any order will do.
    order = jnp.argsort(panel, stable=True).astype(jnp.int32) if config.panels > 1 else jnp.arange(n, dtype=jnp.int32)
    row, column, panel = row[order], column[order], panel[order]
    starts = _starts(panel, m, config)
    scalars = row, column, order, starts, _reads(starts)
    body = functools.partial(
        _sddmm_body,
        n=n,
        m=m,
        block=block,
        width=width,
        limit=inputs // block[0],
        config=config,
        has_acc=acc is not None,
    )
    somewhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [
        pl.BlockSpec((config.tile, inputs), lambda g, t, p, *_: (t, 0)),
        pl.BlockSpec((config.tile, width), lambda g, t, p, row, column, order, starts, reads: (t, reads[g, p])),
    ]
    traffic = config.groups * x.nbytes + dy.nbytes + n * math.prod(block) * jnp.dtype(out_dtype).itemsize
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(config.groups, x.shape[0] // config.tile, config.panels),
            in_specs=in_specs + [somewhere] * (acc is not None),
            out_specs=somewhere,
            scratch_shapes=[
                pltpu.VMEM((m + 1, *block), jnp.float32),
                pltpu.VMEM((2, *block), out_dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((n, *block), out_dtype),
        input_output_aliases={len(scalars) + 2: 0} if acc is not None else {},
        # Two cores of a chip (v5p) may share groups, each of which starts and ends by itself.
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem() // 15 * 16, dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * n * math.prod(block), bytes_accessed=traffic, transcendentals=0
        ),
        interpret=interpret,
        name="block_sddmm",
    )
    return call(*scalars, x, dy, *(() if acc is None else (acc.astype(out_dtype),)))


def _starts(panel: Array, m: int, config: Config) -> Array:
    """Where the blocks of each panel begin and end in each group of ``m``, ``[groups, panels + 1]``; panels are sorted."""
    bounds = jnp.searchsorted(panel, jnp.arange(config.panels + 1), side="left")
    first = jnp.arange(config.groups)[:, None] * m
    return jnp.clip(bounds, first, jnp.minimum(first + m, panel.shape[0])).astype(jnp.int32)


def _reads(starts: Array) -> Array:
    """The panel of dy that each step of a group reads, ``[groups, panels]``: one without blocks is not fetched."""
    full = starts[:, 1:] > starts[:, :-1]
    # A constant, where XLA would make a program of its own for nothing.
    if full.shape[1] == 1:
        return jnp.zeros(full.shape, jnp.int32)
    before = jax.lax.cummax(jnp.where(full, jnp.arange(full.shape[1], dtype=jnp.int32), -1), axis=1)
    # What is read already is not fetched again; ahead of the first panel with blocks that is this one.
    return jnp.where(before < 0, jnp.argmax(full, axis=1, keepdims=True).astype(jnp.int32), before)


def _sddmm_body(row, column, order, starts, reads, x, dy, *rest, n, m, block, width, limit, config, has_acc):  # type: ignore[no-untyped-def]
    o, sums, stage, sent = rest[has_acc:]
    g, t, p = (pl.program_id(axis) for axis in range(3))
    first = g * m
    count = jnp.minimum(n - first, m)
    (b, c), zero = block, jnp.int32(0)

    @pl.when((t == 0) & (p == 0))
    def _start():
        if has_acc:

            def fetch(i, _):  # type: ignore[no-untyped-def]
                copy = pltpu.make_async_copy(o.at[order[first + i]], stage.at[0], sent.at[0])
                copy.start()
                copy.wait()
                sums[i] = stage[0].astype(jnp.float32)
                return _

            jax.lax.fori_loop(zero, count, fetch, None)
        else:

            def clear(i, _):  # type: ignore[no-untyped-def]
                sums[i] = jnp.zeros_like(sums[i])
                return _

            jax.lax.fori_loop(zero, count, clear, None)

    begin, end = starts[g, p], starts[g, p + 1]

    def multiply(k, _):  # type: ignore[no-untyped-def]
        for u in range(config.unroll):
            i = begin + k * config.unroll + u
            here = jnp.minimum(i, n - 1)
            valid = (i < end) & (row[here] < limit)
            # Padding, and what is past the end in the last pass, goes to a place of its own: no branch in the loop.
            place = jnp.where(valid, i - first, m)
            across = pl.multiple_of(jnp.minimum(row[here], limit - 1) * b, b)
            along = pl.multiple_of(jnp.clip(column[here] * c - p * width, 0, width - c), c)
            sums[place] += jax.lax.dot_general(
                x[:, pl.ds(across, b)],
                dy[:, pl.ds(along, c)],
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        return _

    # `//` looks up the sign on the chip that is here, which a program may not be compiled for.
    passes = jax.lax.div(end - begin + (config.unroll - 1), config.unroll)
    jax.lax.fori_loop(zero, passes, multiply, None)

    @pl.when((t == pl.num_programs(1) - 1) & (p == config.panels - 1))
    def _finish():
        def send(i, _):  # type: ignore[no-untyped-def]
            slot = parity(i)
            copy = pltpu.make_async_copy(stage.at[slot], o.at[order[first + i]], sent.at[slot])

            # The buffer is free once the copy before the last has left it.
            @pl.when(i >= 2)
            def _wait():
                copy.wait()

            stage[slot] = sums[i].astype(stage.dtype)
            copy.start()
            return _

        jax.lax.fori_loop(zero, count, send, None)
        for slot in range(2):

            @pl.when(count > slot)
            def _last(slot=slot):  # type: ignore[no-untyped-def]
                pltpu.make_async_copy(stage.at[slot], o.at[0], sent.at[slot]).wait()


def refuses_spmm(x: Any, n: int, block: tuple[int, int], columns: int) -> str | None:
    """What of these shapes and dtypes :func:`spmm` does not take; None where it takes them."""
    refusal = _refuses(x, n, block)
    if refusal is None and not _spmm_tile(x.shape, n, block, columns, jnp.dtype(x.dtype).itemsize):
        refusal = f"{n} blocks beside tiles of {x.shape[1]} + {columns} columns, which do not fit into VMEM"
    return refusal


def _spmm_tile(shape: tuple[int, ...], n: int, block: tuple[int, int], columns: int, itemsize: int) -> int | None:
    """Tokens of a grid step of :func:`spmm`; None where not even few fit."""
    tokens, inputs = shape
    values = n * math.prod(block) * itemsize
    for tile in (1024, 512, 256, 128):
        # Two buffers of x and y, and the float32 sums.
        if (
            tile < 2 * tokens
            and values + tile * (2 * (inputs + columns) * itemsize + 4 * (columns + block[1])) <= vmem()
        ):
            return tile
    sublanes = 32 // itemsize
    return -(-tokens // sublanes) * sublanes if tokens < 64 and values <= vmem() // 2 else None


def spmm_passes(shape: tuple[int, int], n: int, block: tuple[int, int], columns: int, itemsize: int) -> int | None:
    """Passes of the inner loop of :func:`spmm` over all steps; None where it takes no such shapes."""
    tile = _spmm_tile(shape, n, block, columns, itemsize)
    return None if tile is None else math.ceil(shape[0] / tile) * math.ceil(n / UNROLL)


def spmm(x: Array, row: Array, column: Array, values: Array, *, columns: int, interpret: Any = False) -> Array:
    """``x @ S``, ``[T, columns]``, for x ``[T, I]``, values ``[n, b, c]`` of its dtype at row and column int32 ``[n]``."""
    (tokens, inputs), (n, b, c) = x.shape, values.shape
    tile = _spmm_tile(x.shape, n, (b, c), columns, x.dtype.itemsize)
    assert tile is not None, "refuses_spmm is asked first"
    padded = jnp.pad(x, ((0, -tokens % tile), (0, 0))) if tokens % tile else x
    flops, traffic = 2 * tokens * n * b * c, x.nbytes + values.nbytes + tokens * columns * x.dtype.itemsize
    y = pl.pallas_call(
        functools.partial(_spmm_body, n=n, block=(b, c), limit=inputs // b, columns=columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(padded.shape[0] // tile,),
            in_specs=[
                pl.BlockSpec((tile, inputs), lambda t, *_: (t, 0)),
                # They stay, so that a second buffer would stand empty.
                pl.BlockSpec((n, b, c), lambda t, *_: (0, 0, 0), pipeline_mode=pl.Buffered(1)),
            ],
            out_specs=pl.BlockSpec((tile, columns), lambda t, *_: (t, 0)),
            scratch_shapes=[pltpu.VMEM((tile, columns + c), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((padded.shape[0], columns), x.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem() // 15 * 16, dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=traffic, transcendentals=0),
        interpret=interpret,
        name="block_spmm",
    )(row, column, padded, values)
    return y[:tokens] if tokens % tile else y


def _spmm_body(row, column, x, values, y, sums, *, n, block, limit, columns):  # type: ignore[no-untyped-def]
    b, c = block
    sums[...] = jnp.zeros_like(sums)

    def multiply(k, _):  # type: ignore[no-untyped-def]
        for u in range(UNROLL):
            i = k * UNROLL + u
            here = jnp.minimum(i, n - 1)
            valid = (i < n) & (row[here] < limit)
            across = pl.multiple_of(jnp.minimum(row[here], limit - 1) * b, b)
            # As above, what is not there goes to columns of its own.
            along = pl.multiple_of(jnp.where(valid, column[here] * c, columns), c)
            sums[:, pl.ds(along, c)] += jnp.dot(
                x[:, pl.ds(across, b)], values[here], preferred_element_type=jnp.float32
            )
        return _

    jax.lax.fori_loop(0, -(-n // UNROLL), multiply, None)
    y[...] = sums[:, :columns].astype(y.dtype)
