"""The dense Jacobian of a model of ``tests.tangent.models`` in float64, in NumPy, as the reference; and task vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta, tree
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


def encoded(path, x):
    """A change of ``x`` in an encoding of its own kind, for matrices in turn."""
    if x.ndim < 2 or not path.endswith("/w"):
        return delta.Dense(x)
    *_, rows, columns = x.shape
    matrices = x.reshape(-1, rows, columns)
    kind = 4 if path.endswith("experts/down/w") else sum(map(ord, path)) % 5
    if kind == 0:
        large = np.abs(x) > 0.1
        at = np.argwhere(large.reshape(-1, columns)).astype(np.int32)
        return delta.Entries(*at.T, x[large], x.shape)
    if kind == 1:
        first = np.arange(len(matrices), dtype=np.int32)[:, None] * np.array([1, 0, 0], np.int32)
        return delta.Blocks(first, matrices[:, : rows // 2, : columns // 2], x.shape)
    if kind in (2, 3):
        axis = (-2, -1)[kind - 2]
        stacked = np.concatenate(matrices if axis == -2 else np.swapaxes(matrices, -1, -2))
        index = np.arange(len(stacked), dtype=np.int32)[:: 1 + kind]
        return delta.Slices(index, stacked[index], x.shape, axis)
    return delta.LowRank(x[..., :2], x[..., :2, :])


@functools.cache
def mixed(name, seed):
    """A task vector of every encoding, for a model."""
    drawn = tree.flatten(jax.device_get(models.draw(models.model(name)[1], seed)))
    return jax.device_put(delta.TaskVector({p: encoded(p, x) for p, x in drawn.items()}))


@jax.jit
def whole(tau):
    """``{path: array}`` of a task vector."""
    return {p: d.dense() for p, d in tau.items()}


def close(found, expected, dtype):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[dtype] * np.abs(expected).max())
