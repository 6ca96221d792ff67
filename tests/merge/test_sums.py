"""Task arithmetic and averages against float64."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jft import merge
from jft.delta import BaseMismatch, TaskVector, apply, describe
from jft.merge import in_memory
from tests.delta.algebra import KINDS, close, make, reference
from tests.merge import peers

MUTATIONS = (
    ("jft/merge/in_memory.py", "[scale * c for c in", "[c for c in"),
    (
        "jft/merge/sums.py",
        "_sum(_normalized if normalize else _weights)",
        "_sum(_weights if normalize else _normalized)",
    ),
    ("jft/merge/sums.py", "1 if abs(total) < 1e-8 else total", "total"),
    (
        "jft/merge/sums.py",
        """is no average")
    return [w / total for""",
        """is no average")
    return [w / len(values["weight"]) for""",
    ),
    ("jft/merge/sums.py", 'sum(values["weight"]) - 1]', 'sum(values["weight"])]'),
    ("jft/merge/sums.py", "return _sum(_mean) if normalize else", "return _sum(_mean) if not normalize else"),
    ("jft/merge/sums.py", '{"factor": alpha}', '{"factor": 1 - alpha}'),
    ("jft/merge/sums.py", 'in_range("alpha", alpha, 0, 1)', 'in_range("alpha", alpha, 0, 2)'),
    ("jft/merge/sums.py", '{"factor": 1 + alpha}', '{"factor": 1 - alpha}'),
    ("jft/merge/sums.py", 'f * w / len(values["weight"])', "f * w"),
    ("jft/merge/sums.py", "[momentum * c for c in", "[(1 - momentum) * c for c in"),
    ("jft/merge/sums.py", "[(1 - momentum) * weight]", "[momentum * weight]"),
    ("jft/merge/sums.py", "factor - 1]", "factor]"),
    ("jft/merge/sums.py", "return [factor * weight,", "return [weight,"),
    ("jft/merge/rule.py", "return [value] * count", "return [value / count] * count"),
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
    sums = np.array([reference(t["w"]).sum() for t in taus])
    close(slope, sums, 100)
    # Of the mean at equal weights: half of each, less half of the mean.
    for rule in (merge.average, functools.partial(merge.task_arithmetic, normalize=True)):
        slope = jax.grad(lambda w, rule=rule: jnp.sum(rule(taus, w)["w"].dense()))(jnp.ones(2))
        close(slope, sums / 2 - sums.sum() / 4, 100)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: merge.task_arithmetic([]), "at least one"),
        (lambda t: merge.task_arithmetic(t), "a list of task vectors, not one"),
        (lambda t: merge.task_arithmetic([t, "x.safetensors"]), r"vectors\[1\] is a str"),
        (
            lambda t: merge.task_arithmetic([t, t], [1.0]),
            r"weights? must be one number or one per vector \(2 of them\)",
        ),
        (lambda t: merge.task_arithmetic([t, t], [1.0, float("inf")]), "one finite number"),
        (lambda t: merge.average([t, t], [1.0, -1.0]), "sum to zero"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build(TaskVector({"w": make("rows", 1)}))


def test_normalised_task_arithmetic_divides_by_the_sum_of_weights():
    taus = vectors(["dense", "rows"], 5)
    a, b = (reference(t["w"]) for t in taus)
    close(merge.task_arithmetic(taus, [1.0, 3.0], normalize=True)["w"], (a + 3 * b) / 4)
    # A sum of nearly nothing divides nothing.
    close(merge.task_arithmetic(taus, [1.0, -1.0], normalize=True)["w"], a - b)


def test_linear_is_a_sum_of_whole_models():
    """Normalised it needs no base; otherwise the base counts the sum of the weights less 1, also where nothing changed."""
    base = {
        "w": jnp.asarray(reference(make("dense", 9)), jnp.float32),
        "unchanged": jnp.arange(3.0),
        "steps": jnp.arange(2),
    }
    taus = vectors(["rows", "low_rank"], 7)
    weights = [0.5, 0.8]
    whole = [np.asarray(base["w"], np.float64) + reference(t["w"]) for t in taus]
    mean = merge.linear(taus, weights)
    close(mean["w"], np.average(whole, axis=0, weights=weights) - np.asarray(base["w"], np.float64))
    total = apply(base, merge.linear(taus, weights, base=base, normalize=False), check=False)
    close(total["w"], 0.5 * whole[0] + 0.8 * whole[1])
    close(total["unchanged"], 1.3 * np.arange(3))
    assert np.array_equal(total["steps"], np.arange(2))
    with pytest.raises(ValueError, match="base=params"):
        merge.linear(taus, weights, normalize=False)


def test_interpolation_and_extrapolation():
    low, rows = vectors(["low_rank", "rows"], 3)
    a, b = reference(low["w"]), reference(rows["w"])
    close(merge.wise_ft([low], alpha=0.3)["w"], 0.3 * a)
    # The mean of whole models is the same, whatever the base: (1 - alpha) theta_0 + alpha theta_1.
    close(merge.linear([TaskVector({}), low], [0.7, 0.3])["w"], 0.3 * a)
    close(merge.expo([low], alpha=0.4)["w"], 1.4 * a)
    close(merge.expo([low, rows], alpha=0.4)["w"], 1.4 * (a + b) / 2)
    assert merge.wise_ft([low])["w"].kind == merge.expo([low])["w"].kind == "low_rank"


@pytest.mark.parametrize("momentum", [0.0, 0.75, [0.9, 0.5, 0.2], 1.0])
def test_momentum_interpolation(momentum):
    taus = vectors(["dense", "rows", "low_rank"], 11)
    slow = np.zeros((4, 24, 20))
    for m, tau in zip(np.broadcast_to(momentum, 3), taus, strict=True):
        slow = m * slow + (1 - m) * reference(tau["w"])
    close(merge.momentum_interpolation(taus, momentum=momentum)["w"], slow)


def test_passthrough():
    base = {"w": jnp.asarray(reference(make("dense", 2)), jnp.float32), "unchanged": jnp.ones(3)}
    tau = vectors(["rows"], 4)[0]
    close(merge.passthrough([tau])["w"], reference(tau["w"]))
    params = apply(base, merge.passthrough([tau], base=base, factor=0.7), check=False)
    close(params["w"], 0.7 * (np.asarray(base["w"], np.float64) + reference(tau["w"])))
    close(params["unchanged"], 0.7 * np.ones(3))


def test_a_rule_merges_one_tensor_as_it_merges_encodings():
    base = {"w": jnp.asarray(reference(make("dense", 2)), jnp.float32)}
    taus = vectors(["dense", "rows"], 6)
    for rule in (
        merge.task_arithmetic.build(weights=[0.5, -2.0], normalize=True),
        merge.linear.build(weights=[0.5, -2.0], normalize=False),
        merge.momentum_interpolation.build(momentum=0.25),
    ):
        dense = in_memory.merge(dataclasses.replace(rule, coefficients=None), taus, base=base)
        close(dense["w"], reference(in_memory.merge(rule, taus, base=base)["w"]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: merge.wise_ft([t], alpha=1.5), "alpha must be between 0 and 1, not 1.5"),
        (lambda t: merge.wise_ft([t, t]), "wise_ft merges 1 models, not 2"),
        (lambda t: merge.expo([t], alpha=-0.1), "alpha must be"),
        (lambda t: merge.momentum_interpolation([t], momentum=-0.1), "momentum must be"),
        (lambda t: merge.linear([t, t], [1.0, -1.0]), "sum to zero"),
    ],
)
def test_wrong_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(TaskVector({"w": make("rows", 1)}))


@pytest.mark.peers
def test_mergekit(tmp_path):
    base, tuned = peers.models(tmp_path, "llama")
    params, taus = peers.vectors(base, tuned)
    weights = [0.6, -0.4, 0.5]
    each = [{"weight": w} for w in weights]
    runs = [
        ("task_arithmetic", merge.task_arithmetic, base, tuned, {}, each),
        ("task_arithmetic", merge.task_arithmetic, base, tuned, {"normalize": True}, each),
        ("linear", merge.linear, None, tuned, {}, each),
        ("linear", merge.linear, None, tuned, {"normalize": False}, each),
    ]
    for i, (name, rule, origin, models, options, one) in enumerate(runs):
        expected = peers.mergekit(name, origin, models, tmp_path / f"out{i}", options, one)
        merged = rule(taus, weights, base=params, preset="mergekit", **options)
        assert peers.largest_difference(params, merged, expected) <= 5e-7, (name, options)
    expected = peers.mergekit("passthrough", None, tuned[:1], tmp_path / "through", each=[{"scale": 0.7}])
    merged = merge.passthrough(taus[:1], base=params, factor=0.7)
    assert peers.largest_difference(params, merged, expected) <= 5e-7


@pytest.mark.peers
def test_fusionbench_expo():
    import torch

    expo = peers.fusionbench("method.linear.expo")
    first, second = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    state = lambda m: {k: v.detach().numpy().copy() for k, v in m.state_dict().items()}
    base, tuned = state(first), state(second)
    merged = merge.expo([TaskVector.between(base, tuned)], alpha=0.3, preset="fusionbench")
    expected = state(expo.expo_merge(first, second, 0.3))
    assert peers.largest_difference(base, merged, expected) <= 5e-7


def test_vectors_weights_and_scale_may_stand_by_position():
    for rule in (merge.task_arithmetic, merge.ties):
        parameters = inspect.signature(rule).parameters.values()
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["vectors", "weights", "scale"]


def test_different_bases_are_refused():
    taus = [TaskVector({"w": make("rows", 1)}, describe({"w": jnp.full((4, 24, 20), float(i))})) for i in range(2)]
    with pytest.raises(BaseMismatch, match=r"fingerprints .* and "):
        merge.average(taus)
