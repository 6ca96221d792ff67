"""Low-rank factors of the stack's matrices, by themselves or beside entries that train, with Adam in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta, tree
from tests.methods import stack
from tests.methods.decoder import dense
from tests.methods.stack import DOWN, UP

LINEAR = (UP, DOWN)
W = stack.wide(stack.parameters())
RANK, ALPHA = 2, 4.0
SCALE = ALPHA / RANK


def factors(beside=True, rank=RANK):
    """Where a and b start, ``a ~ U(+-1/sqrt(I))`` and b zero; beside a selection from a key of their own."""
    out = {}
    for p in LINEAR:
        key = tree.key_for(jax.random.key(0), p)
        key = jax.random.split(key)[1] if beside else key
        limit = 1 / np.sqrt(W[p].shape[1])
        a = jax.random.uniform(key, (*W[p].shape[:2], rank), jnp.float32, -limit, limit)
        out[p] = {"a": np.asarray(a, np.float64), "b": np.zeros((stack.LAYERS, rank, W[p].shape[2]))}
    return out


def turned(x):
    return np.swapaxes(x, -1, -2)


class Moments:
    """Adam by name, for values of any shape."""

    def __init__(self):
        self.moments, self.ages = {}, {}

    def step(self, name, value, g, rate=stack.RATE):
        age = self.ages[name] = self.ages.get(name, 0) + 1
        m, v = self.moments.get(name, (0, 0))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        self.moments[name] = m, v
        return value - rate * m / (1 - 0.9**age) / (np.sqrt(v / (1 - 0.999**age)) + 1e-8)


class Both:
    """Sparse values and factors, each with Adam; rates are times that of ``step``, scale is of the factors' product."""

    def __init__(self, low_rank, rate=1.0, base=W, scale=SCALE, entries_rate=1.0):
        self.w, self.low_rank, self.scale = dict(base), low_rank, scale
        self.rate, self.entries_rate = rate, entries_rate
        self.adam, self.moments = stack.Adam(), Moments()

    @property
    def whole(self):
        return {p: w + (self.scale * self.low_rank[p]["a"] @ self.low_rank[p]["b"] if p in self.low_rank else 0)
                for p, w in self.w.items()}  # fmt: skip

    def step(self, batch, masks=None, lr=stack.RATE):
        g = stack.gradient(self.whole, batch)
        for p, f in self.low_rank.items():
            by_part = {"a": self.scale * g[p] @ turned(f["b"]), "b": self.scale * turned(f["a"]) @ g[p]}
            self.low_rank[p] = {k: self.moments.step((p, k), f[k], x, lr * self.rate) for k, x in by_part.items()}
        self.adam.rate = lr * self.entries_rate
        self.w = self.adam.step(self.w, g, masks or {})


def check(finished, expected, masks):
    """Weights, masks, and a task vector that holds both parts and gives the weights back."""
    stack.check(finished, expected.whole)
    for path, mask in stack.masks(finished).items():
        np.testing.assert_array_equal(mask, masks[path], err_msg=path)
    # Dense where the sum of the two would be larger.
    parts = {
        path: {type(part): part for part in finished.task_vector[path].parts}
        for path in LINEAR if not isinstance(finished.task_vector[path], delta.Dense)
    }  # fmt: skip
    for path, moved in dense({path: both[delta.Entries] for path, both in parts.items()}).items():
        np.testing.assert_array_equal(np.asarray(moved) != 0, masks[path], err_msg=path)
        assert parts[path][delta.LowRank].a.shape[-1] == RANK
    base = delta.apply(stack.parameters(), finished.task_vector)
    for a, b in zip(*(tree.flatten(x).values() for x in (base, finished.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
