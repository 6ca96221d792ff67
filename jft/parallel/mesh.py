"""The device mesh, and the layout of batches on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of named axes over ``devices`` (default: all of every process).

    Axes are ``data`` (replicas of everything), ``fsdp`` (parameters and optimizer state are sharded over it, the batch
    too) and ``tensor`` (within matrices, Megatron style); one that is not given has size 1, other names are kept after
    them. One size may be -1: whatever devices remain. Default ``{"data": 1, "fsdp": -1, "tensor": 1}``.

    Raises ``ValueError`` where a size is not a positive integer or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    requested = {"fsdp": -1} if shape is None else dict(shape)
    # The known axes always, so that sharding rules may name them on any mesh.
    sizes = {**{axis: requested.get(axis, 1) for axis in AXES}, **requested}
    for axis, size in sizes.items():
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or (size < 1 and size != -1):
            raise ValueError(
                f"mesh axis {axis!r} has size {size!r}; sizes are positive integers, or -1 once for the rest"
            )
    sizes = _fill(sizes, len(devices))
    names = tuple(sizes)
    # Auto: models rely on XLA's propagation of shardings, and make_mesh has other defaults in other releases of JAX.
    return jax.make_mesh(tuple(sizes.values()), names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def _fill(sizes: dict[str, int], count: int) -> dict[str, int]:
    """``sizes`` with the -1 replaced, checked against ``count`` devices."""
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh {text}: only one axis may be -1, found {', '.join(open_axes)}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        if count % known:
            raise ValueError(f"mesh {text}: {known} does not divide the {count} devices; change a size")
        return {**sizes, open_axes[0]: count // known}
    if known != count:
        raise ValueError(f"mesh {text} needs {known} devices, there are {count}; change a size, or set one to -1")
    return dict(sizes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis B over ``data`` and ``fsdp``; the others whole."""
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def batch_shards(mesh: Mesh | None) -> int:
    """Number of parts of the rows of a batch on the mesh; one without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def microbatches(batch: Any, parts: int, mesh: Mesh | None = None) -> Any:
    """Leaves ``[B, ...]`` as ``[parts, B / parts, ...]``, every ``parts``-th row together: rows stay on their device.

    Scalars go to every part. Raises ``ValueError`` where the rows do not divide.
    """

    def split(x: Any) -> Any:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (parts,))
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} does not divide into accumulate={parts} microbatches")
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        if mesh is None:
            return x
        spec = PartitionSpec(None, *batch_sharding(mesh).spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(split, batch)


def put_batch(batch: Any, mesh: Mesh | None = None) -> Any:
    """Global arrays ``[B, ...]`` from the rows ``[B / processes, ...]`` that this process holds (a pytree of numpy).

    Rows go over ``data`` and ``fsdp`` (:func:`batch_sharding`); scalars are replicated; ``mesh=None`` puts everything on
    the default device. Raises ``ValueError`` naming the leaf where its rows do not divide over this process's shards.
    """
    if mesh is None:
        return jax.tree.map(jax.device_put, batch)
    rows = batch_sharding(mesh)
    shards = _local_shards(mesh)

    def put(keys: tuple, x: Any) -> jax.Array:
        x = np.asarray(x)
        if x.ndim == 0:
            return jax.make_array_from_process_local_data(replicated(mesh), x)
        if x.shape[0] % shards:
            name = jax.tree_util.keystr(keys, simple=True, separator="/") or "array"
            raise ValueError(
                f"batch {name!r} has {x.shape[0]} rows on this process, which do not divide over its {shards} shards "
                f"of data x fsdp; make the batch size a multiple of {shards * jax.process_count()}, or the mesh smaller"
            )
        return jax.make_array_from_process_local_data(rows, x)

    return jax.tree_util.tree_map_with_path(put, batch)


def _local_shards(mesh: Mesh) -> int:
    """Number of distinct row blocks of a batch on this process's devices."""
    total = batch_shards(mesh)
    blocks = batch_sharding(mesh).addressable_devices_indices_map((total,))
    # Distinct ones: devices along ``tensor`` hold the same rows.
    return len({index[0].indices(total) for index in blocks.values() if index is not None})
