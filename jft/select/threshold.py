"""Exactly the k best of many scores, selected by counting: no sort, no gather, and nothing that wraps at 2**31.

The k-th best score is a 32-bit pattern. Two of its bits are found at a time: count how many scores reach each of the three
patterns that those bits could make, keep the largest pattern that k scores still reach. A pass reads every score once and
keeps a few integers, wherever the shards live; 16 passes find a float32, 8 a bfloat16. (Four bits at a time would halve
the passes and, on a CPU, double the time.) Scores equal to the k-th are then taken from the front, which needs the position
of one entry: its coordinates are found axis by axis, by counting again.

Counts are integers and order-free, so the same entries are selected on 1 device and on 8. Counts of more than 2**32 entries
are kept in two uint32 limbs; positions are coordinates, never flat.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.select import uint64
from jft.select.uint64 import Wide

Array = jax.Array

_DIGIT = 2  # bits of a pattern, or of a coordinate, that one pass finds
_KEPT = 1024  # leading indices counted apart: what lets a CPU count with several threads
# Axes beyond this are searched in unrolled code (see `_last_coordinates`).
_LONG = 1 << 20
_AT_ONCE = (1 << 32) - 1  # entries that a uint32 can count
_ZERO = np.uint32(1 << 31)  # the key of 0.0 and of -0.0


def top(scores: Mapping[str, Array], k: int, largest: bool = True) -> dict[str, Array]:
    """Bool masks of the ``k`` largest (or smallest) scores of all arrays together; exactly k entries are True.

    ``scores`` are floating-point arrays of any shapes, sharded in any way; the masks have their shapes and shardings. Equal
    scores are taken in the order of the mapping, then in row-major order; -0.0 equals 0.0. ``k`` may exceed 2**31.

    Under ``jit`` NaN counts as the worst score. Raises ``ValueError`` where ``k`` is not in ``[0, entries]``, a dtype is not
    a float of at most 32 bits, or (outside ``jit``) a score is NaN, naming its path.
    """
    arrays = _checked(scores)
    _check_k(k, sum(map(tree.size, arrays.values())), "entries")
    return _select(arrays, uint64.of(int(k)), 0, largest)


def top_each(score: Array, k: int | Array, lead: int, largest: bool = True) -> Array:
    """As :func:`top`, for each index of the first ``lead`` axes by itself: exactly ``k`` True in each.

    ``k`` is one number, or an integer array of the shape of the leading axes.
    """
    return top_together({"score": score}, k, lead, largest)["score"]


def top_together(scores: Mapping[str, Array], k: int | Array, lead: int, largest: bool = True) -> dict[str, Array]:
    """As :func:`top_each` over several arrays at once: they have the same first ``lead`` axes, and share each ``k``."""
    arrays = _checked(scores)
    leading = {tuple(x.shape[:lead]) for x in arrays.values()}
    if lead < 0 or any(x.ndim < lead for x in arrays.values()) or len(leading) > 1:
        shapes = ", ".join(f"{path} {tuple(x.shape)}" for path, x in arrays.items())
        raise ValueError(f"scores do not have the same {lead} leading axes: {shapes}")
    shape = next(iter(leading), ())
    entries = sum(tree.size(x) // max(1, math.prod(x.shape[:lead])) for x in arrays.values())
    # A traced k is at most 32 bits; what it holds cannot be checked.
    if isinstance(k, jax.core.Tracer):
        ks = Wide(jnp.zeros(shape, jnp.uint32), jnp.broadcast_to(k.astype(jnp.uint32), shape))
    else:
        numbers = np.asarray(k)
        if numbers.dtype.kind not in "iu" or numbers.shape not in ((), shape):
            raise ValueError(f"k must be an integer or integers of shape {shape}, not {numbers.dtype} {numbers.shape}")
        for number in (numbers.min(), numbers.max()) if numbers.size else ():
            _check_k(int(number), entries, "entries of each leading index")
        ks = uint64.of(np.broadcast_to(numbers, shape))
    return _select(arrays, ks, lead, largest)


def threshold(scores: Mapping[str, Array], k: int, largest: bool = True) -> tuple[float, int, int]:
    """``(value, above, ties)``: the k-th best of all scores, how many are better, how many are equal to it.

    ``above < k <= above + ties``. Scores as in :func:`top`, whose errors it raises; it answers on the host, so not under
    ``jit``.
    """
    arrays = _checked(scores)
    _check_k(k, sum(map(tree.size, arrays.values())), "entries", least=1)
    if _traced(arrays):
        raise ValueError("threshold answers in Python numbers; under jit use top, or call it outside")
    key, above, ties, invalid = _threshold(tuple(arrays.values()), uint64.of(int(k)), largest)
    _refuse_nan(arrays, invalid)
    return _value(int(key), largest), uint64.number(above), uint64.number(ties)


def _checked(scores: Mapping[str, Array]) -> dict[str, Array]:
    arrays = {path: jnp.asarray(x) for path, x in scores.items()}
    for path, x in arrays.items():
        # Keys have 32 bits.
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
            raise ValueError(f"scores of {path} are {x.dtype}; give float32, bfloat16 or float16")
        if any(n >= 2**31 for n in x.shape):
            raise ValueError(f"scores of {path} have shape {x.shape}; an axis of 2**31 or more must be split in two")
    return arrays


def _check_k(k: int, entries: int, what: str, least: int = 0) -> None:
    # A bool is an int in Python.
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise ValueError(f"k is {k!r}; give an integer")
    if not least <= k <= entries:
        raise ValueError(f"k = {k} is not between {least} and the {entries} {what} there are")


def _traced(arrays: Mapping[str, Array]) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in arrays.values())


def _refuse_nan(arrays: Mapping[str, Array], invalid: Wide) -> None:
    counts = Wide(*jax.device_get(invalid))
    for i, path in enumerate(arrays):
        if count := uint64.number(Wide(counts.hi[i], counts.lo[i])):
            raise ValueError(f"{count} scores of {path} are NaN; a score must be a number or an infinity")


def _select(arrays: dict[str, Array], k: Wide, lead: int, largest: bool) -> dict[str, Array]:
    """Masks, with the checks and shardings that only arrays outside ``jit`` can have."""
    if not arrays:
        return {}
    key, shares, invalid = _shares(tuple(arrays.values()), k, lead, largest)
    traced = _traced(arrays) or isinstance(k.lo, jax.core.Tracer)
    if not traced:
        _refuse_nan(arrays, invalid)
    # A program for each array rather than one for all: arrays of one shape share it.
    masks = {p: _mask(x, key, share, lead, largest) for (p, x), share in zip(arrays.items(), shares, strict=True)}
    return masks if traced else {p: _with_sharding(m, arrays[p]) for p, m in masks.items()}


def _with_sharding(mask: Array, like: Array) -> Array:
    # XLA may have chosen another sharding; most often it has not.
    same = mask.sharding.is_equivalent_to(like.sharding, mask.ndim)
    return mask if same else jax.device_put(mask, like.sharding)


def _count(tests: Sequence[Array], keep: Sequence[int]) -> Wide:
    """How many entries pass each test, ``[tests, *keep]`` for the axes ``keep``; the scores are read once for all of them.

    All tests go through one reduction with an accumulator each: XLA would write the operands of separate sums to memory.
    """
    shape = tests[0].shape
    first: list[int] = []
    last: list[int] = []  # axes counted in uint32 at once, and those whose counts are then added in two limbs
    entries = 1
    kept_size = math.prod([shape[a] for a in keep])
    # From the last axis on: contiguous entries are summed first.
    for axis in reversed([a for a in range(len(shape)) if a not in keep]):
        rest = math.prod([shape[a] for a in range(axis) if a not in keep])
        # Beyond it uint32 would wrap; the other axes are added in two limbs.
        fits = entries * shape[axis] <= _AT_ONCE
        small = kept_size * rest * shape[axis] <= _KEPT and entries > 1
        if fits and not last and not small:
            entries *= shape[axis]
            first.append(axis)
        else:
            last.append(axis)
    zeros = [jnp.uint32(0)] * len(tests)
    ones = [t.astype(jnp.uint32) for t in tests]
    sums = jax.lax.reduce(ones, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], sorted(first))
    axes = [a for a in range(len(shape)) if a not in first]
    stacked = jnp.stack(sums)
    counts = Wide(jnp.zeros_like(stacked), stacked)
    return uint64.sum_over(counts, [1 + axes.index(a) for a in last]) if last else counts


# --- the value of the k-th


def _key(x: Array, largest: bool) -> Array:
    """A uint32 that orders as the scores do, best highest; 0 for NaN. Integer throughout: CPUs flush subnormal floats."""
    if x.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    else:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # Sign and size apart, so that -0.0 gets the key of 0.0.
    size = bits & jnp.uint32(0x7FFFFFFF)
    better = (bits >> 31 == 0) == largest
    key = jnp.where(better, _ZERO + size, _ZERO - size)
    # Past the pattern of infinity is NaN.
    return jnp.where(size > jnp.uint32(0x7F800000), jnp.uint32(0), key)


def _value(key: int, largest: bool) -> float:
    """The score of a key that is not 0."""
    value = float(np.uint32(abs(key - int(_ZERO))).view(np.float32))
    return value if (key >= _ZERO) == largest or not value else -value


def _expand_leading(value: Array, shape: tuple[int, ...]) -> Array:
    """``value`` of the leading axes, to be broadcast against ``shape``."""
    return value.reshape(*value.shape, *(1,) * (len(shape) - value.ndim))


class _Bracket(NamedTuple):
    """The lowest key of the bracket ``[*lead]``, and of every array ``[arrays, *lead]`` how many scores are above the bracket,
    how many in it or above, and how many are numbers.
    """

    key: Array
    above: Wide
    least: Wide
    numbers: Wide


def _refine(xs: tuple[Array, ...], k: Wide, lead: int, largest: bool, exact: bool) -> tuple[_Bracket, Wide]:
    """The largest key that k scores reach, for each leading index; unless ``exact``, any that exactly k reach will do.

    Also how many scores of each array are NaN, ``[arrays, *lead]``.
    """
    # The lower 16 bits of a bfloat16's key are zeros: half of the passes.
    narrow = all(x.dtype == jnp.bfloat16 for x in xs)
    passes = (16 if narrow else 32) // _DIGIT
    shape = (len(xs), *xs[0].shape[:lead])
    sizes = np.asarray([tree.size(x) // max(1, math.prod(shape[1:])) for x in xs], np.uint64)
    everything = uint64.of(np.broadcast_to(np.expand_dims(sizes, tuple(range(1, len(shape)))), shape))

    def unfinished(state: tuple[Array, _Bracket]) -> Array:
        i, bracket = state
        open_ = jnp.bool_(True) if exact else ~jnp.all(uint64.equal(uint64.sum_over(bracket.least, [0]), k))
        return (i == 0) | ((i < passes) & open_)

    def step(state: tuple[Array, _Bracket]) -> tuple[Array, _Bracket]:
        i, bracket = state
        # Without the barrier XLA computes the keys once, outside the loop, and keeps them: as much memory as the scores.
        inside, key = jax.lax.optimization_barrier((xs, bracket.key))
        shift = (32 - _DIGIT - _DIGIT * i).astype(jnp.uint32)
        # Keys that the digit could make; 0 is the one it has.
        candidates = [key + (jnp.uint32(d) << shift) for d in range(1, 1 << _DIGIT)]
        counts = []
        for x in inside:
            keys = _key(x, largest)
            counts.append(
                _count([keys >= _expand_leading(t, x.shape) for t in [*candidates, jnp.uint32(1)]], range(lead))
            )
        # From here on all arrays at once: a program of many arrays would take long to compile.
        counted = Wide(*(jnp.stack(limbs) for limbs in zip(*counts, strict=True)))
        reach, numbers = (jax.tree.map(lambda n, part=part: n[:, part], counted) for part in (slice(-1), -1))
        # Keys ascend, so how many are reached is the digit.
        digit = jnp.sum(uint64.reaches(uint64.sum_over(reach, [0]), k), axis=0, dtype=jnp.uint32)
        # The bracket is from the highest key that is reached to the lowest that is not.
        least = _at_digit(jax.tree.map(lambda n, r: jnp.concatenate([n[:, None], r], 1), bracket.least, reach), digit)
        above = _at_digit(jax.tree.map(lambda n, r: jnp.concatenate([r, n[:, None]], 1), bracket.above, reach), digit)
        return i + 1, _Bracket(key + (digit << shift), above, least, numbers)

    zero = jax.tree.map(jnp.zeros_like, everything)
    start = _Bracket(jnp.zeros(shape[1:], jnp.uint32), zero, everything, everything)
    _, bracket = jax.lax.while_loop(unfinished, step, (jnp.int32(0), start))
    return bracket, uint64.subtract(everything, bracket.numbers)


def _at_digit(counts: Wide, digit: Array) -> Wide:
    """Of counts ``[arrays, digits, *lead]`` those of ``digit[*lead]``."""
    return jax.tree.map(lambda n: jnp.take_along_axis(n, digit[None, None], axis=1)[:, 0], counts)


@functools.partial(jax.jit, static_argnames="largest")
def _threshold(xs: tuple[Array, ...], k: Wide, largest: bool) -> tuple[Array, Wide, Wide, Wide]:
    bracket, invalid = _refine(xs, k, 0, largest, exact=True)
    above, least = (uint64.sum_over(n, [0]) for n in (bracket.above, bracket.least))
    # With all bits known, the scores in the bracket equal the k-th.
    return bracket.key, above, uint64.subtract(least, above), invalid


# --- ties: those equal to the k-th that are selected


def _last_coordinates(ties: Callable[[Array], Array], rank: Wide, shape: tuple[int, ...], lead: int) -> list[Array]:
    """Coordinates of the ``rank``-th True of ``ties``, in row-major order after the leading axes; uint32, one per axis.

    ``ties(after)`` makes its array anew, once ``after`` is known, so that loops read the scores rather than keep it.
    """
    coordinates: list[Array] = []
    for axis in range(lead, len(shape)):
        prefix: Array = jnp.ones((1,) * len(shape), bool)  # where the earlier coordinates are those of the result
        for earlier, coordinate in enumerate(coordinates, start=lead):
            prefix &= _index(shape, earlier) == _expand_leading(coordinate, shape)

        # Bound as default arguments: a closure would see the loop's variables as they change.
        def before(ends: Sequence[Array], prefix: Array = prefix, axis: int = axis) -> Wide:
            mask = ties(ends[0]) & prefix
            return _count([mask & (_index(shape, axis) < _expand_leading(end, shape)) for end in ends], range(lead))

        # Unrolled where it is long: out of a loop XLA would take, and keep, the index of every entry.
        coordinate, below = _reach(before, rank, shape[axis], unroll=shape[axis] > _LONG)
        rank = uint64.subtract(rank, below)
        coordinates.append(coordinate)
    return coordinates


def _index(shape: tuple[int, ...], axis: int) -> Array:
    """Indices along one axis, to be broadcast against ``shape``."""
    narrow = [1] * len(shape)
    narrow[axis] = shape[axis]
    return jax.lax.broadcasted_iota(jnp.uint32, narrow, axis)


def _reach(before: Callable[[Sequence[Array]], Wide], rank: Wide, extent: int, unroll: bool) -> tuple[Array, Wide]:
    """The last index with fewer than ``rank`` before it, and how many those are."""
    digits = -(-max(1, (extent - 1).bit_length()) // _DIGIT)

    def step(i: Array, state: tuple[Array, Wide]) -> tuple[Array, Wide]:
        # So that each step reads the scores anew rather than keep arrays made of them.
        coordinate, below = jax.lax.optimization_barrier(state)
        shift = jnp.asarray(_DIGIT * (digits - 1 - i), jnp.uint32)
        ends = [coordinate + (jnp.uint32(d) << shift) for d in range(1, 1 << _DIGIT)]
        for end, total in zip(ends, map(Wide, *before(ends)), strict=True):
            # Ends ascend: the last that is short stands.
            short = ~uint64.reaches(total, rank)
            coordinate, below = jnp.where(short, end, coordinate), uint64.where(short, total, below)
        return coordinate, below

    zero = jnp.zeros(rank.lo.shape, jnp.uint32)
    start = (jnp.zeros(rank.lo.shape, jnp.uint32), Wide(zero, zero))
    return jax.lax.fori_loop(0, digits, step, start, unroll=digits if unroll else 1)


def _up_to(coordinates: Sequence[Array], shape: tuple[int, ...], lead: int) -> Array:
    """True at the entries that come no later, in row-major order, than the one at ``coordinates``."""
    within: Array = jnp.ones((1,) * len(shape), bool)
    # From the last axis on: earlier axes decide first, so they are applied last.
    for axis in reversed(range(lead, len(shape))):
        index, coordinate = _index(shape, axis), _expand_leading(coordinates[axis - lead], shape)
        within = (index < coordinate) | ((index == coordinate) & within)
    return within


class _Share(NamedTuple):
    """An array's share of the selected scores equal to the k-th: every one, or (where ``some``) the first ``taken``."""

    every: Array
    some: Array
    taken: Wide


@functools.partial(jax.jit, static_argnames=("lead", "largest"))
def _shares(xs: tuple[Array, ...], k: Wide, lead: int, largest: bool) -> tuple[Array, list[_Share], Wide]:
    """The key of the k-th, the share of each array of the scores equal to it, and how many of its scores are NaN."""
    # A scalar for each leading index still needs an axis to count along.
    xs = tuple(x.reshape(*x.shape, 1) if x.ndim == lead else x for x in xs)
    bracket, invalid = _refine(xs, k, lead, largest, exact=False)
    remaining = uint64.subtract(k, uint64.sum_over(bracket.above, [0]))

    def share(remaining: Wide, ties: Wide) -> tuple[Wide, _Share]:
        every = uint64.reaches(remaining, ties)
        taken = uint64.where(every, ties, remaining)
        return uint64.subtract(remaining, taken), _Share(every, ~every & ((taken.hi | taken.lo) > 0), taken)

    # Ties go to the arrays in their order.
    _, stacked = jax.lax.scan(share, remaining, uint64.subtract(bracket.least, bracket.above))
    shares = [jax.tree.map(lambda s, i=i: s[i], stacked) for i in range(len(xs))]
    return bracket.key, shares, invalid


@functools.partial(jax.jit, static_argnames=("lead", "largest"))
def _mask(x: Array, key: Array, share: _Share, lead: int, largest: bool) -> Array:
    """Scores above the key, and the array's share of those equal to it. Compiled once for all arrays of one shape."""
    shape = x.shape
    x = x.reshape(*shape, 1) if x.ndim == lead else x

    def ties(after: Array) -> Array:
        inside, value, _ = jax.lax.optimization_barrier((x, key, after))
        return _key(inside, largest) == _expand_leading(value, x.shape)

    one = jnp.ones_like(share.taken.lo)
    # Where no tie is cut any number will do: the result is masked by `some` below.
    rank = uint64.where(share.some, share.taken, Wide(jnp.zeros_like(one), one))
    zeros = [jnp.zeros(key.shape, jnp.uint32)] * (x.ndim - lead)
    # Ties that are cut are rare; without them the passes over the scores are saved.
    coordinates = jax.lax.cond(jnp.any(share.some), lambda: _last_coordinates(ties, rank, x.shape, lead), lambda: zeros)
    keys = _key(x, largest)
    first = _expand_leading(share.some, x.shape) & _up_to(coordinates, x.shape, lead)
    mask = (keys > _expand_leading(key, x.shape)) | (
        (keys >= _expand_leading(key, x.shape)) & (_expand_leading(share.every, x.shape) | first)
    )
    return mask.reshape(shape)
