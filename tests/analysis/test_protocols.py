"""Heads, addition and negation against short references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.analysis import arithmetic, heads, settings
from jft.analysis.tasks import text_bytes
from jft.data.tokenizer import byte_tokenizer
from jft.delta import TaskVector

MUTATIONS = (
    ("jft/merge/search.py", "float(control) >= threshold", "float(control) > threshold"),
    ("jft/merge/search.py", "threshold * float(before)", "threshold"),
    ("jft/analysis/arithmetic.py", "sum(values.values()) / len(values)", "sum(values.values())"),
    ("jft/analysis/arithmetic.py", 'value / single["test"][task]', 'value / single["validation"][task]'),
    ("jft/analysis/arithmetic.py", 'by_coefficient[c], single["validation"]', 'by_coefficient[c], single["test"]'),
    (
        "jft/analysis/arithmetic.py",
        'score(task, "test", taus, [result.best])',
        'score(task, "validation", taus, [result.best])',
    ),
    ("jft/analysis/arithmetic.py", "[[-c] for c in coefficients]", "[[c] for c in coefficients]"),
    ("jft/analysis/arithmetic.py", "by_coefficient[0.0][1], threshold", "by_coefficient[0.0][0], threshold"),
    ("jft/analysis/arithmetic.py", 'row["base_target"] - row["target"]', 'row["target"] - row["base_target"]'),
    ("jft/analysis/arithmetic.py", "taus[i].cosine(taus[j])", "taus[i].dot(taus[j])"),
)


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    return rng.normal(size=(300, 5)) + 3 * np.eye(3, 5)[labels], labels


def test_probe_is_the_minimum_of_its_loss(blobs):
    x, labels = blobs
    head = heads.linear_probe(x, labels, 3, penalty=2.0)
    deviation = x.std(axis=0) + 1e-6
    z = (x - x.mean(axis=0)) / deviation

    def loss(w, b):
        picked = jax.nn.log_softmax(z @ w + b)[jnp.arange(300), labels]
        return -jnp.sum(picked) + jnp.sum(w**2)  # penalty / 2 = 1

    w = head["w"] * deviation[:, None]
    slope = jax.grad(loss, argnums=(0, 1))(w, head["b"] + x.mean(axis=0) @ head["w"])
    assert all(float(jnp.max(jnp.abs(g))) < 0.2 for g in slope), "the gradient of a sum over 300 examples"
    assert np.mean(np.argmax(x @ head["w"] + head["b"], axis=1) == labels) > 0.9


def test_binary_probe_has_two_columns(blobs):
    x, labels = blobs
    head = heads.linear_probe(x, labels > 0, 2)
    assert head["w"].shape == (5, 2)
    assert np.mean(np.argmax(x @ head["w"] + head["b"], axis=1) == (labels > 0)) > 0.9


def test_probe_needs_every_class(blobs):
    with pytest.raises(ValueError, match="needs examples of each"):
        heads.linear_probe(*blobs, 4)


def test_columns_that_fill_up_change_no_loss(blobs):
    x, labels = blobs
    head = heads.linear_probe(x, labels, 3)
    wide = heads.widened(head, 7)
    narrow_logits, wide_logits = x @ head["w"] + head["b"], x @ wide["w"] + wide["b"]
    a, b = (jax.nn.log_softmax(jnp.asarray(z))[:, :3] for z in (narrow_logits, wide_logits))
    np.testing.assert_allclose(a, b, rtol=1e-6)


BASE = {"w": jnp.zeros(2)}
VECTORS = {
    "a": TaskVector.between(BASE, {"w": jnp.array([1.0, 0.0])}),
    "b": TaskVector.between(BASE, {"w": jnp.array([0.0, 1.0])}),
}


def weights(taus, coefficients):
    """The weights at each point: one coefficient for all, or one for each."""
    rows = [np.broadcast_to(c, len(taus)) for c in coefficients]
    return [sum(c * np.asarray(t["w"].dense()) for c, t in zip(row, taus, strict=True)) for row in rows]


def test_addition_chooses_on_validation():
    def score(task, split, taus, coefficients):
        """Highest where the task's own coordinate is 0.5; half of that on the test data."""
        highest = {"validation": 1.0, "test": 0.5}[split]
        return np.array([highest * (1 - abs(w["ab".index(task)] - 0.5)) for w in weights(taus, coefficients)])

    single = {"validation": {"a": 0.5, "b": 0.5}, "test": {"a": 0.5, "b": 1.0}}
    row = arithmetic.addition(VECTORS, single, score, [0.0, 0.25, 0.5, 1.0])
    assert row["coefficient"] == 0.5
    assert row["absolute"] == 0.5
    assert row["normalised"] == pytest.approx((1.0 + 0.5) / 2)
    assert [point["mean"] for point in row["curve"]] == pytest.approx([1.0, 1.5, 2.0, 1.0])


def test_negation_keeps_the_control():
    def score(task, split, taus, coefficients):
        moved = np.array([-w[0] for w in weights(taus, coefficients)])
        return 0.8 - 0.6 * moved if task == "a" else 0.9 - 0.1 * moved

    row = arithmetic.negation(VECTORS["a"], "a", ["b"], score, [0.0, 0.2, 0.4, 0.6], 0.95)
    assert row["coefficient"] == 0.4
    assert row["target"] == pytest.approx(0.56)
    assert row["control"] == pytest.approx(0.86)
    assert row["drop"] == pytest.approx(0.24)


def test_a_control_of_exactly_the_threshold_is_kept():
    controls = {0.0: 1.0, 0.5: 0.95, 1.0: np.nextafter(0.95, 0)}

    def score(task, split, taus, coefficients):
        moved = [float(-w[0]) for w in weights(taus, coefficients)]
        return np.array([1 - m if task == "a" else controls[m] for m in moved])

    row = arithmetic.negation(VECTORS["a"], "a", ["b"], score, list(controls), 0.95)
    assert (row["coefficient"], row["control"]) == (0.5, 0.95)


def test_negation_changes_nothing_where_the_control_never_holds():
    def score(task, split, taus, coefficients):
        moved = np.array([-w[0] for w in weights(taus, coefficients)])
        return 0.9 - moved

    row = arithmetic.negation(VECTORS["a"], "a", ["b"], score, [0.5, 1.0], 0.95)
    assert (row["coefficient"], row["drop"]) == (0, 0)


def test_cosines():
    np.testing.assert_allclose(arithmetic.cosines(VECTORS), np.eye(2), atol=1e-7)
    a, b = VECTORS.values()
    expected = [[1, 0.6, -0.8], [0.6, 1, 0], [-0.8, 0, 1]]
    np.testing.assert_allclose(arithmetic.cosines({"x": 3 * a + 4 * b, "a": 2 * a, "b": -0.5 * b}), expected, atol=1e-6)


def test_overlay_replaces_what_is_renamed():
    below = {"method": {"name": "lora", "rank": 4}, "optimizer": {"lr": 1.0, "clip": 0.5}}
    above = {"method": {"name": "full"}, "optimizer": {"lr": 2.0}}
    assert settings.overlay(below, above) == {"method": {"name": "full"}, "optimizer": {"lr": 2.0, "clip": 0.5}}


def test_bytes_of_targets():
    tokenizer = byte_tokenizer()
    tokens = np.array([[ord("a"), ord("b"), tokenizer.eos_id, 0]], np.int32)
    assert text_bytes({"tokens": tokens}, np.array([[1, 1, 0, 0]]), tokenizer) == 1
