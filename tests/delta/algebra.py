"""Random encodings and their float64 references, for the property tests."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jft.delta import Dense, LowRank, Rows, Sum

SHAPE = (4, 24, 20)
KINDS = ("dense", "low_rank", "rows", "no_rows", "sum", "wide_sum")


def make(kind, seed, shape=SHAPE):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    *lead, rows, columns = shape
    if kind == "dense":
        return Dense(draw(*shape))
    if kind == "low_rank":
        return LowRank(draw(*lead, rows, 2), draw(*lead, 2, columns))
    if kind == "rows":
        return Rows(jnp.asarray(rng.permutation(shape[0])[:2], jnp.int32), draw(2, *shape[1:]), shape)
    if kind == "no_rows":
        return Rows(jnp.zeros(0, jnp.int32), draw(0, *shape[1:]), shape)
    if kind == "sum":
        return Sum((make("rows", seed + 1, shape), make("low_rank", seed + 2, shape)))
    return Sum((make("dense", seed + 1, shape), make("rows", seed + 2, shape), make("low_rank", seed + 3, shape)))


def reference(encoding):
    """The delta in float64, from the definition of each encoding alone."""
    f64 = lambda x: np.asarray(x, np.float64)
    if isinstance(encoding, Dense):
        return f64(encoding.value)
    if isinstance(encoding, LowRank):
        return np.einsum("...ir,...ro->...io", f64(encoding.a), f64(encoding.b))
    if isinstance(encoding, Rows):
        out = np.zeros(encoding.shape)
        out[np.asarray(encoding.indices)] = f64(encoding.values)
        return out
    return sum(reference(part) for part in encoding.parts)


def encodings():
    return st.builds(make, st.sampled_from(KINDS), st.integers(0, 2**20))


def close(got, want, scale=None):
    """Equal up to float32 rounding at the size of what was added up."""
    got = reference(got) if hasattr(got, "dense") else np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * (scale or max(1.0, np.abs(want).max(initial=0))))
