"""Greedy and learned soups: which models go in, with which weights, and what the manifest says."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft.delta import BaseMismatch, Dense, TaskVector, describe
from jft.merge import greedy_soup, learned_soup

MUTATIONS = [
    ("jft/merge/soups.py", "if new > best or", "if new >= best or"),
    ("jft/merge/soups.py", "new == best and not strict", "new == best and strict"),
    ("jft/merge/soups.py", "key=lambda name: -scores[name]", "key=lambda name: scores[name]"),
    ("jft/merge/soups.py", "soup, best = [*soup, name], new", "soup, best = [*soup, name], best"),
    ("jft/merge/soups.py", "if np.isfinite(scores[name])", "if True"),
    ("jft/merge/soups.py", "list(jax.nn.softmax(logits))", "list(logits)"),
    ("jft/merge/soups.py", "optax.adamw(0.1) if", "optax.adamw(1e-4) if"),
    ("jft/merge/soups.py", "jnp.zeros(len(taus), jnp.float32)", "jnp.ones(len(taus), jnp.float32).at[0].set(5)"),
    ("jft/merge/soups.py", "    if check:\n", "    if not check:\n"),
]
BASE = {"w": jnp.zeros(2)}


def vector(*values, base=BASE):
    return TaskVector({"w": Dense(jnp.asarray(values, jnp.float32))}, describe(base))


def near(*target):
    """Minus the squared distance of w from a point."""
    return lambda params: -float(np.sum((np.asarray(params["w"]) - target) ** 2))


def greedy(base, points, score, strict):
    """The algorithm of the paper on arrays: positions that go in."""
    order = sorted(range(len(points)), key=lambda i: -score({"w": base + points[i]}))
    soup = order[:1]
    for i in order[1:]:
        before, after = (score({"w": base + np.mean([points[j] for j in s], axis=0)}) for s in (soup, [*soup, i]))
        if after > before or (after == before and not strict):
            soup = [*soup, i]
    return soup


@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup(seed):
    points = np.random.default_rng(seed).normal(size=(6, 2)).astype(np.float32)
    score = near(0.2, -0.1)
    soup = greedy_soup(BASE, [vector(*p) for p in points], score)
    expected = greedy(np.zeros(2), points, score, strict=True)
    assert soup.manifest["ingredients"] == expected
    np.testing.assert_allclose(soup["w"].dense(), points[expected].mean(axis=0), atol=1e-6)
    assert soup.manifest["score"] == pytest.approx(score({"w": points[expected].mean(axis=0)}), abs=1e-5)
    assert [p["coefficient"] for p in soup.manifest["parents"]] == pytest.approx([1 / len(expected)] * len(expected))


def test_equal_means_are_added_only_where_that_is_allowed():
    """The released code adds where accuracy rises, the algorithm in the paper where it does not fall."""
    vectors = {"first": vector(1, 0), "second": vector(1, 1), "far": vector(5, 0)}
    score = lambda params: -abs(float(params["w"][0]) - 1)
    assert greedy_soup(BASE, vectors, score).manifest["ingredients"] == ["first"]
    soup = greedy_soup(BASE, vectors, score, strict=False)
    assert soup.manifest["ingredients"] == ["first", "second"]
    np.testing.assert_allclose(soup["w"].dense(), [1, 0.5])


def test_the_bar_rises_with_the_soup():
    # Means 4, 2, 4/3 of scores 6, 8, 7: the third is better than the first alone, and does not go in.
    scores = {4.0: 6.0, 0.0: 5.0, 2.0: 8.0}
    value = lambda params: scores.get(float(params["w"][0]), 7.0)
    vectors = [vector(4, 0), vector(0, 0), vector(0, 1)]
    assert greedy_soup(BASE, vectors, value).manifest["ingredients"] == [0, 1]


def test_a_score_of_nan_is_never_taken():
    score = lambda params: float("nan") if float(params["w"][1]) else float(params["w"][0])
    soup = greedy_soup(BASE, [vector(5, 1), vector(1, 0), vector(2, 0)], score)
    assert soup.manifest["ingredients"] == [2]
    with pytest.raises(ValueError, match="no model has a finite score"):
        greedy_soup(BASE, [vector(5, 1)], score)


def test_learned_soup_arrives_at_the_least_loss_in_the_simplex():
    vectors = {"x": vector(1, 0), "y": vector(0, 1), "z": vector(-2, -2)}
    target = np.array([0.3, 0.1])
    # By hand: weights (a, b, c) of the point (a - 2c, b - 2c), a + b + c = 1: c = 0.12, a = 0.54, b = 0.34.
    loss = lambda params: jnp.sum((params["w"] - target) ** 2)
    soup = learned_soup(BASE, vectors, loss, steps=200, optimizer=optax.adam(0.1))
    np.testing.assert_allclose(soup.manifest["weights"], [0.54, 0.34, 0.12], atol=2e-3)
    np.testing.assert_allclose(soup["w"].dense(), target, atol=3e-3)
    assert soup.manifest["ingredients"] == ["x", "y", "z"]
    assert sum(soup.manifest["weights"]) == pytest.approx(1)


def test_learned_soup_takes_the_papers_steps_over_batches():
    """AdamW of 0.1 from the uniform soup: its first step moves every logit by the rate, against the gradient's sign."""
    vectors = [vector(1, 0), vector(0, 1)]
    loss = lambda params, batch: jnp.sum(params["w"] * batch)
    soup = learned_soup(BASE, vectors, loss, batches=[jnp.array([1.0, -1.0])])
    expected = np.exp([-0.1, 0.1]) / np.exp([-0.1, 0.1]).sum()
    np.testing.assert_allclose(soup.manifest["weights"], expected, atol=1e-6)
    assert learned_soup(BASE, vectors, loss, batches=[]).manifest["weights"] == pytest.approx([0.5, 0.5])


def test_errors():
    other = {"w": jnp.ones(2)}
    for soup in (greedy_soup, learned_soup):
        with pytest.raises(BaseMismatch, match="differ in w"):
            soup(other, [vector(1, 0)], lambda params: jnp.sum(params["w"]))
        with pytest.raises(ValueError, match="at least one"):
            soup(BASE, [], len)
    with pytest.raises(ValueError, match="not finite"):
        learned_soup(BASE, [vector(1, 0), vector(0, 1)], lambda params: jnp.sum(params["w"]) * jnp.nan, steps=1)
    assert greedy_soup(other, [vector(1, 0)], near(0, 0), check=False).manifest["ingredients"] == [0]
