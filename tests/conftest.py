"""Eight fake devices, a compilation cache shared by the whole run, and no network."""

import gc
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NPROC", "16")  # XLA's CPU thread pool: fewer threads than fake devices can deadlock collectives
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import pytest

CACHE = os.environ.get("JFT_TEST_CACHE", os.path.join(tempfile.gettempdir(), "jft-test-cache"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Each compiled program takes some memory maps, of which Linux gives a process 65530; without more it is killed.
MAPS = 20_000


@pytest.fixture(autouse=True)
def few_programs():
    """Forget all compiled programs once there are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        for module in [m for name, m in sys.modules.items() if name.startswith("jft")]:
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quickly_compiled():
    """Without XLA's optimisations, for modules whose time is nearly all compiling; others do not share their programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
