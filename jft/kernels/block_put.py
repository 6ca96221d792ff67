"""Selected blocks of a weight, read and written in place.

The XLA form is a windowed gather and a windowed scatter: in place on a GPU, and of float32 on a CPU, where XLA scatters 2-byte
types by way of a float32 copy. On a TPU they are loops of one small block after another; the Pallas form there has the copies
of several blocks in flight, and touches nothing else of the weight. Both have derivatives of either mode.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jft.kernels.blocks_forms import gather_xla, put_xla
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


def stack_put_pallas(w: Array, blocks: Array, values: Array) -> Array | None:
    """:func:`block_put` of matrices ``[L, I, O]``, blocks ``[L, n, 2]``, values ``[L, n, b, c]`` by Pallas, in one call.

    None where the kernel does not take them. Nothing is checked.
    """
    (stack, height, width), (count, *sizes) = w.shape, values.shape[1:]
    block = tuple(sizes)
    tiles = _put_tiles(stack * count, block, (stack * height, width), w.dtype, values.dtype)
    if isinstance(tiles, str):
        return None
    folded = _put_pallas(*fold(w, blocks, block), values.reshape(-1, *block), tiles=tiles, interpret=False)
    return folded.reshape(w.shape)


def fold(w: Array, blocks: Array, block: tuple[int, ...]) -> tuple[Array, Array]:
    """A stack of matrices ``[L, I, O]`` as one ``[L I, O]``, and its blocks ``[L, n, 2]`` as ``[L n, 2]`` of that.

    Values ``[L, n, b, c]`` go with them as ``[L n, b, c]``. One call then does what ``jax.vmap`` would have a TPU do in L
    kernels of a loop that copies. Padding stays padding.
    """
    stack, height, width = w.shape
    rows, slots = height // block[0], blocks.shape[1]
    row, column = blocks[..., 0], blocks[..., 1]
    layer = jnp.arange(stack, dtype=blocks.dtype)[:, None]
    # Rows past the end of a matrix are those of the next one, until they are past the end of all; distinct as before.
    padding = stack * rows + layer * slots + jnp.arange(slots, dtype=blocks.dtype)
    row = jnp.where(row < rows, layer * rows + row, padding)
    return w.reshape(stack * height, width), jnp.stack([row, column], axis=-1).reshape(-1, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _gather(w: Array, blocks: Array, block: tuple[int, ...], implementation: str | None, interpret: Any) -> Array:
    # Two buffers of the weight, and two of the result.
    tiles = Tiles.of(len(blocks), block, w.shape, (w.dtype,), 4 * w.dtype.itemsize)
    pallas = tiles if isinstance(tiles, str) else functools.partial(_gather_pallas, tiles=tiles, interpret=interpret)
    return choose(implementation, pallas, functools.partial(gather_xla, block=block), w, blocks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _put(w: Array, blocks: Array, values: Array, implementation: str | None, interpret: Any) -> Array:
    tiles = _put_tiles(len(blocks), values.shape[1:], w.shape, w.dtype, values.dtype)
    pallas = tiles if isinstance(tiles, str) else functools.partial(_put_pallas, tiles=tiles, interpret=interpret)
    return choose(implementation, pallas, put_xla, w, blocks, values)


def _put_tiles(n: int, block: tuple[int, ...], shape: tuple[int, ...], *dtypes: Any) -> Tiles | str:
    # Two buffers of the weight, and two of the values.
    return Tiles.of(n, block, shape, dtypes, 2 * sum(dtype.itemsize for dtype in dtypes))


# Tangents go through XLA's operations, which have transposes: both functions are linear in arrays of floats.
@_gather.defjvp
def _gather_jvp(block: Any, implementation: Any, interpret: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    w, blocks = primals
    return _gather(w, blocks, block, implementation, interpret), gather_xla(tangents[0], blocks, block=block)


@_put.defjvp
def _put_jvp(implementation: Any, interpret: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    w, blocks, values = primals
    return _put(w, blocks, values, implementation, interpret), put_xla(tangents[0], blocks, tangents[2])


def _gather_pallas(w: Array, blocks: Array, *, tiles: Tiles, interpret: Any) -> Array:
    from jax.experimental import pallas as pl

    def kernel(blocks: Any, w: Any, out: Any, buffer: Any, *in_flight: Any) -> None:
        step = pl.program_id(0)
        start, wait = tiles.copies(blocks, w, buffer, *in_flight)
        # Those of the next step fly while these are copied out.
        pl.when(step == 0)(lambda: start(step))
        pl.when(step + 1 < tiles.steps)(lambda: start(step + 1))
        wait(step)

        def one(j: Any, valid: Any, _: Any) -> None:
            def chunk(at: Any) -> None:
                # Where nothing was copied to, a buffer may hold anything, NaN too.
                x = buffer[(parity(step), j, *at)]
                out[(j, *at)] = jnp.where(valid, x, jnp.zeros_like(x))

            tiles.chunks(chunk)

        tiles.each(blocks, step, one)

    shape = jax.ShapeDtypeStruct((tiles.count * tiles.split, *tiles.shape[1:]), w.dtype)
    grid = tiles.grid(["weight"], ["tiles"], [w.dtype])
    return tiles.joined(
        tiles.call(kernel, "block_gather", grid, [shape], None, interpret, 2 * w.dtype.itemsize)(blocks.T, w)[0]
    )


def _put_pallas(w: Array, blocks: Array, values: Array, *, tiles: Tiles, interpret: Any) -> Array:
    from jax.experimental import pallas as pl

    def kernel(blocks: Any, _: Any, values: Any, w: Any, buffer: Any, *in_flight: Any) -> None:
        step = pl.program_id(0)
        start, wait = tiles.copies(blocks, buffer, w, *in_flight)
        pl.when(step >= 2)(lambda: wait(step - 2))

        @pl.loop(0, tiles.group)
        def one(j: Any) -> None:
            def chunk(at: Any) -> None:
                buffer[(parity(step), j, *at)] = values[(j, *at)].astype(w.dtype)

            tiles.chunks(chunk)

        start(step)

        @pl.when(step == tiles.steps - 1)
        def finish() -> None:
            pl.when(step >= 1)(lambda: wait(step - 1))
            wait(step)

    grid = tiles.grid(["weight", "tiles"], ["weight"], [w.dtype])
    moved = w.dtype.itemsize + values.dtype.itemsize
    return tiles.call(kernel, "block_put", grid, [w], 1, interpret, moved)(blocks.T, w, tiles.cut(values))[0]
