"""Small task vectors for tests of rules, and the arrays of their tensors, one by one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.delta import Dense, TaskVector
from jft.merge.trim import uniform

SHAPES = {"a": (6, 9), "layers/w": (2, 4, 3)}
ODD = {"scalar": (), "column": (6, 1)}


def vectors(count=3, seed=0, shapes=SHAPES, distinct=False):
    """Task vectors whose deltas hold zeros and equal magnitudes; ``distinct``: neither."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape) if distinct else rng.integers(-6, 7, shape) / 4
    return [
        TaskVector({path: Dense(jnp.asarray(draw(shape), jnp.float32)) for path, shape in shapes.items()})
        for _ in range(count)
    ]


def split(tau):
    """Name -> float64 array, every layer a tensor of its own."""
    arrays = {}
    for path in sorted(tau):
        x = np.asarray(tau[path].dense(), np.float64)
        arrays |= {f"{path}/{i}": y for i, y in enumerate(x)} if path.startswith("layers/") else {path: x}
    return arrays


def flat(tau):
    """All entries of a vector."""
    return np.concatenate([x.ravel() for x in split(tau).values()])


def uniforms(taus, seed=0):
    """Name -> the numbers ``[N, ...]`` that random masks are made of."""
    out = {}
    for name, x in split(taus[0]).items():
        path, layer = (name.rsplit("/", 1)[0], int(name[-1])) if name.startswith("layers/") else (name, 0)
        key = jax.random.fold_in(tree.key_for(jax.random.key(seed), path), layer)
        out[name] = np.asarray(uniform(SimpleNamespace(key=key, deltas=np.zeros((len(taus), *x.shape)))))
    return out


def each_tensor(rule, taus, **options):
    """Name -> ``rule([x_1, ..., x_N], **options)`` of the arrays of every tensor."""
    parts = [split(tau) for tau in taus]
    return {name: rule([part[name] for part in parts], **options) for name in parts[0]}


def assert_equal(merged, expected, atol=5e-7):
    """The tensors of a task vector are those of ``expected``."""
    result = split(merged)
    assert result.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(result[name], x, atol=atol, rtol=1e-6, err_msg=name)


def assert_close(a, b, atol=1e-6):
    """Two task vectors are the same up to rounding."""
    np.testing.assert_allclose(flat(a), flat(b), atol=atol)
