"""Task arithmetic and averages against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jft import merge
from jft.delta import BaseMismatch, TaskVector, describe
from tests.delta.algebra import KINDS, close, make, reference

MUTATIONS = (
    ("jft/merge/arithmetic.py", "[scale * w for w in", "[w for w in"),
    ("jft/merge/arithmetic.py", "[scale * w for w in", "[scale + w for w in"),
    ("jft/merge/arithmetic.py", "[w / total for w in", "[w / len(taus) for w in"),
    ("jft/merge/rule.py", "return [value] * count", "return [value / count] * count"),
    ("jft/merge/rule.py", "return [default] * count", "return [default / count] * count"),
)

numbers = st.floats(-2, 2, width=32)


def vectors(kinds, seed):
    return [TaskVector({"w": make(kind, seed + i)}) for i, kind in enumerate(kinds)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    st.lists(numbers, min_size=3, max_size=3),
    numbers,
    st.integers(0, 99),
)
def test_weighted_sums(kinds, weights, scale, seed):
    taus = vectors(kinds, seed)
    deltas = [reference(t["w"]) for t in taus]
    close(merge.task_arithmetic(taus)["w"], sum(deltas))
    close(
        merge.task_arithmetic(taus, weights, scale)["w"],
        scale * sum(w * d for w, d in zip(weights, deltas, strict=True)),
    )
    close(merge.task_arithmetic(taus, 0.5)["w"], 0.5 * sum(deltas))
    close(merge.average(taus)["w"], sum(deltas) / 3)
    positive = [abs(w) + 0.1 for w in weights]
    close(merge.average(taus, positive)["w"], np.average(deltas, axis=0, weights=positive))


def test_analogy_and_negation():
    a, b, c = vectors(["dense", "low_rank", "rows"], 1)
    close(merge.task_arithmetic([c, b, a], [1, 1, -1])["w"], reference(c["w"]) + reference(b["w"]) - reference(a["w"]))
    close(merge.task_arithmetic([a], -1.0)["w"], reference((-a)["w"]))


def test_manifest_names_runs_and_coefficients():
    base = {"w": jnp.ones((4, 24, 20))}
    taus = [TaskVector({"w": make("rows", i)}, describe(base, data=f"task{i}")) for i in range(2)]
    manifest = merge.task_arithmetic({"a": taus[0], "b": taus[1]}, [1.0, 0.5], scale=0.5).manifest
    assert [(p["coefficient"], p["manifest"]["data"]) for p in manifest["parents"]] == [(0.5, "task0"), (0.25, "task1")]
    assert manifest["base"] == taus[0].manifest["base"]


def test_learned_weights_are_differentiable():
    taus = vectors(["low_rank", "rows"], 3)
    slope = jax.grad(lambda w: jnp.sum(merge.task_arithmetic(taus, w)["w"].dense()))(jnp.ones(2))
    close(slope, [reference(t["w"]).sum() for t in taus], 100)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: merge.task_arithmetic([]), "at least one"),
        (lambda t: merge.task_arithmetic(t), "a list of task vectors, not one"),
        (lambda t: merge.task_arithmetic([t, "x.safetensors"]), r"vectors\[1\] is a str"),
        (lambda t: merge.task_arithmetic([t, t], [1.0]), r"weights must be one number or one per vector \(2 of them\)"),
        (lambda t: merge.task_arithmetic([t, t], [1.0, float("inf")]), "one finite number"),
        (lambda t: merge.average([t, t], [1.0, -1.0]), "sum to zero"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build(TaskVector({"w": make("rows", 1)}))


def test_different_bases_are_refused():
    taus = [TaskVector({"w": make("rows", 1)}, describe({"w": jnp.full((4, 24, 20), float(i))})) for i in range(2)]
    with pytest.raises(BaseMismatch, match=r"fingerprints .* and "):
        merge.average(taus)
