"""Parts that kernels for selected blocks share: the pick of an implementation, the check of blocks, tiles of them on a TPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.tree import visible

Array = jax.Array
IMPLEMENTATIONS = (None, "xla", "pallas")
LANES = 128
# Bytes of VMEM for the tiles of one kernel: half of what XLA lets one kernel have on a v5e, where nobody asks for more.
VMEM = 8 << 20
# Copies in flight hide the latency of one; with more tiles a step, filling and draining the pipeline would show.
MOST_TILES = 8

# 8 bytes each, of a mebibyte of scalar memory.
MOST_BLOCKS = 1 << 16


def choose(
    implementation: str | None, tiles: Tiles | str, pallas: Callable, xla: Callable, *args: Any, interpret: Any = False
) -> Any:
    """The result of one of two forms of a function: ``xla(*args)``, or ``pallas(*args, tiles=, interpret=)``.

    ``implementation``: ``"xla"`` or ``"pallas"``, or None for Pallas where the program is lowered for a TPU and XLA
    elsewhere. tiles may be the reason why the Pallas form cannot take these arguments: then None is XLA everywhere.

    Raises ``ValueError`` for another name, and for ``"pallas"`` where it cannot be.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    kernel = functools.partial(pallas, tiles=tiles, interpret=interpret)
    if implementation == "pallas":
        if isinstance(tiles, str):
            raise ValueError(f"implementation 'pallas': {tiles}; leave implementation out, or use 'xla'")
        return kernel(*args)
    if implementation == "xla" or isinstance(tiles, str):
        return xla(*args)
    return jax.lax.platform_dependent(*args, tpu=kernel, default=xla)


def check_blocks(blocks: Any, shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``blocks`` are distinct blocks of a matrix of ``shape``, or padding.

    blocks int32 ``[n, 2]``: row and column, in blocks of ``block = (b, c)``. Padding has a row of I / b or more. Values are
    looked at where there are any: not under ``jit``.
    """
    if len(shape) != 2 or min(block) < 1 or shape[0] % block[0] or shape[1] % block[1]:
        raise ValueError(
            f"blocks of {block[0]} x {block[1]} do not divide a weight of shape {tuple(shape)}; "
            "it must be a matrix [I, O] with I a multiple of the first and O of the second"
        )
    if len(blocks.shape) != 2 or blocks.shape[1] != 2 or blocks.dtype != jnp.int32:
        raise ValueError(
            f"blocks are {blocks.dtype}{list(blocks.shape)}; they must be int32[n, 2], the row and column of each in blocks"
        )
    if not visible(blocks) or not len(blocks):
        return
    at = np.asarray(blocks)
    extents = np.array([shape[0] // block[0], shape[1] // block[1]])
    padding = at[:, 0] >= extents[0]
    outside = ~padding & ((at < 0) | (at >= extents)).any(axis=1)
    if outside.any():
        raise ValueError(
            f"block {tuple(at[outside][0].tolist())} is outside a weight of {extents[0]} x {extents[1]} blocks; "
            f"rows count from 0 to {extents[0] - 1} (padding: {extents[0]} and more), columns to {extents[1] - 1}"
        )
    values, counts = np.unique(at, axis=0, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"block {tuple(values[counts > 1][0].tolist())} occurs {counts.max()} times; blocks must be distinct, padding "
            f"too (rows {extents[0]}, {extents[0] + 1}, ...): add values that belong together first"
        )


def parity(step: Any) -> Any:
    """Which of two buffers a step uses."""
    # `%` of JAX asks for signs, which Pallas lowers for chips that it knows alone.
    return jax.lax.rem(step, 2)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel goes through ``count`` blocks ``[b, c]`` of a weight: ``group`` tiles ``[rows, c]`` a step.

    A block is ``split`` tiles, one below the other, so that any size of block fits in VMEM. The last step may have fewer
    than ``group`` tiles.
    """

    count: int
    block: tuple[int, ...]
    extents: tuple[int, int]
    rows: int
    group: int

    @classmethod
    def of(
        cls, n: int, block: tuple[int, ...], shape: tuple[int, ...], dtypes: Sequence[Any], nbytes: int
    ) -> Tiles | str:
        """The tiles for a kernel that holds ``nbytes`` of VMEM for each element of a tile, or why there are none.

        dtypes: those of all arrays in blocks. Only float32 and bfloat16 have a place in vector registers.
        """
        if any(dtype not in (jnp.float32, jnp.bfloat16) for dtype in dtypes):
            return f"dtypes {', '.join(str(jnp.dtype(d)) for d in dtypes)} are not float32 and bfloat16"
        b, c = block
        # A tile of HBM or VMEM has 8 rows of 4 bytes or 16 of 2, by 128 lanes: a copy takes whole ones.
        sublanes = 32 // min(jnp.dtype(dtype).itemsize for dtype in dtypes)
        if b % sublanes or c % LANES:
            return f"blocks of {b} x {c} are not in multiples of {sublanes} rows and {LANES} columns"
        if n > MOST_BLOCKS:
            return f"{n} blocks are more than the {MOST_BLOCKS} that scalar memory has room for"
        most = VMEM // (nbytes * c)
        rows = max((r for r in range(sublanes, b + 1, sublanes) if b % r == 0 and r <= most), default=None)
        if rows is None:
            return f"{sublanes} rows of a block of {b} x {c} take more than {VMEM} bytes of VMEM"
        group = min(MOST_TILES, most // rows, n * (b // rows))
        return cls(n, block, (shape[0] // b, shape[1] // c), rows, group)

    @property
    def split(self) -> int:
        """Tiles of a block."""
        return self.block[0] // self.rows

    @property
    def steps(self) -> int:
        return -(-self.count * self.split // self.group)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the tiles of one step."""
        return self.group, self.rows, self.block[1]

    def cut(self, x: Array) -> Array:
        """Blocks ``[n, b, c]`` as tiles ``[n * split, rows, c]``: the same bytes."""
        return x.reshape(self.count * self.split, self.rows, self.block[1])

    def joined(self, x: Array) -> Array:
        """The inverse of :meth:`cut`."""
        return x.reshape(self.count, *self.block)

    def each(self, blocks: Any, step: Any, act: Callable[[Any, Any, tuple[Any, Any]], None]) -> None:
        """``act(j, valid, (rows, columns))`` for the tiles of a step, inside a kernel: j in the group, slices of the weight.

        blocks: the reference to blocks ``[2, n]`` in scalar memory. valid is false for padding and past the last tile,
        where the slices mean nothing.
        """
        from jax.experimental import pallas as pl

        @pl.loop(0, self.group)
        def _(j: Any) -> None:
            tile = step * self.group + j
            k = jax.lax.div(jnp.minimum(tile, self.count * self.split - 1), self.split)
            row, column = blocks[0, k], blocks[1, k]
            valid = (tile < self.count * self.split) & (row >= 0) & (row < self.extents[0])
            # A copy from or to beyond the weight would be of other arrays, or end the program.
            valid &= (column >= 0) & (column < self.extents[1])
            rows = pl.ds(
                pl.multiple_of((row * self.split + jax.lax.rem(tile, self.split)) * self.rows, self.rows), self.rows
            )
            width = self.block[1]
            act(j, valid, (rows, pl.ds(pl.multiple_of(column * width, width), width)))

    def chunks(self, act: Callable[[tuple[Any, Any]], None]) -> None:
        """``act((rows, columns))`` for parts of a tile that registers hold, inside a kernel."""
        from jax.experimental import pallas as pl

        width = self.block[1]
        columns = max(size for size in range(LANES, 4 * LANES + 1, LANES) if width % size == 0)
        # 16 registers of 8 x 128 elements for each array: with fewer, latencies show.
        fits = (size for size in range(1, self.rows + 1) if self.rows % size == 0 and size * columns <= 16 * 8 * LANES)
        rows = max(fits)
        across = width // columns

        @pl.loop(0, self.rows // rows * across)
        def _(i: Any) -> None:
            row = pl.multiple_of(jax.lax.div(i, across) * rows, rows)
            column = pl.multiple_of(jax.lax.rem(i, across) * columns, columns)
            act((pl.ds(row, rows), pl.ds(column, columns)))

    def moves(self, blocks: Any, copy: Callable[[Any, tuple[Any, Any]], Any], counts: Any) -> tuple[Callable, Callable]:
        """``start(step)`` and ``wait(step)`` of the copies of a step, inside a kernel.

        ``copy(place, (rows, columns))`` describes one; place: the buffer, one of two by
        turns, and the tile in it. counts: scalar memory ``[2]``, how many are in flight for each buffer.
        """
        from jax.experimental import pallas as pl

        def start(step: Any) -> None:
            counts[parity(step)] = 0

            def one(j: Any, valid: Any, at: tuple[Any, Any]) -> None:
                @pl.when(valid)
                def _() -> None:
                    copy((parity(step), j), at).start()
                    counts[parity(step)] += 1

            self.each(blocks, step, one)

        def wait(step: Any) -> None:
            first = pl.ds(0, self.rows), pl.ds(0, self.block[1])

            @pl.loop(0, counts[parity(step)])
            def _(_: Any) -> None:
                # All are of one size, and that is all a wait reads of its copy.
                copy((parity(step), 0), first).wait()

        return start, wait

    def grid(self, inputs: Sequence[str], outputs: Sequence[str], scratch: Sequence[Any]) -> Any:
        """The grid over the steps, of a kernel that has the blocks first, in scalar memory.

        inputs and outputs: ``"weight"`` stays in HBM, for copies by hand; ``"tiles"`` come and go step by step;
        ``"scalars"`` are in scalar memory. scratch: dtypes of two buffers each for the tiles of a step, with
        semaphores and counts of what is in flight.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        specs = {
            "weight": pl.BlockSpec(memory_space=pltpu.HBM),
            "tiles": pl.BlockSpec(self.shape, lambda step, _: (step, 0, 0)),
            "scalars": pl.BlockSpec(memory_space=pltpu.SMEM),
        }
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(self.steps,),
            in_specs=[specs[place] for place in inputs],
            out_specs=[specs[place] for place in outputs],
            scratch_shapes=[
                part
                for dtype in scratch
                for part in (
                    pltpu.VMEM((2, *self.shape), dtype),
                    pltpu.SemaphoreType.DMA((2,)),
                    pltpu.SMEM((2,), jnp.int32),
                )
            ],
        )
