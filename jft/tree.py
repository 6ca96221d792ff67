"""Paths, pattern selection, counts and fingerprints of pytrees.

A *path* is the keys that lead to a leaf, joined by ``/``: ``layers/attn/q/w``. Everything in jft that speaks of "which
weights" speaks of paths, so that a selection written for one model reads the same in a config, a log and a file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.names import nearest

Tree = Any
SEPARATOR = "/"


def path_of(keys: tuple) -> str:
    """The path string of a key tuple from ``jax.tree_util``."""
    return jax.tree_util.keystr(keys, simple=True, separator=SEPARATOR)


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """``{path: leaf}`` in tree order. ``None`` leaves are absent, as everywhere in JAX.

    Raises ``ValueError`` where two leaves have one path, as ``{"a/b": x, "a": {"b": y}}``.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    flat: dict[str, Any] = {}
    for keys, leaf in leaves:
        path = path_of(keys)
        if path in flat:
            raise ValueError(f"two leaves have the path {path!r}; rename a key that holds {SEPARATOR!r}")
        flat[path] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Nested dicts from ``{path: leaf}``; the inverse of :func:`flatten` for trees of dicts."""
    root: dict = {}
    for path, leaf in flat.items():
        node = root
        *parents, last = path.split(SEPARATOR)
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r} runs through another leaf")
        if last in node:
            raise ValueError(f"path {path!r} is both a leaf and a parent, or stands twice")
        node[last] = leaf
    return root


def like(tree: Tree, flat: Mapping[str, Any]) -> Tree:
    """``tree`` with its leaves replaced by those of ``flat`` (every path must be there): keeps non-dict containers."""
    # By path, not by position: ``flat`` may come from a file, in any order.
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree_util.tree_unflatten(treedef, [flat[path_of(keys)] for keys, _ in keyed])


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``jax.tree.map`` whose function also gets the path: ``fn(path, leaf, *other_leaves)``."""
    return jax.tree_util.tree_map_with_path(lambda keys, *leaves: fn(path_of(keys), *leaves), tree, *rest)


Patterns = Sequence[str] | str
EVERYTHING = ("",)
HEADS = (r"(^|/)(head|classifier)/",)
LAYERS = (r"(^|/)(layers?|blocks?|h)(/|_)",)


def patterns(value: Patterns) -> tuple[str, ...]:
    """One regular expression on paths or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def matcher(patterns: str | Iterable[str]) -> Callable[[str], bool]:
    """A predicate on paths: true where any of the regular expressions is found (``re.search``).

    Anchor with ``^`` and ``$`` for the whole path. Raises ``ValueError`` naming a pattern that does not compile.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    return lambda path: any(p.search(path) for p in compiled)


def matching(paths: Iterable[str], patterns: str | Iterable[str], what: str = "pattern") -> list[str]:
    """The paths that match any pattern, in order. A pattern that matches nothing is refused with the nearest paths."""
    paths = list(paths)
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        hit = matcher(pattern)
        if not any(hit(p) for p in paths):
            # No cutoff: a regular expression resembles no path closely, and some hint is better than none.
            near = nearest(pattern, paths, n=3, cutoff=0.0, hint="; nearest paths: {}")
            raise ValueError(f"{what} {pattern!r} matches no weight{near}")
    # One pass over all patterns: a path that matches two of them is listed once, in the order of the paths.
    hit = matcher(patterns)
    return [p for p in paths if hit(p)]


# How other libraries number the layers that they do not stack.
_NUMBERED = re.compile(r"(?:^|/)(?:layers?|blocks?|h)[/_](\d+)(?=/|$)")


def stack_of(path: str) -> str | None:
    """The stack of layers that a leaf or site belongs to: ``text/layers`` of ``text/layers/mlp/up/w``; None outside layers.

    Leaves of a stack of jft's own models begin with the axis L. ``layers`` is a whole key that has others below it.
    """
    # The slash in front lets a stack at the root match as well; it is taken off again below.
    head, separator, _ = f"/{path}".partition("/layers/")
    return f"{head}/layers"[1:] if separator else None


def stacks(leaves: Mapping[str, Any]) -> dict[str, int]:
    """``{"text/layers": L}``: the stacks of ``{path: array or shape struct}`` and how many layers each has."""
    lengths: dict[str, int] = {}
    for path, leaf in leaves.items():
        stack = stack_of(path)
        if stack is not None:
            # All leaves of a stack have the same first axis, so the first one says how long it is.
            lengths.setdefault(stack, leaf.shape[0])
    return lengths


def lead(path: str, ndim: int, stacked: bool) -> int:
    """The leading axes of a leaf that stack matrices ``[in, out]`` or, with layers ``[L, D]``, vectors.

    stacked: the model is one of jft's, whose leaves under ``layers/`` begin with the axis L.
    """
    # The larger of both: layers ``[L, D]`` of vectors show one axis, experts ``[L, E, I, O]`` two.
    return max(int(stacked and stack_of(path) is not None), ndim - 2)


def layer_of(path: str) -> tuple[str, int] | None:
    """The layer that a path carries the number of, and the number: ``("h_3", 3)`` of ``h_3/kernel``; None without one.

    Layers are numbered under ``layer``, ``layers``, ``block``, ``blocks`` or ``h``, as ``blocks/3/...`` or ``blocks_3/...``.
    """
    match = _NUMBERED.search(path)
    return (path[: match.end()], int(match[1])) if match else None


def partition(tree: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Two trees of the same structure: leaves whose path is kept, and the others; ``None`` in the gaps."""
    return (
        map_with_path(lambda p, x: x if keep(p) else None, tree),
        map_with_path(lambda p, x: None if keep(p) else x, tree),
    )


def combine(first: Tree, second: Tree) -> Tree:
    """The inverse of :func:`partition`."""
    # None has to count as a leaf here: JAX sees it as an empty subtree, and the structures would differ.
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def size(x: Any) -> int:
    """Elements of an array or a shape, as a Python integer (no 2**31 limit)."""
    return math.prod(x.shape)


def count(tree: Tree) -> int:
    """Total number of elements."""
    return sum(size(x) for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Total bytes of all leaves, as they are typed."""
    return sum(size(x) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def cast(tree: Tree, dtype: Any) -> Tree:
    """Floating-point leaves in ``dtype``; others, and ``dtype=None``, as they are."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def concrete(x: Any) -> bool:
    """Whether ``x`` has values: not under a transformation, not a shape alone."""
    # Tracers are instances of jax.Array too, hence the second test.
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer)


def visible(*arrays: Any) -> bool:
    """Whether this process can look at all values of ``arrays``: concrete, and not spread over other processes."""
    return all(
        concrete(x) and (isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated) for x in arrays
    )


def host(x: Any) -> np.ndarray:
    """``x`` in this process's memory, contiguous; gathered where not :func:`visible`: then all processes must call."""
    if not visible(x) and isinstance(x, jax.Array):
        # Imported here: only runs of several processes need it.
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    # ascontiguousarray gives a scalar one axis; reshape takes it away again.
    return np.ascontiguousarray(np.asarray(x)).reshape(np.shape(x))


def _mix(h: jax.Array) -> jax.Array:
    """A 32-bit finaliser (MurmurHash3's): every input bit reaches every output bit."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32, sub-words of wider types folded together."""
    # bitcast_convert_type refuses bool and complex types.
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _mix(_words(x.real)) ^ _words(x.imag)
    width = np.dtype(x.dtype).itemsize
    # An 8-byte type becomes two uint32: JAX has no uint64 unless 64-bit types are enabled.
    if width == 8:
        low_high = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return _mix(low_high[..., 0]) ^ low_high[..., 1]
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Two uint32 sums over elements of a hash of (index, bits): exact integers, hence the same under any sharding."""
    # Mixed axis by axis, because a flat index would wrap beyond 2**32 elements; the constant is that of the golden ratio.
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        position = _mix(position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(0x9E3779B9 + axis))
    words = _mix(_words(x) ^ position)
    # Sums modulo 2**32 do not depend on the order of their terms; two of them make 64 bits.
    return jnp.stack([jnp.sum(words, dtype=jnp.uint32), jnp.sum(_mix(words + jnp.uint32(1)), dtype=jnp.uint32)])


def checksums(tree: Tree) -> dict[str, str]:
    """``{path: 16 hex digits}`` over the shape, dtype and contents of each leaf; equal on 1 device and on 256.

    Contents enter as order-free integer checksums computed where the shards live, so nothing is gathered.
    """
    flat = flatten(tree)
    # One transfer at the end: the checksums of all leaves run without a wait between them.
    sums = jax.device_get({p: _checksum(jnp.asarray(x)) for p, x in flat.items()})
    described = {p: f"{tuple(x.shape)}:{np.dtype(x.dtype).name}:{sums[p].tolist()}" for p, x in flat.items()}
    return {p: hashlib.sha256(text.encode()).hexdigest()[:16] for p, text in described.items()}


def fingerprint(tree: Tree) -> str:
    """32 hex digits over the paths and :func:`checksums` of all leaves, in whatever order they come."""
    return fingerprint_of(checksums(tree))


def fingerprint_of(sums: Mapping[str, str]) -> str:
    """The :func:`fingerprint` of a tree whose :func:`checksums` are known."""
    # Sorted: dicts restored from a file may have another order than those of the run that wrote it.
    lines = "".join(f"{path}:{sums[path]}\n" for path in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def key_for(key: jax.Array, path: str) -> jax.Array:
    """A random key that depends on ``key`` and the path alone: the same draw wherever and in whatever order it is made."""
    # sha256, not hash(): Python salts the hash of a string anew in each process.
    return jax.random.fold_in(key, int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little"))
