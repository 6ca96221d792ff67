"""Elias-Fano coding of a set of integers, in which the coordinates of entries are written.

``n`` increasing keys below ``u`` are split after their ``l = max(0, floor(log2(u / n)))`` low bits. Two uint8 arrays, bits
in ``numpy.packbits`` order:

- ``low [l, ceil(n / 8)]``: row j holds bit j (0 the least) of every key;
- ``high [ceil((n + (u - 1 >> l) + 1) / 8)]``: bit ``(key >> l) + i`` is set for the i-th key, all others are not. It is the
  gaps between the high parts, in unary.

That is ``l + 2`` to ``l + 3`` bits per key whatever the keys are: at most half a bit more than any code can do for random
ones. At 1% of all entries 8.6 bits, 1.07 bytes, where one byte-aligned varint per gap takes 1.28. No key (``n = 0``)
takes no byte. Elias 1974 (doi:10.1145/321812.321820), Fano 1971.
"""

from __future__ import annotations

import zlib

import numpy as np

NAME = "elias_fano"


def encode(keys: np.ndarray, universe: int) -> tuple[np.ndarray, np.ndarray]:
    """``(low, high)`` of increasing int64 ``keys`` in ``[0, universe)``."""
    bits, low_bytes, high_bits = _layout(len(keys), universe)
    # A row for each bit rather than a field for each key: l need not divide 8.
    low = np.empty((bits, low_bytes), np.uint8)
    for j in range(bits):
        low[j] = np.packbits((keys >> j & 1).astype(np.uint8))
    marks = np.zeros(high_bits, np.bool_)
    # The i keys before it have a mark each, so equal high parts do not collide.
    marks[(keys >> bits) + np.arange(len(keys))] = True
    return low, np.packbits(marks)


def decode(low: np.ndarray, high: np.ndarray, count: int, universe: int) -> np.ndarray:
    """The ``count`` keys, int64, of :func:`encode`. Raises ``ValueError`` for bytes that are no code of so many."""
    bits, low_bytes, high_bits = _layout(count, universe)
    if low.dtype != np.uint8 or high.dtype != np.uint8 or low.shape != (bits, low_bytes):
        raise ValueError(f"its coded indices have low bits of shape {low.shape}, {count} need {(bits, low_bytes)}")
    if high.shape != (-(-high_bits // 8),):
        raise ValueError(f"its coded indices have {high.size} bytes of high bits, {count} need {-(-high_bits // 8)}")
    # `count` cuts off what fills the last byte.
    marks = np.flatnonzero(np.unpackbits(high, count=high_bits))
    if len(marks) != count:
        raise ValueError(f"its coded indices hold {len(marks)} entries, its values {count}")
    # Marks are in the order of the keys, so the i-th has i others before it.
    keys = (marks - np.arange(count)) << bits
    for j in range(bits):
        keys |= np.unpackbits(low[j], count=count).astype(np.int64) << j
    return keys


def checksum(low: np.ndarray, high: np.ndarray) -> int:
    """The CRC-32 of both arrays."""
    return zlib.crc32(high.tobytes(), zlib.crc32(low.tobytes()))


def _layout(count: int, universe: int) -> tuple[int, int, int]:
    """Low bits of a key; bytes of one such bit of all; bits of the high part."""
    # Without keys there is no mean gap to take the logarithm of.
    if not count:
        return 0, 0, 0
    # `bit_length` is exact: a float logarithm may round up near a power of two, and reader and writer must agree.
    bits = max(0, (universe // count).bit_length() - 1)
    return bits, -(-count // 8), count + (universe - 1 >> bits) + 1
