"""Random encodings and their float64 references, for the property tests."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jft.delta import (
    NM,
    Blocks,
    Dense,
    DiagonalBlocks,
    Entries,
    LowRank,
    Product,
    Quantized,
    Rows,
    Signs,
    Slices,
    Sum,
    Ternary,
)

SHAPE = (4, 24, 20)
SPARSE = ("rows", "no_rows", "entries", "no_entries", "blocks", "tall_blocks", "slices", "columns", "n_m")
COMPRESSED = ("ternary", "ternary_of_layers", "signs", "quantized", "quantized_columns", "product")
KINDS = ("dense", "low_rank", "diagonal_blocks", *SPARSE, "sum", "wide_sum")


def make(kind, seed, shape=SHAPE):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    *lead, rows, columns = shape
    if kind == "dense":
        return Dense(draw(*shape))
    if kind == "low_rank":
        return LowRank(draw(*lead, rows, 2), draw(*lead, 2, columns))
    if kind == "diagonal_blocks":
        return DiagonalBlocks(draw(*lead, 4, rows // 4, columns // 4))
    if kind == "rows":
        return Rows(jnp.asarray(rng.permutation(shape[0])[:2], jnp.int32), draw(2, *shape[1:]), shape)
    if kind == "no_rows":
        return Rows(jnp.zeros(0, jnp.int32), draw(0, *shape[1:]), shape)
    if kind in ("entries", "no_entries"):
        size = int(np.prod(shape))
        at = rng.permutation(size)[: size // 12 if kind == "entries" else 0]
        at = jnp.asarray(at // columns, jnp.int32), jnp.asarray(at % columns, jnp.int32)
        return Entries(*at, draw(len(at[0])), shape)
    if kind in ("blocks", "tall_blocks"):
        b, c = (4, 5) if kind == "blocks" else (12, 2)
        grid = (int(np.prod(lead)), rows // b, columns // c)
        at = np.stack(np.unravel_index(rng.permutation(np.prod(grid))[:6], grid), axis=-1)
        return Blocks(jnp.asarray(at, jnp.int32), draw(6, b, c), shape)
    if kind in ("slices", "columns"):
        axis, extent, other = (-2, rows, columns) if kind == "slices" else (-1, columns, rows)
        at = jnp.asarray(rng.permutation(int(np.prod(lead)) * extent)[:7], jnp.int32)
        return Slices(at, draw(7, other), shape, axis)
    if kind == "n_m":
        offsets = np.argsort(rng.random((*lead, rows // 4, 4, columns)), axis=-2)[..., :1, :]
        return NM(jnp.asarray(offsets, jnp.int8), draw(*offsets.shape), shape, 4)
    if kind in ("ternary", "ternary_of_layers"):
        scale = draw() if kind == "ternary" else draw(shape[0])
        return Ternary.of(draw(*shape), jnp.asarray(rng.random(shape) < 0.1), scale)
    if kind == "signs":
        return Signs.of(draw(*shape) > 0, draw(shape[0]))
    if kind == "quantized":
        return Quantized.of(draw(*shape), 4, 8)
    if kind == "quantized_columns":
        return Quantized.of(draw(*shape), 3, axis=-2)
    if kind == "product":
        factors = draw(*lead, rows, 2), draw(*lead, 2, columns)
        return Product(Quantized.of(factors[0], 8, axis=-2), Quantized.of(factors[1], 3, 8))
    if kind == "sum":
        return Sum((make("rows", seed + 1, shape), make("low_rank", seed + 2, shape)))
    return Sum((make("dense", seed + 1, shape), make("rows", seed + 2, shape), make("low_rank", seed + 3, shape)))


def reference(encoding):
    """The delta in float64, from the definition of each encoding alone."""
    f64 = lambda x: np.asarray(x, np.float64)
    if isinstance(encoding, Dense):
        return f64(encoding.value)
    if isinstance(encoding, LowRank):
        return np.einsum("...ir,...ro->...io", f64(encoding.a), f64(encoding.b))
    if isinstance(encoding, Product):
        return np.einsum("...ir,...ro->...io", reference(encoding.a), reference(encoding.b))
    if isinstance(encoding, Signs):
        scale = f64(encoding.scale)
        scale = scale.reshape(*scale.shape, *(1,) * (len(encoding.shape) - scale.ndim))
        bits = np.unpackbits(np.asarray(encoding.bits), axis=-1)[..., : encoding.shape[-1]]
        return (2.0 * bits - 1) * scale
    if isinstance(encoding, Quantized):
        shape, axis = encoding.shape, encoding.axis
        planes = np.unpackbits(np.asarray(encoding.codes), axis=-1)[..., : shape[axis]].astype(int)
        weights = [*(2**j for j in range(encoding.bits - 1)), -(2 ** (encoding.bits - 1))]
        q = np.einsum("...jn,j->...n", planes, weights)
        scales = np.repeat(f64(encoding.scale), encoding.group, axis=-1)[..., : shape[axis]]
        return np.moveaxis(q * scales, -1, axis)
    if isinstance(encoding, DiagonalBlocks):
        *lead, n, height, width = encoding.blocks.shape
        out = np.zeros((*lead, n * height, n * width))
        for i in range(n):
            part = out[..., i * height : (i + 1) * height, i * width : (i + 1) * width]
            part[...] = f64(encoding.blocks)[..., i, :, :]
        return out
    if isinstance(encoding, Rows):
        out = np.zeros(encoding.shape)
        out[np.asarray(encoding.indices)] = f64(encoding.values)
        return out
    if isinstance(encoding, Sum):
        return sum(reference(part) for part in encoding.parts)
    out = np.zeros(encoding.shape)
    matrices = out.reshape(-1, *encoding.shape[-2:])  # a view
    if isinstance(encoding, Ternary):
        scale = np.broadcast_to(f64(encoding.scale).reshape(-1, *(1,) * (len(out.shape) - 1)), out.shape)
        coordinates = map(np.asarray, (encoding.rows, encoding.columns, encoding.negative))
        for row, column, minus in zip(*coordinates, strict=True):
            at = row // out.shape[-2], row % out.shape[-2], column
            matrices[at] = (-1 if minus else 1) * scale.reshape(matrices.shape)[at]
        return out
    values = f64(encoding.values)
    if isinstance(encoding, Entries):
        for row, column, value in zip(np.asarray(encoding.rows), np.asarray(encoding.columns), values, strict=True):
            matrices[row // out.shape[-2], row % out.shape[-2], column] = value
    elif isinstance(encoding, Blocks):
        b, c = values.shape[1:]
        for (m, i, j), value in zip(np.asarray(encoding.indices), values, strict=True):
            matrices[m, i * b : (i + 1) * b, j * c : (j + 1) * c] = value
    elif isinstance(encoding, NM):
        for where in np.ndindex(*values.shape):
            *index, group, slot, column = where
            along = group * encoding.m + np.asarray(encoding.offsets)[where]
            out[(*index, along, column) if encoding.axis == -2 else (*index, group, slot)] = values[where]
    elif isinstance(encoding, Slices):
        for index, value in zip(np.asarray(encoding.indices), values, strict=True):
            m, i = divmod(index, out.shape[encoding.axis])
            matrices[(m, i) if encoding.axis == -2 else (m, slice(None), i)] = value
    return out


def encodings():
    return st.builds(make, st.sampled_from(KINDS), st.integers(0, 2**20))


def close(got, want, scale=None):
    """Equal up to float32 rounding at the size of what was added up."""
    got = reference(got) if hasattr(got, "dense") else np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * (scale or max(1.0, np.abs(want).max(initial=0))))
