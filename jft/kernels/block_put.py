"""Selected blocks of a weight, read and written in place.

The XLA form is a windowed gather and a windowed scatter: in place on CPU and GPU. On a TPU they are loops of one small block
after another; the Pallas form there has the copies of several blocks in flight, and touches nothing else of the weight.
Both have derivatives of either mode.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jft.kernels.pallas import Tiles, check_blocks, choose, parity

Array = jax.Array


def block_gather(
    w: Array, blocks: Array, *, block: tuple[int, ...], implementation: str | None = None, _interpret: Any = False
) -> Array:
    """``w[i b : (i + 1) b, j c : (j + 1) c]`` for each block ``(i, j)``: ``[n, b, c]`` in the dtype of ``w``.

    w ``[I, O]``; blocks int32 ``[n, 2]``, row and column in blocks of ``block = (b, c)``, distinct, in any order. A slot of
    padding has a row of I / b or more, and reads zeros. implementation: ``"xla"``, ``"pallas"`` (TPU; float32 and bfloat16;
    c in multiples of 128 and b of 8, for 2 bytes of 16), or None for whichever suits the platform.

    Raises ``ValueError`` for blocks that do not divide ``w``, are outside it or occur twice, as far as they can be looked at.
    """
    check_blocks(blocks, w.shape, block)
    if len(blocks) == 0:
        return jnp.zeros((0, *block), w.dtype)
    return _gather(w, blocks, block, implementation, _interpret)


def block_put(
    w: Array, blocks: Array, values: Array, *, implementation: str | None = None, _interpret: Any = False
) -> Array:
    """``w`` with ``values[k]``, rounded to its dtype, in block ``blocks[k]``; all else keeps its bits. In place if donated.

    w ``[I, O]``; blocks int32 ``[n, 2]`` as for :func:`block_gather`; values ``[n, b, c]``. Padding writes nothing.

    Raises ``ValueError`` as :func:`block_gather` does, and for values of another shape than ``[n, b, c]``.
    """
    if len(values.shape) != 3 or len(values) != len(blocks):
        raise ValueError(f"values {list(values.shape)} are not [n, b, c] for the n = {len(blocks)} blocks")
    block = values.shape[1:]
    check_blocks(blocks, w.shape, block)
    if len(blocks) == 0:
        return w
    return _put(w, blocks, values, implementation, _interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _gather(w: Array, blocks: Array, block: tuple[int, ...], implementation: str | None, interpret: Any) -> Array:
    # Two buffers of the weight, and two of the result.
    tiles = Tiles.of(len(blocks), block, w.shape, (w.dtype,), 4 * w.dtype.itemsize)
    xla = functools.partial(gather_xla, block=block)
    return choose(implementation, tiles, _gather_pallas, xla, w, blocks, interpret=interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _put(w: Array, blocks: Array, values: Array, implementation: str | None, interpret: Any) -> Array:
    dtypes = w.dtype, values.dtype
    tiles = Tiles.of(len(blocks), values.shape[1:], w.shape, dtypes, 2 * sum(dtype.itemsize for dtype in dtypes))
    return choose(implementation, tiles, _put_pallas, put_xla, w, blocks, values, interpret=interpret)


# Tangents go through XLA's operations, which have transposes: both functions are linear in arrays of floats.
@_gather.defjvp
def _gather_jvp(block: Any, implementation: Any, interpret: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    w, blocks = primals
    return _gather(w, blocks, block, implementation, interpret), gather_xla(tangents[0], blocks, block=block)


@_put.defjvp
def _put_jvp(implementation: Any, interpret: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    w, blocks, values = primals
    return _put(w, blocks, values, implementation, interpret), put_xla(tangents[0], blocks, tangents[2])


def gather_xla(w: Array, blocks: Array, *, block: tuple[int, ...]) -> Array:
    """:func:`block_gather` by windows of ``lax.gather``: plain indexing would make an index for every entry of a block."""
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1))
    starts = blocks * jnp.asarray(block, blocks.dtype)
    return jax.lax.gather(w, starts, numbers, block, mode="fill", fill_value=0, unique_indices=True)


def put_xla(w: Array, blocks: Array, values: Array) -> Array:
    """:func:`block_put` by windows of ``lax.scatter``."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0, 1)
    )
    starts = blocks * jnp.asarray(values.shape[1:], blocks.dtype)
    # `drop`: padding lies past the end.
    return jax.lax.scatter(w, starts, values.astype(w.dtype), numbers, mode="drop", unique_indices=True)


def _gather_pallas(w: Array, blocks: Array, *, tiles: Tiles, interpret: Any) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(blocks: Any, w: Any, out: Any, buffer: Any, sem: Any, counts: Any) -> None:
        step = pl.program_id(0)
        start, wait = tiles.moves(
            blocks, lambda place, at: pltpu.make_async_copy(w.at[at], buffer.at[place], sem.at[place[0]]), counts
        )
        # Those of the next step fly while this one is copied out.
        pl.when(step == 0)(lambda: start(step))
        pl.when(step + 1 < tiles.steps)(lambda: start(step + 1))
        wait(step)

        def one(j: Any, valid: Any, _: Any) -> None:
            def chunk(at: tuple[Any, Any]) -> None:
                # A buffer that nothing was copied to may hold anything, NaN too.
                x = buffer[(parity(step), j, *at)]
                out[(j, *at)] = jnp.where(valid, x, jnp.zeros_like(x))

            tiles.chunks(chunk)

        tiles.each(blocks, step, one)

    shape = jax.ShapeDtypeStruct((tiles.count * tiles.split, *tiles.shape[1:]), w.dtype)
    call = pl.pallas_call(
        kernel,
        grid_spec=tiles.grid(["weight"], ["tiles"], [w.dtype]),
        out_shape=[shape],
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="block_gather",
    )
    return tiles.joined(call(blocks.T, w)[0])


def _put_pallas(w: Array, blocks: Array, values: Array, *, tiles: Tiles, interpret: Any) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(blocks: Any, _: Any, values: Any, w: Any, buffer: Any, sem: Any, counts: Any) -> None:
        step = pl.program_id(0)
        start, wait = tiles.moves(
            blocks, lambda place, at: pltpu.make_async_copy(buffer.at[place], w.at[at], sem.at[place[0]]), counts
        )
        pl.when(step >= 2)(lambda: wait(step - 2))

        def one(j: Any, _: Any, __: Any) -> None:
            def chunk(at: tuple[Any, Any]) -> None:
                buffer[(parity(step), j, *at)] = values[(j, *at)].astype(w.dtype)

            tiles.chunks(chunk)

        tiles.each(blocks, step, one)
        start(step)

        @pl.when(step == tiles.steps - 1)
        def _() -> None:
            pl.when(step >= 1)(lambda: wait(step - 1))
            wait(step)

    call = pl.pallas_call(
        kernel,
        grid_spec=tiles.grid(["weight", "tiles"], ["weight"], [w.dtype]),
        out_shape=[jax.ShapeDtypeStruct(w.shape, w.dtype)],
        # Counted with the blocks.
        input_output_aliases={1: 0},
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="block_put",
    )
    return call(blocks.T, w, tiles.cut(values))[0]
