"""What runs on real data is compiled without XLA's optimisations: nearly all of its time is compiling."""

import jax
import pytest


@pytest.fixture(scope="module")
def quickly_compiled():
    """For a module; nothing that it compiled is left to others."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
