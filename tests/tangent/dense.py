"""The dense Jacobian of a model of ``tests.tangent.models`` in float64, in NumPy, as the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from tests.tangent import models

TOLERANCES = {"float64": 1e-9, "float32": 1e-4}


def pick(outputs, batch):
    """A few outputs of each example: dense Jacobians stay small."""
    if isinstance(outputs, dict):
        return jnp.concatenate([outputs["image"], outputs["text"]], axis=1)[:, ::3]
    return outputs.reshape(len(outputs), -1)[:, :: max(1, outputs[0].size // 3)]


@functools.cache
def reference(name):
    """``(f(theta0) [N, C], {path: J [N, C, ...]})`` of :func:`pick`; every example by itself."""
    with jax.enable_x64(True):
        model, params, batch = models.model(name, jnp.float64)

        def values(params):
            return pick(model.apply(params, batch), batch)

        f0, J = jax.jit(lambda p: (values(p), jax.jacrev(values)(p)))(params)
        return np.asarray(f0), {p: np.asarray(x) for p, x in tree.flatten(J).items()}


def moved(name, tau):
    """``J tau [N, C]`` in float64, for ``{path: array}``."""
    _, J = reference(name)
    return sum(np.tensordot(J[p], np.asarray(x, np.float64), np.ndim(x)) for p, x in tau.items())


def flat(name, paths=None):
    """The Jacobian ``[N, C, P]`` of the weights at ``paths``."""
    _, J = reference(name)
    return np.concatenate([x.reshape(*x.shape[:2], -1) for p, x in J.items() if paths is None or p in paths], axis=2)


def encodings(params, seed):
    """A task vector of every encoding, and what it is densely."""
    from tests.tangent.test_linearized import mixed

    tau = mixed(params, seed)
    return tau, {p: np.asarray(d.dense(), np.float64) for p, d in tau.items()}


def close(found, expected, dtype):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[dtype] * np.abs(expected).max())
