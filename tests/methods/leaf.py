"""One stacked weight under a quadratic loss: forward, gradients and optimizer steps in float64 NumPy, to compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jft.models import core
from jft.tree import cast

L, I, O, N = 3, 8, 6, 5  # noqa: E741
_draw = np.random.default_rng(0)
X = _draw.normal(size=(L, N, I))
C = _draw.normal(size=(L, N, O))
W = _draw.normal(size=(L, I, O))
W32 = W.astype(np.float32)
w32 = functools.partial(jnp.asarray, W32)


def loss_and_grad(w):
    """``sum(C * y + y^2 / 2)`` of ``y = X @ w`` and its derivative in w ``[L, I, O]``."""
    y = X @ w
    return np.sum(C * y + y**2 / 2), np.swapaxes(X, -1, -2) @ (C + y)


def loss(w, structured, dtype=jnp.float32):
    """The same of what a parametrisation bound: layer by layer in a scan with remat where structured."""
    x, c = jnp.asarray(X, dtype), jnp.asarray(C, jnp.float32)

    def layer(total, sliced):
        x, c, w = sliced
        y = core.dot(x, w).astype(jnp.float32)
        return total + jnp.sum(c * y + y**2 / 2), None

    if structured:
        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), jnp.float32(0), (x, c, w))[0]
    return layer(jnp.float32(0), (x, c, w))[0]


def objective(how, kept, trained, structured, key=None):
    """Loss and penalty of one batch."""
    penalty = how.penalty(kept, trained)
    return loss(how.bind(kept, trained, structured, key), structured) + (0 if penalty is None else penalty)


@functools.partial(jax.jit, static_argnums=0)
def bound(how, kept, trained, key=None):
    """The plain weight that a parametrisation binds."""
    return how.bind(kept, trained, False, key)


@functools.partial(jax.jit, static_argnums=(0, 4))
def gradient_of(how, kept, trained, key, structured):
    return jax.grad(lambda t: objective(how, kept, t, structured, key))(trained)


@functools.partial(jax.jit, static_argnums=0)
def derivative_along(how, kept, trained, key, direction):
    return jax.jvp(lambda t: objective(how, kept, t, True, key), (trained,), (direction,))[1]


@jax.jit
def moved(trained, key=jax.random.key(3), by=0.3):
    """``trained`` some way from where it started."""
    leaves, structure = jax.tree.flatten(trained)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [x + by * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(actual, expected, tolerance=1e-5):
    """Every leaf within ``tolerance`` of the largest value of its reference."""

    def check(a, b):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)

    jax.tree.map(check, actual, expected)


def check_gradient(how, kept, trained, expected, key=None):
    """The gradient of the structured and of the plain weight, and the forward-mode derivative, against ``expected``."""
    expected = wide(expected)
    for structured in (True, False):
        close(gradient_of(how, kept, trained, key, structured), expected)
    direction = moved(jax.tree.map(jnp.zeros_like, trained), by=1.0)
    along = derivative_along(how, kept, trained, key, direction)
    by_hand = sum(
        np.sum(g * d) for g, d in zip(jax.tree.leaves(expected), jax.tree.leaves(wide(direction)), strict=True)
    )
    np.testing.assert_allclose(along, by_hand, rtol=2e-4)


def specs(how, spec, w, at=None):
    """Shardings of ``(kept, trained)`` for a weight sharded as ``spec``."""
    shapes = jax.eval_shape(how.init, jax.random.key(0), w, at)
    return jax.tree.map(lambda what, x: what.sharding(spec, w, x.ndim), how.leaves(at), shapes)


def rates(how, trained):
    """The learning-rate multiplier of every array that trains."""
    return jax.tree.map(lambda what, _: what.rate, how.leaves()[1], trained)


def change(how, kept, trained):
    """How far ``trained`` is from the base."""
    return jax.tree.map(lambda what, x: what.change(kept, x), how.leaves()[1], trained)


def _rule(name, rate):
    return optax.sgd(rate) if name == "sgd" else optax.adamw(rate, weight_decay=0.01)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(name, rate, value, state, gradient, scales):
    updates, state = _rule(name, rate).update(gradient, state, value)
    return jax.tree.map(lambda v, u, s: v + s * u, value, updates, scales), state


def check_steps(how, kept, trained, gradient, rate=1e-2, keys=(None, None, None)):
    """Three steps of SGD and of AdamW, with the parametrisation's rates, against NumPy; ``gradient(trained, key)`` by hand."""
    scales = rates(how, trained)
    for name in ("sgd", "adamw"):
        state, value, reference, moments = jax.jit(_rule(name, rate).init)(trained), trained, wide(trained), {}
        for step, key in enumerate(keys, 1):
            value, state = _update(name, rate, value, state, gradient_of(how, kept, value, key, True), scales)
            by_hand = wide(gradient(reference, key))
            if name == "sgd":
                reference = jax.tree.map(lambda v, g, s: v - rate * s * g, reference, by_hand, scales)
            else:
                reference = _adamw(reference, by_hand, scales, moments, step, rate)
            close(value, reference)


def _adamw(values, gradients, scales, moments, step, rate, decay=0.01):
    def one(v, g, s, m):
        m["m"] = 0.9 * m.get("m", 0) + 0.1 * g
        m["v"] = 0.999 * m.get("v", 0) + 0.001 * g**2
        ratio = m["m"] / (1 - 0.9**step) / (np.sqrt(m["v"] / (1 - 0.999**step)) + 1e-8)
        return v - rate * s * (ratio + decay * v)

    leaves, structure = jax.tree.flatten(values)
    flat = [jax.tree.leaves(x) for x in (gradients, scales)]
    held = [moments.setdefault(i, {}) for i in range(len(leaves))]
    return jax.tree.unflatten(structure, [one(*x) for x in zip(leaves, *flat, held, strict=True)])


def check_transforms(how, kept, trained, key=None):
    """vmap over tasks equals one by one; bfloat16 activations stay bfloat16 and near float32."""
    tasks = jax.tree.map(lambda x: np.stack([x, np.float32(0.9) * np.asarray(x)]), trained)
    together = jax.jit(jax.vmap(lambda t: gradient_of(how, kept, t, key, True)))(tasks)
    for i in range(2):
        one = jax.tree.map(lambda x: x[i], tasks)  # noqa: B023
        close(jax.tree.map(lambda x: np.asarray(x)[i], together), wide(gradient_of(how, kept, one, key, True)))  # noqa: B023

    @functools.partial(jax.jit, static_argnums=0)
    def forward(dtype):
        w = how.bind(cast(kept, dtype), trained, True, key)
        return loss(w, True, dtype), core.dot(jnp.asarray(X[0], dtype), jax.tree.map(lambda x: x[0], w))

    (low, y), (exact, _) = forward(jnp.bfloat16), forward(jnp.float32)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(low, exact, rtol=0.05, atol=3.0)


def largest_buffer(fn, *args):
    """Bytes of temporary memory of the compiled function."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
