"""Slices of jft leaves out of the tensors of a checkpoint, reading only what they need."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

from jft.models.hf.checkpoint import Checkpoint, LoadError
from jft.models.hf.mapping import Source
from jft.names import nearest

CHUNK = 1 << 24
"""Bytes copied before the pages they came from are given back."""

ROWS = 16
"""Rows transposed at a time: each output row then receives half a cache line or more (7x faster than one assignment)."""

BUFFERS = (
    r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r".*\.position_ids",
    r"position_ids",
    r".*num_batches_tracked",
)
"""Tensors that old checkpoints carry and that are computed, not learned."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One jft leaf bound to a checkpoint: its shape, and the name of the tensor at each (layer, expert)."""

    path: str
    source: Source
    shape: tuple[int, ...]
    names: Mapping[tuple[int, ...], str]

    @property
    def stacked(self) -> int:
        """The number of leading axes that run over tensors."""
        return stacked_axes(self.source)


def stacked_axes(source: Source) -> int:
    """Leading axes of a leaf that run over tensors: 1 for ``{layer}``, 1 for ``{expert}``."""
    return ("{layer}" in source.name) + ("{expert}" in source.name)


def tensor_name(template: str, position: tuple[int, ...]) -> str:
    """The template at one position of the leading axes."""
    fields = [field for field in ("layer", "expert") if "{" + field + "}" in template]
    for field, number in zip(fields, position, strict=True):
        template = template.replace("{" + field + "}", str(number))
    return template


def stack_indices(source: Source, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every (layer, expert) of a leaf of this shape."""
    return itertools.product(*(range(n) for n in shape[: stacked_axes(source)]))


def bind(checkpoint: Checkpoint, path: str, source: Source, shape: tuple[int, ...]) -> Leaf:
    """The leaf's tensors, checked: each there under its name or an alias, of the right shape and a floating-point dtype."""
    source = _layout(checkpoint, source)
    names = {position: _find(checkpoint, path, source, position) for position in stack_indices(source, shape)}
    for name in names.values():
        entry = checkpoint.entries[name]
        if entry.shape != tuple(source.shape):
            raise LoadError(
                f"tensor {name!r} in {entry.file} has shape {entry.shape}, but {path!r} wants {tuple(source.shape)}; "
                "config.json and the weights do not belong together"
            )
        # F64 to F8, and BF16; BOOL begins with a B too.
        if entry.dtype[:1] not in ("F", "B") or entry.dtype == "BOOL":
            raise LoadError(f"tensor {name!r} in {entry.file} has dtype {entry.dtype}, a weight must be floating point")
    return Leaf(path, source, shape, names)


def _layout(checkpoint: Checkpoint, source: Source) -> Source:
    """The layout of a leaf that the checkpoint uses: the usual one unless only another is there."""
    # The first layer and expert stand for all: no checkpoint mixes layouts.
    other, position = source.other, (0,) * stacked_axes(source)
    if other is None or any(tensor_name(t, position) in checkpoint for t in (source.name, *source.aliases)):
        return source
    first = (0,) * stacked_axes(other)
    return other if any(tensor_name(t, first) in checkpoint for t in (other.name, *other.aliases)) else source


def _find(checkpoint: Checkpoint, path: str, source: Source, position: tuple[int, ...]) -> str:
    candidates = [tensor_name(template, position) for template in (source.name, *source.aliases)]
    for name in candidates:
        if name in checkpoint:
            return name
    near = nearest(candidates[0], checkpoint.entries, hint="; nearest there: '{}'")
    raise LoadError(f"tensor {candidates[0]!r} (for {path!r}) is missing from {checkpoint.directory}{near}")


def refuse_unexpected(checkpoint: Checkpoint, read_names: Iterable[str], ignored: Iterable[str]) -> None:
    """``LoadError`` naming the tensors that no leaf reads and no pattern (``re.fullmatch``) excepts."""
    patterns = [re.compile(pattern) for pattern in (*BUFFERS, *ignored)]
    read_names = set(read_names)
    extra = [n for n in checkpoint.entries if n not in read_names and not any(p.fullmatch(n) for p in patterns)]
    if extra:
        first_names = ", ".join(repr(n) for n in extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise LoadError(
            f"{checkpoint.directory} holds {first_names}, which the model that config.json describes does not have; "
            "loading would drop it silently"
        )


def stored_dtype(checkpoint: Checkpoint, leaf: Leaf) -> np.dtype:
    """The dtype that holds all tensors of a leaf."""
    return np.dtype(jnp.result_type(*{checkpoint.tensor(n).dtype for n in leaf.names.values()}))


def read(checkpoint: Checkpoint, leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """``leaf[index]`` in ``dtype`` as a new array: one slice per axis, stacked over its layers and experts."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], dtype)
    lead, inner = bounds[: leaf.stacked], tuple(slice(*b) for b in bounds[leaf.stacked :])

    def copy(position: tuple[int, ...]) -> None:
        name = leaf.names[position]
        part = _part(leaf, leaf.source.view(checkpoint.tensor(name)), inner)
        target = out[tuple(p - start for p, (start, _) in zip(position, lead, strict=True))] if position else out
        _copy(target, part, lambda: checkpoint.release(name))

    positions = list(itertools.product(*(range(*b) for b in lead)))
    # Threads: numpy's copies, which read the pages of the file, release the GIL.
    workers = min(len(positions), 8, os.cpu_count() or 1)
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            # list() raises here what a worker raised.
            list(pool.map(copy, positions))
    else:
        for position in positions:
            copy(position)
    return out


def _part(leaf: Leaf, view: np.ndarray, inner: tuple[slice, ...]) -> np.ndarray:
    """The slice of one tensor's view, lazy as far as its axes are the leaf's."""
    shape = leaf.shape[leaf.stacked :]
    if leaf.source.out is None:
        if view.shape != shape:
            raise LoadError(f"the view of {leaf.source.name!r} has shape {view.shape}, {leaf.path!r} has {shape}")
        return view[inner]
    if view.shape[0] == shape[0]:  # rows of both are the same: only the rows of ``inner`` are read and reshaped
        view = view[inner[0]]
        return view.reshape(len(view), *shape[1:])[(slice(None), *inner[1:])]
    return view.reshape(shape)[inner]


def _copy(out: np.ndarray, part: np.ndarray, release: Any) -> None:
    """``out[...] = part`` in pieces, along the axis on which the file is laid out, giving pages back after each."""
    if out.size == 0:
        return
    if out.ndim == 0:
        out[...] = part
        return release()
    # The stride of an axis of size 1 means nothing.
    axis = max(range(part.ndim), key=lambda i: (part.shape[i] > 1, abs(part.strides[i])))
    transposed = part.ndim > 1 and axis == part.ndim - 1
    per_row = math.prod(part.shape) // part.shape[axis] * part.itemsize
    step = ROWS if transposed else max(1, CHUNK // per_row)
    # Same-size integers copy at memcpy speed; numpy moves bfloat16 element by element.
    target, bits = _as_bits(out), part.dtype == out.dtype
    copied = 0
    for start in range(0, part.shape[axis], step):
        selection = (slice(None),) * axis + (slice(start, start + step),)
        piece = part[selection]
        # In the file's order, so that the conversion reads front to back; the assignment transposes.
        target[selection] = _as_bits(piece if bits else piece.astype(out.dtype, order="K"))
        copied += piece.nbytes
        if copied >= CHUNK:
            release()
            copied = 0
    release()


def _as_bits(x: np.ndarray) -> np.ndarray:
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])
