"""Float32 arithmetic of tensors on the host, in NumPy: widening, rounding, and the k-th largest magnitude, exactly.

Merging on a CPU is bound by memory. These functions go through a tensor in blocks that stay in the cache, and release the
interpreter's lock, so that several threads work on several tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

BLOCK = 1 << 16
"""Entries worked on at a time: a float32 block and its temporaries stay in the cache of a core."""
SAMPLE = 1 << 16
"""Magnitudes that bracket the k-th largest of a tensor, which has more; at most one of sixteen."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def widen(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``x`` in float32, written to ``out`` where that is given."""
    out = np.empty(x.shape, np.float32) if out is None else out
    if x.dtype == BFLOAT16 and x.ndim:
        # A bfloat16 is the upper half of a float32; the dtype's own conversion goes entry by entry.
        np.left_shift(x.view(np.uint16), np.uint32(16), out=out.view(np.uint32))
    else:
        out[...] = x
    return out


def narrow(x: np.ndarray, out: np.ndarray) -> None:
    """Float32 ``x`` rounded to nearest, ties to even, in the dtype of ``out``."""
    if out.dtype != BFLOAT16 or not x.ndim or not np.isfinite(x).all():
        out[...] = x.astype(out.dtype)
        return
    bits = x.view(np.uint32)
    carry = (bits >> np.uint32(16)) & np.uint32(1)
    carry += np.uint32(0x7FFF)
    carry += bits
    np.right_shift(carry, np.uint32(16), out=out.view(np.uint16), casting="unsafe")


def blocks(size: int, block: int = BLOCK) -> Iterator[slice]:
    """The slices of a flat array of ``size`` entries."""
    return (slice(i, min(i + block, size)) for i in range(0, size, block))


def subtract(x: np.ndarray, base: np.ndarray, out: np.ndarray) -> None:
    """``out = x - base``, flat: ``x`` of any dtype, ``base`` and ``out`` float32."""
    for part in blocks(x.size):
        widen(x[part], out[part])
        out[part] -= base[part]


class Cut(NamedTuple):
    """The ``rank`` entries of the largest magnitude: above ``limit``, or equal to it and before the position ``end``.

    Infinity for rank 0.
    """

    limit: float
    end: int


def cuts(x: np.ndarray, ranks: Sequence[int]) -> list[Cut]:
    """The exact :class:`Cut` of each rank in flat float32 ``x``.

    A strided sample brackets the k-th largest magnitude; those in the bracket are extracted and partitioned. Where the
    sample misled, or the tensor is small, all of them are partitioned.
    """
    size = x.size
    if size <= SAMPLE:
        magnitudes = np.abs(x)
        return [_cut(x, magnitudes, 0, int(k)) for k in ranks]
    # An odd stride, so that it does not walk down one column.
    sample = np.sort(np.abs(x[:: max(16, size // SAMPLE) | 1]))
    return [_bracketed(x, sample, int(k)) for k in ranks]


def _cut(x: np.ndarray, candidates: np.ndarray, above: int, rank: int) -> Cut:
    """The cut in ``x``, whose limit is among the magnitudes ``candidates``, all but ``above`` larger ones."""
    if rank <= 0:
        return Cut(math.inf, 0)
    position = candidates.size - (rank - above)
    limit = np.partition(candidates, position)[position]
    missing = rank - above - int(np.count_nonzero(candidates > limit))
    if missing == np.count_nonzero(candidates == limit):
        return Cut(float(limit), x.size)
    # Of equal magnitudes the first ones stay.
    for part in blocks(x.size):
        equal = np.flatnonzero(np.abs(x[part]) == limit)
        if equal.size > missing:
            return Cut(float(limit), part.start + int(equal[missing]))
        missing -= equal.size
    raise AssertionError("more entries equal the limit than are missing")


def _bracketed(x: np.ndarray, sample: np.ndarray, rank: int) -> Cut:
    if rank <= 0:
        return Cut(math.inf, 0)
    count = sample.size
    expected = count * (1 - rank / x.size)
    # Six standard deviations of the share of a random sample.
    spread = 6 * math.sqrt(expected * max(0.0, 1 - expected / count)) + 4
    low = float(sample[int(expected - spread)]) if expected - spread >= 0 else 0.0
    high = float(sample[math.ceil(expected + spread)]) if expected + spread < count - 1 else math.inf
    above, candidates = 0, []
    for part in blocks(x.size):
        magnitudes = np.abs(x[part])
        larger = magnitudes > high
        above += int(np.count_nonzero(larger))
        inside = magnitudes >= low
        inside &= ~larger
        candidates.append(magnitudes[inside])
    inner = np.concatenate(candidates)
    if above < rank <= above + inner.size:
        return _cut(x, inner, above, rank)
    return _cut(x, np.abs(x), 0, rank)


Visit = Callable[[Callable[[Sequence[np.ndarray]], np.ndarray]], Iterable[np.ndarray]]
Order = Callable[[np.ndarray], np.ndarray]
_SIGN = np.uint32(1 << 31)


def magnitude_order(x: np.ndarray) -> np.ndarray:
    """Float32 as unsigned integers that are ordered as the magnitudes are; :func:`order` of these."""
    return x.view(np.uint32) | _SIGN


def order(x: np.ndarray) -> np.ndarray:
    """Float32 as unsigned integers of its order: bits of negative numbers turned over, the sign of others set."""
    bits = x.view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _ordered(key: np.uint32) -> np.float32:
    """The float32 of a key of :func:`order`."""
    return (key ^ _SIGN if key & _SIGN else ~key).view(np.float32)


def limits(visit: Visit, ranks: np.ndarray, by: Order = magnitude_order) -> np.ndarray:
    """The values ``[N, R]`` of the ``ranks`` among all entries of each of N models, exactly, in two visits of every tensor.

    ``visit(count)`` gives ``count(values)`` for every tensor, ``values`` being one flat float32 array per model; by: their
    order. They are counted by the upper half of its bits, then those of the k-th's upper half by the lower.
    """
    upper = _sum(visit(lambda deltas: np.stack([_counts(x, by) for x in deltas])))
    first = np.empty(ranks.shape, np.int64)
    rest = np.empty(ranks.shape, np.int64)
    for index, rank in np.ndenumerate(ranks):
        first[index], rest[index] = _bin(upper[index[0]], int(rank))

    def lower(deltas: Sequence[np.ndarray]) -> np.ndarray:
        out = np.zeros((*ranks.shape, 1 << 16), np.int64)
        for i, x in enumerate(deltas):
            for j, half in enumerate(first[i]):
                for part in blocks(x.size):
                    bits = by(x[part])
                    selected = bits[(bits >> np.uint32(16)) == half] & np.uint32(0xFFFF)
                    out[i, j] += np.bincount(selected.astype(np.intp), minlength=1 << 16)
        return out

    total = _sum(visit(lower))
    result = np.full(ranks.shape, np.inf, np.float32)
    for index, rank in np.ndenumerate(ranks):
        if rank > 0:
            result[index] = _ordered(np.uint32(first[index] << 16 | _bin(total[index], int(rest[index]))[0]))
    return result


def _sum(counts: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, counts)


def _counts(x: np.ndarray, by: Order) -> np.ndarray:
    total = np.zeros(1 << 16, np.int64)
    for part in blocks(x.size):
        total += np.bincount(by(x[part]) >> np.uint32(16), minlength=1 << 16)
    return total


def _bin(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin with the ``rank``-th largest entry, and its rank among the entries of that bin."""
    if rank <= 0:
        return 0, 0
    reached = np.cumsum(counts[::-1])
    position = int(np.searchsorted(reached, rank))
    before = int(reached[position - 1]) if position else 0
    return counts.size - 1 - position, rank - before


def aligned(size: int) -> np.ndarray:
    """Float32 memory that XLA takes as it is."""
    memory = np.empty(size + 16, np.float32)
    start = -memory.ctypes.data // 4 % 16
    return memory[start : start + size]


def combined(terms: Sequence[np.ndarray], coefficients: Sequence[float]) -> np.ndarray:
    """``sum_i c_i term_i`` in the order and rounding of :meth:`jft.delta.TaskVector.combine`."""
    total: np.ndarray | None = None
    for x, c in zip(terms, coefficients, strict=True):
        term = x if c == 1 else x * np.float32(c)
        total = term.copy() if total is None else np.add(total, term, out=total)
    assert total is not None, "a rule merges at least one model"
    return total


def add(base: np.ndarray, delta: np.ndarray | None, out: np.ndarray) -> None:
    """``out = base + delta``, rounded once."""
    for part in blocks(base.size):
        narrow(base[part] if delta is None else base[part] + delta[part], out[part])
