"""Eight fake devices, a compilation cache shared by the whole run, and no network."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NPROC", "16")  # XLA's CPU thread pool: fewer threads than fake devices can deadlock collectives
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax

CACHE = os.environ.get("JFT_TEST_CACHE", os.path.join(tempfile.gettempdir(), "jft-test-cache"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
