"""Eight fake devices, programs compiled in a hurry and kept for the whole run, and no network.

Most of the time of these tests is XLA compiling, so it compiles without optimising. Tests marked ``optimized`` are about
bits, memory or cost: they run where ``JFT_TEST_OPTIMIZED=1`` has everything compiled as users' programs are.
"""

import functools
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
import jaxlib
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir

OPTIMIZED = os.environ.get("JFT_TEST_OPTIMIZED") == "1"
CACHE = os.environ.get("JFT_TEST_CACHE", os.path.join(tempfile.gettempdir(), "jft-test-cache"))
jax.config.update("jax_num_cpu_devices", 8)
# Programs of either kind have a folder of their own: the key of a program does not tell them apart.
jax.config.update("jax_compilation_cache_dir", os.path.join(CACHE, "optimized" if OPTIMIZED else "quick"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_cheaply() -> None:
    """Have XLA spend 0.2 s of a processor on the gradient of a small decoder, where 1.3 s are usual."""
    # One line of Python for each operation in a program's text, not ten; one module for LLVM, not one for each thread.
    jax.config.update("jax_traceback_in_locations_limit", 1)
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if not OPTIMIZED:
        jax.config.update("jax_disable_most_optimizations", True)
        flags.append("--xla_cpu_use_fusion_emitters=false")
    # Later ones may not have the flags, and XLA ends the process over one that it does not know.
    if jaxlib.__version__.startswith("0.10."):
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([given, *flags])
        jax.devices()  # reads the flags
        os.environ["XLA_FLAGS"] = given  # libtpu reads them too, later, and does not have these either
        mlir.make_ir_context = functools.partial(context, functools.cache(mlir.make_ir_context), mlir.make_ir_context)


def context(shared, new):
    """The MLIR context for a program, one for all: to make one takes a sixth of what most programs here take in all.

    What is computed while another program is lowered needs one of its own, since the shared one is within that program.
    """
    return new() if ir.Context.current else shared()


compile_cheaply()
# Processes that tests start compile in the same hurry, and keep their programs for each other.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": os.path.join(CACHE, "optimized" if OPTIMIZED else "processes"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": str(not OPTIMIZED),
}


def pytest_collection_finish():
    """Leave what stays to the end out of garbage collections, and collect at a hundredth of the usual times."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    if not OPTIMIZED:
        skip = pytest.mark.skip(reason="about optimised programs: set JFT_TEST_OPTIMIZED=1")
        for item in items:
            if item.get_closest_marker("optimized"):
                item.add_marker(skip)


# Each compiled program takes some memory maps, of which Linux gives a process 65530; without more it is killed.
MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forget all compiled programs once there are many; a module makes some thousands at most."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        for module in [m for name, m in sys.modules.items() if name.startswith("jft")]:
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()
        jax.clear_caches()
        gc.collect()
