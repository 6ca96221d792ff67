"""From a mask to where its True entries are, cell by cell, in memory that grows with what is selected.

A mask is packed into words of 32 bits, the words' counts are added up, and each selected entry finds its word and its bit:
less memory than the mask itself besides the answer, nothing flat over cells, and no cell looks at another.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jft.delta.selected import cells, joined, over_leading

Array = jax.Array

_WORD = 32


def locate(mask: Array, grid: tuple[int, ...], capacity: int | None) -> Array:
    """Coordinates int32 ``[*lead, *grid, capacity, n]`` of the True entries of ``mask[*lead, *n axes]`` in each cell.

    Row-major, local to the cell, padded with the first coordinate at ``extent + slot`` and 0 for the others. Without a
    capacity it is the largest count of all cells, which needs a mask that can be looked at.
    """
    _check(mask, grid)
    traced = isinstance(mask, jax.core.Tracer)
    if traced:
        if capacity is None:
            raise ValueError("under jit how many parts a cell selects is not known; give locate a capacity")
        return _locate(mask, grid, capacity)
    most = int(_most(mask, grid))
    if capacity is not None and most > capacity:
        raise ValueError(f"a cell selects {most} parts, more than the capacity of {capacity}")
    # At least one slot, if of padding: arrays of no size cannot be saved.
    at = _locate_jit(mask, grid, max(most, 1) if capacity is None else capacity)
    return _placed(at, mask, grid)


def mask_of(at: Array, extents: tuple[int, ...], lead: int) -> Array:
    """The inverse of :func:`locate`: a mask ``[*lead, *extents]``; coordinates beyond a cell count for nothing."""
    n = at.shape[-1]
    grid = at.shape[lead : lead + n]
    inside = tuple(size // g for size, g in zip(extents, grid, strict=True))

    def one(at: Array) -> Array:
        index = tuple(at[:, i] for i in range(n))
        empty = jnp.zeros(inside, bool)
        return empty.at[index].set(True, mode="drop", unique_indices=True, indices_are_sorted=True)

    return joined(over_leading(one, lead + n)(at), n)


def _check(mask: Array, grid: tuple[int, ...]) -> None:
    extents = mask.shape[mask.ndim - len(grid) :]
    if any(g < 1 or size % g for size, g in zip(extents, grid, strict=True)):
        raise ValueError(f"{' x '.join(map(str, extents))} parts do not divide into a grid of {grid} cells")
    inside = [size // g for size, g in zip(extents, grid, strict=True)]
    if functools.reduce(int.__mul__, inside[:-1], -(-inside[-1] // _WORD)) >= 2**31:
        raise ValueError(f"a cell of {' x '.join(map(str, inside))} parts is too large; cut the weight in more cells")


@functools.partial(jax.jit, static_argnums=1)
def _most(mask: Array, grid: tuple[int, ...]) -> Array:
    n = len(grid)
    words = _words(cells(mask, grid))
    counts = jax.lax.population_count(words)
    return jnp.max(jnp.sum(counts, axis=tuple(range(counts.ndim - n, counts.ndim)), dtype=jnp.uint32), initial=0)


def _words(mask: Array) -> Array:
    """Bool ``[..., n]`` as uint32 ``[..., ceil(n / 32)]``, the first entry in the lowest bit."""
    short = -mask.shape[-1] % _WORD
    if short:
        mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, short)])
    mask = mask.reshape(*mask.shape[:-1], -1, _WORD)
    # Bit by bit rather than a sum over the axis, whose 4-byte operand XLA's CPU backend would write out.
    return functools.reduce(jnp.bitwise_or, [mask[..., i].astype(jnp.uint32) << i for i in range(_WORD)])


def _locate(mask: Array, grid: tuple[int, ...], capacity: int) -> Array:
    n = len(grid)
    parts = cells(mask, grid)
    return over_leading(functools.partial(_places, capacity=capacity), parts.ndim - n)(parts)


_locate_jit = jax.jit(_locate, static_argnums=(1, 2))


def _places(mask: Array, capacity: int) -> Array:
    """Coordinates ``[capacity, ndim]`` of the True entries of one cell."""
    words = _words(mask)
    wide = words.shape[-1]
    words = words.reshape(-1)
    counts = jax.lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(counts)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    # The word of slot j is the number of words that end at j or before.
    ended = jnp.zeros(capacity + 1, jnp.int32).at[jnp.minimum(ends, capacity)].add(1, indices_are_sorted=True)
    word = jnp.minimum(jnp.cumsum(ended[:capacity]), words.size - 1)
    rank = slot - (ends[word] - counts[word])
    column = word % wide * _WORD + _bit(words[word], rank)
    valid = slot < ends[-1]
    coordinates = [word // wide, column] if mask.ndim == 2 else [column]
    first = jnp.where(valid, coordinates[0], mask.shape[0] + slot)
    return jnp.stack([first, *(jnp.where(valid, c, 0) for c in coordinates[1:])], axis=-1)


def _bit(word: Array, rank: Array) -> Array:
    """The position of the set bit of ``word`` that has ``rank`` set bits below it."""
    place = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = jax.lax.population_count(word & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        above = rank >= low
        rank = jnp.where(above, rank - low, rank)
        place = jnp.where(above, place + half, place)
        word = jnp.where(above, word >> half, word)
    return place


def _placed(at: Array, mask: Array, grid: tuple[int, ...]) -> Array:
    """``at`` with the sharding of its mask, as far as the grid follows it."""
    sharding: Any = mask.sharding
    if not isinstance(sharding, NamedSharding):
        return at
    lead = mask.ndim - len(grid)
    spec = [*sharding.spec, *(None,) * (mask.ndim - len(sharding.spec))]
    for i, g in enumerate(grid, start=lead):
        names = (spec[i],) if isinstance(spec[i], str) else spec[i] or ()
        shards = functools.reduce(int.__mul__, [sharding.mesh.shape[name] for name in names], 1)
        spec[i] = spec[i] if g % shards == 0 else None
    wanted = NamedSharding(sharding.mesh, PartitionSpec(*spec, None, None))
    return at if at.sharding.is_equivalent_to(wanted, at.ndim) else jax.device_put(at, wanted)
