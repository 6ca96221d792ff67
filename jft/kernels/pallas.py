"""Parts that kernels for selected blocks share: the pick of an implementation, the check of blocks, tiles of them on a TPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.tree import visible

Array = jax.Array
LANES = 128
# Bytes of VMEM for the tiles of one kernel: half of what a kernel may have by default on the chip that grants least (v5e).
VMEM = 8 << 20
# Copies in flight hide the latency of one; with more tiles a step, filling and draining the pipeline would show.
MOST_TILES = 8
# 8 bytes each, of a mebibyte of scalar memory.
MOST_BLOCKS = 1 << 16


def choose(implementation: str | None, pallas: Callable | str, xla: Callable, *args: Any) -> Any:
    """``pallas(*args)`` or ``xla(*args)``, two forms of one function.

    implementation: ``"pallas"`` or ``"xla"``, or None for Pallas where the program is lowered for a TPU and XLA elsewhere.
    pallas: its form, or the reason why it cannot take these arguments, with which None is XLA everywhere.

    Raises ``ValueError`` for another name, and for ``"pallas"`` where it cannot be.
    """
    if implementation not in (None, "pallas", "xla"):
        raise ValueError(f"implementation {implementation!r} is not one of None, 'pallas', 'xla'")
    if isinstance(pallas, str):
        if implementation == "pallas":
            raise ValueError(f"implementation 'pallas': {pallas}; leave implementation out, or use 'xla'")
        return xla(*args)
    if implementation is None:
        return jax.lax.platform_dependent(*args, tpu=pallas, default=xla)
    return (pallas if implementation == "pallas" else xla)(*args)


def check_blocks(blocks: Any, shape: tuple[int, ...], block: Sequence[int], padding: bool = True) -> None:
    """Raise ``ValueError`` unless ``blocks`` are distinct blocks of a matrix of ``shape``, or where allowed padding.

    blocks int32 ``[n, 2]``: row and column, in blocks of ``block = (b, c)``. Padding has a row of I / b or more. Values are
    looked at where there are any: not under ``jit``.
    """
    if len(block) != 2 or len(shape) != 2 or min(block) < 1 or any(n % b for n, b in zip(shape, block, strict=True)):
        raise ValueError(
            f"blocks of {' x '.join(map(str, block))} do not divide a weight of shape {tuple(shape)}; "
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
    is_padding = padding & (at[:, 0] >= extents[0])
    outside = ~is_padding & ((at < 0) | (at >= extents)).any(axis=1)
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
    """0 and 1 by turns: the buffer of a step, of two."""
    # `%` takes a sign, which Pallas cannot lower where there is no TPU to ask for its generation.
    return jax.lax.rem(step, 2)


Slices = tuple[Any, Any]


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
        """Steps of the grid."""
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

    def each(self, blocks: Any, step: Any, act: Callable[[Any, Any, Slices], None]) -> None:
        """``act(j, valid, (rows, columns))`` for the tiles of a step, inside a kernel: j in the group, slices of the weight.

        blocks: the reference to blocks ``[2, n]`` in scalar memory. valid is false for padding and past the last tile,
        where the slices mean nothing.
        """
        from jax.experimental import pallas as pl

        width, last = self.block[1], self.count * self.split - 1

        @pl.loop(0, self.group)
        def one(j: Any) -> None:
            tile = step * self.group + j
            k = jax.lax.div(jnp.minimum(tile, last), self.split)
            row, column = blocks[0, k], blocks[1, k]
            # A copy from or to beyond the weight would be of other arrays, or end the program.
            valid = (row >= 0) & (row < self.extents[0]) & (column >= 0) & (column < self.extents[1])
            top = (row * self.split + jax.lax.rem(tile, self.split)) * self.rows
            rows = pl.ds(pl.multiple_of(top, self.rows), self.rows)
            act(j, valid & (tile <= last), (rows, pl.ds(pl.multiple_of(column * width, width), width)))

    def chunks(self, act: Callable[[Slices], None]) -> None:
        """``act((rows, columns))`` for parts of a tile that registers hold, inside a kernel."""
        from jax.experimental import pallas as pl

        width = self.block[1]
        columns = max(size for size in range(LANES, 4 * LANES + 1, LANES) if width % size == 0)
        # 16 registers of 8 x 128 elements for each array: with fewer, latencies show.
        most = 16 * 8 * LANES // columns
        rows = max(size for size in range(1, self.rows + 1) if self.rows % size == 0 and size <= most)
        across = width // columns

        @pl.loop(0, self.rows // rows * across)
        def one(i: Any) -> None:
            row = pl.multiple_of(jax.lax.div(i, across) * rows, rows)
            column = pl.multiple_of(jax.lax.rem(i, across) * columns, columns)
            act((pl.ds(row, rows), pl.ds(column, columns)))

    def copies(self, blocks: Any, source: Any, target: Any, sem: Any, counts: Any) -> tuple[Callable, Callable]:
        """``start(step)`` and ``wait(step)`` for the copies of a step, inside a kernel.

        One of source and target is the weight ``[I, O]``, the other a buffer ``[2, group, rows, c]`` for two steps by turns;
        sem ``[2]`` and counts ``[2]`` in scalar memory: what is in flight for either.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        def copy(turn: Any, j: Any, at: Slices) -> Any:
            begin, end = (ref.at[at] if len(ref.shape) == 2 else ref.at[turn, j] for ref in (source, target))
            return pltpu.make_async_copy(begin, end, sem.at[turn])

        def start(step: Any) -> None:
            turn = parity(step)
            counts[turn] = 0

            def one(j: Any, valid: Any, at: Slices) -> None:
                @pl.when(valid)
                def begin() -> None:
                    copy(turn, j, at).start()
                    counts[turn] += 1

            self.each(blocks, step, one)

        def wait(step: Any) -> None:
            turn = parity(step)
            anywhere = pl.ds(0, self.rows), pl.ds(0, self.block[1])

            @pl.loop(0, counts[turn])
            def one(_: Any) -> None:
                # A wait takes the size of its copy alone, and all have one size.
                copy(turn, 0, anywhere).wait()

        return start, wait

    def grid(self, inputs: Sequence[str], outputs: Sequence[str], buffers: Sequence[Any]) -> Any:
        """The grid over the steps, of a kernel that has the blocks first, in scalar memory.

        inputs and outputs: ``"weight"`` stays in HBM, for :meth:`copies`; ``"tiles"`` come and go step by step;
        ``"scalars"`` are in scalar memory. buffers: dtypes of those for :meth:`copies`, which get sem and counts as well.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        specs = {
            "weight": pl.BlockSpec(memory_space=pltpu.HBM),
            "tiles": pl.BlockSpec(self.shape, lambda step, _: (step, 0, 0)),
            "scalars": pl.BlockSpec(memory_space=pltpu.SMEM),
        }
        scratch: list[Any] = []
        for dtype in buffers:
            scratch += [pltpu.VMEM((2, *self.shape), dtype), pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((2,), jnp.int32)]
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(self.steps,),
            in_specs=[specs[place] for place in inputs],
            out_specs=[specs[place] for place in outputs],
            scratch_shapes=scratch,
        )

    def call(
        self,
        kernel: Callable,
        name: str,
        grid: Any,
        shapes: Sequence[Any],
        first: int | None,
        interpret: Any,
        moved: int,
    ) -> Any:
        """``pl.pallas_call`` of a kernel whose results have ``shapes`` and are in place of its operands from ``first`` on.

        Operands are counted with the blocks; first None: results of their own. moved: bytes that an element of a block is
        read and written, which XLA is told.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        return pl.pallas_call(
            kernel,
            grid_spec=grid,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
            input_output_aliases={} if first is None else {first + i: i for i in range(len(shapes))},
            interpret=interpret,
            # `each` has checked them, for a quarter of the instructions.
            compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
            cost_estimate=pl.CostEstimate(
                flops=0, transcendentals=0, bytes_accessed=moved * self.count * self.block[0] * self.block[1]
            ),
            name=name,
        )
