"""Compile-only planning: a mesh of TPU chips that are not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jft.parallel.mesh import make_mesh


def topology_mesh(topology: str, shape: Mapping[str, int] | None = None, **options: Any) -> Mesh:
    """A mesh over the chips of a TPU topology such as ``v5e:2x4`` (kind:grid), for compiling without a TPU.

    ``jft.parallel.plan(jit(step, in_shardings=...).lower(shapes))`` on it runs XLA's TPU compiler, Mosaic kernels
    included, from the ``libtpu`` package, and tells the memory per chip. Nothing can be executed.
    ``shape`` as for :func:`jft.parallel.make_mesh`; ``options`` go to ``get_topology_desc`` (``num_slices``...).

    Raises ``ValueError`` where libtpu is not installed or does not know the topology.
    """
    from jax.experimental import topologies

    if jax.default_backend() != "tpu":
        # Where no chip is, none can be taken twice, and there is no metadata server to wait for.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        description = topologies.get_topology_desc(topology_name=topology, platform="tpu", **options)
    except Exception as error:  # the plugin raises RuntimeError, JaxRuntimeError or ValueError, by version and cause
        raise ValueError(
            f"topology {topology!r} cannot be described: {str(error).splitlines()[0]}. It is written kind:grid "
            "(v5e:2x4, v4:2x2x2), and needs the libtpu package: pip install libtpu"
        ) from error
    return make_mesh(shape, description.devices)
