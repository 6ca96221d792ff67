"""GPUs that programs are compiled for on a machine that has none: JAX's CUDA plugin needs their numbers only."""

from importlib import metadata

import pytest

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""

GPU_TARGETS = {
    "h100": _TARGET.format(
        name="NVIDIA H100 80GB HBM3", bandwidth=3_350_000_000_000, l2=52_428_800, memory=85_000_000_000
    ),
    "h200": _TARGET.format(name="NVIDIA H200", bandwidth=4_800_000_000_000, l2=62_914_560, memory=150_000_000_000),
}


def gpu_topology(name):
    """One GPU of a kind in GPU_TARGETS, to compile for; skips the test where JAX's CUDA plugin is not installed."""
    if not {"jax-cuda12-plugin", "jax-cuda13-plugin"} & {d.name for d in metadata.distributions()}:
        pytest.skip("JAX's CUDA plugin is not installed: pip install jax-cuda12-plugin jax-cuda12-pjrt")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=GPU_TARGETS[name])
