"""LiNeS: layer by layer against the formula, in every encoding, stacked and numbered."""

import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import Dense, TaskVector, describe
from jft.merge import lines, task_arithmetic, ties, with_lines
from tests.delta.algebra import KINDS, close, make, reference

MUTATIONS = [
    ("jft/merge/depth.py", "beta = 1 - alpha if beta is None", "beta = alpha if beta is None"),
    ("jft/merge/depth.py", "return change.scaled(alpha)", "return change"),
    ("jft/merge/depth.py", "layer[1] / max(counts", "(layer[1] + 1) / max(counts"),
    ("jft/merge/depth.py", "jnp.arange(count) / max(count - 1, 1)", "jnp.arange(count) / count"),
    ("jft/merge/depth.py", "/ size / len(taus) if size", "/ size if size"),
    ("jft/merge/depth.py", "change.b * expanded(change.b))", "change.b)"),
    ("jft/merge/depth.py", "scales[change.indices].reshape", "scales[: len(change.indices)].reshape"),
    ("jft/merge/depth.py", "scales[change.rows // rows_per_layer]", "scales[change.rows % 4]"),
    ("jft/merge/depth.py", '[*tau.paths, *tau.manifest.get("base", {}).get("leaves", ())]', "tau.paths"),
    ("jft/merge/depth.py", "jnp.sum(jnp.abs(change.dense()))", "jnp.sum(change.dense() ** 2)"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers(kind):
    tau = TaskVector({"text/layers/mlp/w": make(kind, 3), "embed/w": make("low_rank", 4)})
    scaled = lines(tau, 0.2, 0.6)
    by_layer = np.array([0.2, 0.4, 0.6, 0.8]).reshape(4, 1, 1)
    close(scaled["text/layers/mlp/w"], by_layer * reference(tau["text/layers/mlp/w"]))
    close(scaled["embed/w"], 0.2 * reference(tau["embed/w"]))
    if kind in ("rows", "entries", "low_rank", "sum"):
        assert scaled["text/layers/mlp/w"].kind == kind


def test_numbered_layers_are_those_of_the_base():
    """The last layer did not change; the two towers have depths of their own."""
    base = {f"image/blocks/{i}/w": jnp.zeros(2) for i in range(5)} | {f"text/h_{i}/w": jnp.zeros(2) for i in range(2)}
    ones = Dense(jnp.ones(2))
    tau = TaskVector({"image/blocks/1/w": ones, "image/blocks/3/w": ones, "text/h_1/w": ones}, describe(base))
    scaled = lines(tau, 0.5)
    for path, expected in (("image/blocks/1/w", 0.625), ("image/blocks/3/w", 0.875), ("text/h_1/w", 1.0)):
        close(scaled[path], np.full(2, expected))
    # Without its base, what it knows of layers is what changed.
    close(lines(TaskVector(tau.deltas), 0.5)["image/blocks/3/w"], np.ones(2))


def test_one_model_keeps_its_last_layer_and_beta_of_zero_is_a_scale():
    tau = TaskVector(
        {"layers/w": make("dense", 1), "layers/b": Dense(jnp.ones((4, 3))), "one/layers/b": Dense(jnp.ones((1, 3)))}
    )
    close(lines(tau, 0.3)["layers/w"].value[3], reference(tau["layers/w"])[3])
    close(lines(tau, 0.3)["layers/b"], np.repeat([[0.3], [0.3 + 0.7 / 3], [0.3 + 1.4 / 3], [1.0]], 3, axis=1))
    close(lines(tau, 0.3)["one/layers/b"], np.full((1, 3), 0.3))
    close(lines(tau, 0.3, 0.0)["layers/w"], 0.3 * reference(tau["layers/w"]))
    assert lines(tau, 0.3).manifest["alpha"] == 0.3


def test_over_a_rule():
    """alpha is the L1 norm of the sum by that of the merged vector, by the number of vectors."""
    taus = [TaskVector({"layers/w": make("dense", i), "b": Dense(jnp.full(3, float(i)))}) for i in range(3)]
    flat = lambda tau: np.concatenate([reference(tau[path]).ravel() for path in ("layers/w", "b")])
    total = np.abs(sum(flat(t) for t in taus)).sum()
    merged = ties(taus, density=0.4)
    alpha = total / np.abs(flat(merged)).sum() / 3
    scaled = with_lines(ties, beta=0.5)(taus, density=0.4)
    close(scaled["b"], alpha * reference(merged["b"]))
    close(scaled["layers/w"].value[3], (alpha + 0.5) * reference(merged["layers/w"])[3])
    # Of the plain sum it is 1 / N, however it is scaled.
    close(with_lines(task_arithmetic, beta=0.5)(taus)["b"], np.full(3, 1.0))
    given = with_lines(task_arithmetic, beta=0.5, alpha=0.1)(taus, 0.5)
    close(given["b"], np.full(3, 0.15))
    nothing = with_lines(task_arithmetic, beta=0.5)([taus[0], -taus[0]])
    assert not nothing["layers/w"].dense().any()


def test_errors():
    with pytest.raises(ValueError, match="alpha must be a finite number, not nan"):
        lines(TaskVector({}), float("nan"))
    with pytest.raises(ValueError, match="beta must be a finite number, not inf"):
        lines(TaskVector({}), 0.5, float("inf"))
