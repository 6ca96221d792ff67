"""Gradient of selected blocks of a weight on NVIDIA GPUs: a Pallas kernel for Mosaic GPU (Hopper: wgmma and TMA).

One CTA computes one tile of one block: it walks over the rows of ``x`` and ``dy``, panels of both stream through shared memory,
and the tile stays in registers. Nothing but the result is written, and the dense gradient never exists. CTAs run in the order
of the blocks: sorted by row, those that run at one time share panels in the L2 cache. Compute capability 9.0 only (wgmma).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jft.kernels import tuning

Array = jax.Array

SMEM = 232448  # bytes of shared memory that a CTA may have on Hopper
SMEM_SM = 233472  # of a multiprocessor, for all its CTAs together
RESERVED = 4096  # of a CTA's, for barriers and alignment
ROWS = 8  # of x and dy in one piece of shared memory's layout, which TMA reads whole
SWIZZLE = 128  # bytes: the widest, which every panel is wide enough for
FLOATS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))
# float32 operands are sums of three bfloat16 terms, x = x0 + x1 + x2. Products of order 2^-24 and less are left out, and the
# smallest come first.
TERMS = ((0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0))


@dataclass(frozen=True)
class Config:
    """What the kernel may choose: it changes the speed, and results only by the order of float32 sums.

    tile_t: rows of ``x`` and ``dy`` in one step, a multiple of 64.
    max_concurrent_steps: steps whose panels are in shared memory at once, at least 2.
    splits: parts of the rows, each summed by a CTA of its own; more than one takes float32 partial results of that number.
    """

    tile_t: int = 64
    max_concurrent_steps: int = 4
    splits: int = 1


def tile_shape(block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block that one CTA computes: as large as its accumulators fit into registers."""
    return tuple(128 if size % 128 == 0 else 64 for size in block)  # type: ignore[return-value]


def supported(x: Any, dy: Any, blocks: Any, block: tuple[int, int], out_dtype: Any) -> str | None:
    """Why the kernel cannot take these shapes and dtypes, or None where it can."""
    if x.dtype != dy.dtype:
        return f"operands of two dtypes, {x.dtype} and {dy.dtype}"
    if jnp.dtype(x.dtype) not in FLOATS:
        return f"operands of {x.dtype}, where bfloat16, float16 or float32 are possible"
    if jnp.dtype(out_dtype) not in FLOATS:
        return f"a result of {jnp.dtype(out_dtype)}, where bfloat16, float16 or float32 are possible"
    if x.ndim != 2 or dy.ndim != 2 or x.shape[0] != dy.shape[0]:
        return f"shapes {x.shape} and {dy.shape}, which are not [T, K] and [T, N]"
    if blocks.ndim != 2 or blocks.shape[1] != 2 or blocks.dtype != jnp.int32:
        return f"blocks {blocks.dtype}{list(blocks.shape)}, which are not int32[n, 2]"
    if block[0] % 64 or block[1] % 64 or min(block) < 64:
        return f"block {tuple(block)}, whose sides are not multiples of 64"
    if x.shape[1] % block[0] or dy.shape[1] % block[1]:
        return f"a weight {(x.shape[1], dy.shape[1])} that blocks {tuple(block)} do not divide"
    return None


def block_sddmm_gpu(
    x: Array,
    dy: Array,
    blocks: Array,
    *,
    block: tuple[int, int],
    acc: Array | None = None,
    out_dtype: Any = jnp.float32,
    config: Config | None = None,
    interpret: Any = False,
) -> Array:
    """Sampled product of two dense matrices in blocks: ``acc[n] + x[:, rows of n]^T dy[:, columns of n]``.

    Args:
        x: ``[T, K]``, bfloat16, float16 or float32. The latter is split into three bfloat16 terms, six products in all, about
            as exact as float32; an infinite entry then gives NaN.
        dy: ``[T, N]`` of the same dtype. A ``T`` that is not a multiple of 8 costs a padded copy of both.
        blocks: int32 ``[n, 2]``, block row and block column. Where either is outside the weight, the product is zero.
        block: its shape ``(b, c)``, multiples of 64 that divide ``(K, N)``.
        acc: ``[n, b, c]``, bfloat16, float16 or float32, to be added, or None.
        out_dtype: of the result, rounded to once; sums are float32.
        config: None for :func:`heuristic`.
        interpret: True to run in Pallas's GPU interpreter (jax 0.11 or newer).

    Returns:
        ``[n, b, c]``; the same bits every time for the same config.

    Raises:
        ValueError: shapes, dtypes or a config that the kernel does not take.
    """
    if reason := supported(x, dy, blocks, block, out_dtype):
        raise ValueError(f"block_sddmm on a GPU does not take {reason}")
    n, out_dtype = blocks.shape[0], jnp.dtype(out_dtype)
    shape = (n, *block)
    if acc is not None and acc.shape != shape:
        raise ValueError(f"acc has shape {acc.shape}, and the result {shape}")
    if acc is not None and acc.dtype not in FLOATS:
        raise ValueError(f"acc is {acc.dtype}, where bfloat16, float16 or float32 are possible")
    if n == 0 or x.shape[0] == 0:
        return jnp.zeros(shape, out_dtype) if acc is None else acc.astype(out_dtype)
    if interpret is True:
        if not hasattr(plgpu, "InterpretGPUParams"):
            raise NotImplementedError(
                "the GPU interpreter of jax 0.10 knows no transposed operands of wgmma: it takes 0.11"
            )
        interpret = plgpu.InterpretGPUParams()
    config = config or heuristic(x.shape[0], n, block, x.dtype)
    check(config, block)
    if rest := -x.shape[0] % ROWS:
        x, dy = (jnp.pad(side, ((0, rest), (0, 0))) for side in (x, dy))
    if x.dtype == jnp.float32:
        x, dy = _terms(x), _terms(dy)
    else:
        x, dy = x[None], dy[None]
    per_split = pl.cdiv(x.shape[1], config.tile_t * config.splits)
    splits = pl.cdiv(x.shape[1], config.tile_t * per_split)  # none without rows
    if splits == 1:
        return _call(x, dy, blocks, acc, block, out_dtype, config, per_split, interpret)
    parts = _call(x, dy, blocks, None, block, jnp.dtype(jnp.float32), config, per_split, interpret)
    whole = functools.reduce(jnp.add, parts.reshape(splits, *shape))  # in this order, whatever the GPU does
    return (whole if acc is None else acc.astype(jnp.float32) + whole).astype(out_dtype)


def check(config: Config, block: tuple[int, int]) -> None:
    """Raise ValueError where the kernel cannot run with this config."""
    if config.tile_t < 64 or config.tile_t % 64:
        raise ValueError(f"tile_t={config.tile_t} is not a multiple of 64")
    if config.max_concurrent_steps < 2:
        raise ValueError(f"max_concurrent_steps={config.max_concurrent_steps}, and the pipeline needs 2 or more")
    if config.splits < 1:
        raise ValueError(f"splits={config.splits} is less than 1")
    if (needed := shared_memory(config, block)) > SMEM:
        raise ValueError(f"{config} needs {needed} bytes of shared memory, and a CTA has {SMEM}")


def shared_memory(config: Config, block: tuple[int, int]) -> int:
    """Bytes of shared memory of a CTA. The panels fill it; the tile, on its way out, takes their place and is no larger."""
    return RESERVED + config.max_concurrent_steps * config.tile_t * sum(tile_shape(block)) * 2


def _terms(x: Array) -> Array:
    """float32 ``[T, K]`` as bfloat16 ``[3, T, K]`` whose sum it is, to a relative 2^-24."""
    terms = []
    for _ in range(3):
        # Not two casts, which XLA takes for none and leaves nothing for the next term.
        term = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        terms.append(term.astype(jnp.bfloat16))
        x = x - term
    return jnp.stack(terms)


def _transforms(dtype: Any) -> tuple:
    """Layout in shared memory that TMA writes and wgmma reads without bank conflicts."""
    return plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(SWIZZLE)


def _call(
    x: Array,
    dy: Array,
    blocks: Array,
    acc: Array | None,
    block: tuple[int, int],
    out_dtype: Any,
    config: Config,
    per_split: int,
    interpret: Any,
) -> Array:
    """The kernel itself: ``[splits * n, b, c]`` from terms ``[p, T, K]`` and ``[p, T, N]``, a split for ``per_split`` steps."""
    n, tile, tile_t = blocks.shape[0], tile_shape(block), config.tile_t
    counts = x.shape[2] // block[0], dy.shape[2] // block[1]
    across, down = block[1] // tile[1], block[0] // tile[0]
    products = TERMS if x.shape[0] == 3 else ((0, 0),)

    def body(blocks_gmem, x_gmem, dy_gmem, *rest):
        acc_gmem, out_gmem = rest if acc is not None else (None, *rest)
        # Blocks of one split run side by side, over the same rows of x and dy: what one reads, others find in the L2 cache.
        place = lax.axis_index("cta")
        slot, part = lax.div(place, down * across), lax.rem(place, down * across)
        split, i = lax.div(slot, n), lax.rem(slot, n)
        tile_row, tile_column = lax.div(part, across), lax.rem(part, across)
        row, column = blocks_gmem[i, 0], blocks_gmem[i, 1]
        valid = (row >= 0) & (row < counts[0]) & (column >= 0) & (column < counts[1])
        first = split * per_split

        def index_map(side, offset):
            def of(step):
                # All products of one tile of rows follow each other, so that its terms come from the cache.
                step, product = lax.div(step, len(products)), lax.rem(step, len(products))
                term = sum((jnp.where(product == k, terms[side], 0) for k, terms in enumerate(products)), jnp.int32(0))
                return term, first + step, offset

            return of

        def panel(side, offset):
            return plgpu.BlockSpec(
                (None, tile_t, tile[side]),
                index_map(side, offset),
                transforms=_transforms(x.dtype),
                delay_release=1,  # the product of this step still reads them while the next one starts
            )

        def accumulate(sums):
            def step(_, x_smem, dy_smem):
                plgpu.wgmma(sums, x_smem.transpose((1, 0)), dy_smem)
                # Nothing else waits, and the pipeline is about to overwrite the panels of the step before this one.
                plgpu.wgmma_wait(1)

            @pl.when(valid)
            def _():
                # Rows past the last, in the last step or whole ones of the last split, are zeros: TMA fills them in.
                plgpu.emit_pipeline(
                    step,
                    grid=(per_split * len(products),),
                    in_specs=[panel(0, row * down + tile_row), panel(1, column * across + tile_column)],
                    max_concurrent_steps=config.max_concurrent_steps,
                )(x_gmem, dy_gmem)

            return sums[...]

        sums = pl.run_scoped(accumulate, plgpu.ACC(tile))
        window = pl.ds(tile_row * tile[0], tile[0]), pl.ds(tile_column * tile[1], tile[1])

        if acc is not None:

            def add(acc_smem, barrier):
                plgpu.copy_gmem_to_smem(acc_gmem.at[(i, *window)], acc_smem, barrier)
                plgpu.barrier_wait(barrier)
                return acc_smem[...].astype(jnp.float32) + sums

            staged = plgpu.SMEM(tile, acc.dtype, transforms=_transforms(acc.dtype))
            result = pl.run_scoped(add, staged, plgpu.Barrier())
        else:
            result = sums

        def store(out_smem):
            out_smem[...] = result.astype(out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[(slot, *window)])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(store, plgpu.SMEM(tile, out_dtype, transforms=_transforms(out_dtype)))

    operands = (blocks, x, dy) if acc is None else (blocks, x, dy, acc)
    splits = pl.cdiv(x.shape[1], per_split * tile_t)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((splits * n, *block), out_dtype),
        grid=(splits * n * down * across,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # indices are int32, and pipelines count in integers of the default width
        out = kernel(*operands)
    # Within shard_map the result differs along every mesh axis that an operand differs along, and the kernel does not say so.
    axes = frozenset().union(*(_varying(operand) for operand in operands)) - _varying(out)
    return lax.pcast(out, tuple(sorted(axes)), to="varying") if axes else out


def _varying(x: Array) -> frozenset[str]:
    """Mesh axes of an enclosing shard_map along which an array differs."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


# Rates of an H100 or H200 that the heuristic reckons with, per second; an autotuner need not believe them.
FLOPS, PORT, L2, HBM = 800e12, 112e9, 7e12, 3e12  # tensor cores, L2 to one multiprocessor, L2 to all, partial results
LAUNCH = 4e-6  # seconds: of one more program, that sums partial results


def heuristic(t: int, n: int, block: tuple[int, int], dtype: Any, multiprocessors: int = 132) -> Config:
    """The config that a small model of the GPU takes for the fastest, for ``t`` rows and ``n`` blocks."""
    rows, columns = tile_shape(block)
    # A step of two small panels is over before the next one is issued.
    tile_t = 128 if rows == columns == 64 and t > 64 else 64
    tiles = n * (block[0] // rows) * (block[1] // columns)
    steps, panels = pl.cdiv(t, tile_t), tile_t * (rows + columns) * 2
    products = len(TERMS) if jnp.dtype(dtype) == jnp.float32 else 1
    step = products * max(2 * tile_t * rows * columns * multiprocessors / FLOPS, panels / PORT)

    def seconds(splits: int) -> float:
        walk = pl.cdiv(tiles * splits, multiprocessors) * pl.cdiv(steps, splits) * step
        loads = tiles * steps * products * panels / L2
        partial = LAUNCH + 2 * splits * n * math.prod(block) * 4 / HBM if splits > 1 else 0.0
        return max(walk, loads) + partial

    splits = min(range(1, min(steps, 16) + 1), key=seconds)
    # Where multiprocessors have more than one CTA to run, two at a time: one stores its tile while the other multiplies.
    room = SMEM if tiles * splits <= multiprocessors else SMEM_SM // 2 - 1024
    return Config(tile_t, max(2, min((room - RESERVED) // panels, 8)), splits)


def candidates(t: int, n: int, block: tuple[int, int], dtype: Any) -> list[Config]:
    """Configs that an autotuner should time, the heuristic one first."""
    first = heuristic(t, n, block, dtype)
    configs = [first]
    for tile_t in (64, 128):
        for stages in (2, 3, 4, 6):
            for splits in sorted({1, first.splits, 2 * first.splits}):
                config = Config(tile_t, stages, splits)
                if splits <= pl.cdiv(t, tile_t) and shared_memory(config, block) <= SMEM and config not in configs:
                    configs.append(config)
    return configs


# As `jft.kernels.blocks_forms` calls the kernels of a platform.


def refuses_sddmm(x: Any, dy: Any, n: int, block: tuple[int, int], out_dtype: Any) -> str | None:
    """What of these shapes, dtypes or the GPU that is here :func:`sddmm` does not take; None where it takes them."""
    capability = _capability()
    if capability not in (None, "9.0"):
        return f"a GPU of compute capability {capability} (9.0 it does: H100, H200)"
    return supported(x, dy, jax.ShapeDtypeStruct((n, 2), jnp.int32), block, out_dtype)


def _capability() -> str | None:
    """Compute capability of the GPU that is here; None where a program is compiled for one that is not."""
    return getattr(jax.devices()[0], "compute_capability", None) if jax.default_backend() == "gpu" else None


def sddmm(x: Array, dy: Array, row: Array, column: Array, *, config: Config | None = None, **options: Any) -> Array:
    """:func:`block_sddmm_gpu` with rows and columns of blocks apart, and the configuration that was timed, if one was."""
    timed = tuning.lookup(tuning.sddmm_case(x, dy, row.shape[0], options["block"])) if config is None else None
    options["config"] = Config(**timed) if timed is not None else config
    return block_sddmm_gpu(x, dy, jnp.stack([row, column], axis=-1), **options)


def refuses_spmm(x: Any, n: int, block: tuple[int, int], columns: int) -> str | None:
    """Why there is no kernel for the product with blocks."""
    return "a product with blocks on a GPU, where XLA's form is the one there is"
