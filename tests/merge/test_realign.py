"""IRR: what is removed, and the rest against the optimal brain surgeon step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import Dense, TaskVector
from jft.merge import irr
from tests.delta.algebra import close

MUTATIONS = [
    ("jft/merge/realign.py", "jnp.sign(change) != jnp.sign(direction)", "jnp.sign(change) == jnp.sign(direction)"),
    (
        "jft/merge/realign.py",
        "jnp.where(against, importance.ravel(), -jnp.inf)",
        "jnp.where(against, -importance.ravel(), -jnp.inf)",
    ),
    ("jft/merge/realign.py", "order.size - count + jnp.floor", "jnp.floor"),
    ("jft/merge/realign.py", "return w - r[i][:, None] * error", "return w + r[i][:, None] * error"),
    ("jft/merge/realign.py", "damping * jnp.mean(diagonal)", "damping"),
    ("jft/merge/realign.py", "change = jnp.where(dead[:, None], 0, change)", "change = change"),
    (
        "jft/merge/realign.py",
        "if path not in importance:\n            return change",
        "if path not in importance:\n            return change.scaled(0)",
    ),
]


def arrays(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def against(w, safety, importance, keep):
    """The entries that go: of those with another sign, the most important ones."""
    where = np.flatnonzero(np.sign(w).ravel() != np.sign(safety).ravel())
    order = where[np.argsort(importance.ravel()[where], kind="stable")]
    removed = np.zeros(w.size, bool)
    removed[order[int(keep * len(order)) :]] = True
    return removed.reshape(w.shape)


def surgeon(w, removed, gram, damping):
    """Each removed weight of each output compensated by the later inputs: the inverse of H without the inputs passed."""
    h, w = np.array(gram), np.array(w)
    dead = np.diagonal(h) == 0
    w[dead] = 0
    h[dead, dead] = 1
    h += damping * np.mean(np.diagonal(h)) * np.eye(len(h))
    for o in range(w.shape[1]):
        for q in range(len(h)):
            if removed[q, o]:
                inverse = np.linalg.inv(h[q:, q:])
                w[q:, o] -= w[q, o] / inverse[0, 0] * inverse[0]
                w[q, o] = 0
    return w


@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_matrix(keep):
    w, safety, importance = arrays(0, 6, 4), arrays(1, 6, 4), arrays(2, 6, 4) ** 2
    x = arrays(3, 20, 6)
    x[:, 2] = 0
    gram = x.T @ x
    tau, direction = (TaskVector({"w": Dense(jnp.asarray(v, jnp.float32))}) for v in (w, safety))
    merged = irr(tau, direction, {"w": importance}, {"w": gram}, keep=keep)
    removed = against(w, safety, importance, keep)
    close(merged["w"], surgeon(w, removed, gram, 0.01), 20)
    alone = irr(tau, direction, {"w": importance}, {}, keep=keep)
    close(alone["w"], np.where(removed, 0, w))


def test_recalibration_keeps_outputs_nearer_than_removal():
    w, safety, importance, x = arrays(4, 6, 4), arrays(5, 6, 4), np.ones((6, 4)), arrays(6, 30, 6) @ arrays(7, 6, 6)
    tau, direction = (TaskVector({"w": Dense(jnp.asarray(v, jnp.float32))}) for v in (w, safety))
    error = lambda grams: np.linalg.norm(
        x @ (np.asarray(irr(tau, direction, {"w": importance}, grams)["w"].dense()) - w)
    )
    assert error({"w": x.T @ x}) < 0.9 * error({})


def test_layers_and_vectors_are_tensors_of_their_own():
    w, safety, importance = arrays(8, 2, 5, 3), arrays(9, 2, 5, 3), arrays(10, 2, 5, 3) ** 2
    x = arrays(11, 2, 12, 5)
    grams = np.einsum("lni,lnj->lij", x, x)
    b, c = arrays(12, 2, 4), arrays(13, 2, 4)
    make = lambda m, v: TaskVector(
        {"layers/w": Dense(jnp.asarray(m, jnp.float32)), "layers/b": Dense(jnp.asarray(v, jnp.float32))}
    )
    tau = make(w, b)
    merged = irr(tau, make(safety, c), {"layers/w": importance, "layers/b": c**2}, {"layers/w": grams}, keep=0.3)
    for i in range(2):
        removed = against(w[i], safety[i], importance[i], 0.3)
        close(merged["layers/w"].value[i], surgeon(w[i], removed, grams[i], 0.01), 20)
        close(merged["layers/b"].value[i], np.where(against(b[i], c[i], c[i] ** 2, 0.3), 0, b[i]))
    # What has no importance stays as it is.
    assert irr(tau, make(safety, c), {"layers/w": importance}, {})["layers/b"] is tau["layers/b"]


def test_errors():
    tau = TaskVector({"w": Dense(jnp.ones((3, 2)))})
    with pytest.raises(ValueError, match=r"'w' has shape \(3, 2\) in the task vector, but \(3,\) in importance"):
        irr(tau, tau, {"w": np.ones(3)}, {})
    with pytest.raises(ValueError, match=r"must be \[..., I, I\]"):
        irr(tau, tau, {"w": np.ones((3, 2))}, {"w": np.ones((2, 2))})
    with pytest.raises(ValueError, match="keep must be"):
        irr(tau, tau, {"w": np.ones((3, 2))}, {}, keep=2.0)
