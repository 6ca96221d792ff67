"""A machine of few devices, for studies: more prove no more there, and small steps mostly wait for each other on them."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def first(count: int) -> Iterator[None]:
    """While entered, JAX has no other devices than the first ``count``."""
    devices = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield
