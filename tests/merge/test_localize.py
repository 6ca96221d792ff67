"""Localize-and-Stitch and grafting against their updates in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import tree
from jft.delta import Dense, TaskVector, apply
from jft.merge import average, cross_entropy, graft, localize, localize_and_stitch, stitch
from tests.train import tools

MUTATIONS = [
    ("jft/merge/localize.py", 'slope if regulariser == "paper" else -', 'slope if regulariser == "paper" else '),
    ("jft/merge/localize.py", "s - learning_rate * total[p] / count", "s - learning_rate * total[p]"),
    ("jft/merge/localize.py", "- strength * _push", "+ strength * _push"),
    ("jft/merge/localize.py", "bias, -bias)", "-bias, bias)"),
    ("jft/merge/localize.py", "if now > best[0]", "if now < best[0]"),
    ("jft/merge/localize.py", "deltas != 0", "deltas == deltas"),
    ("jft/merge/localize.py", "strength=0.0", "strength=1.0"),
]
SHAPES = {"a": (4, 3), "b": (), "layers/w": (2, 3, 1)}
OBJECTIVE = cross_entropy(tools.apply)
PATHS = ("one/b", "one/w", "two/b", "two/w")


def vectors(count=3, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: np.where(rng.random(shape) < 0.4, 0, rng.normal(size=shape)).astype(np.float32)
    return [TaskVector({p: Dense(jnp.asarray(draw(s))) for p, s in SHAPES.items()}) for _ in range(count)]


def flat(tau, shapes=SHAPES):
    return np.concatenate([np.asarray(tau[p].dense(), np.float64).ravel() for p in shapes])


def stitched(deltas, weights):
    count = np.maximum((deltas != 0).sum(0), 1)
    return (np.asarray(weights)[:, None] * deltas).sum(0) / count


def test_stitch():
    """Overlaps are averaged, the rest stays; a density keeps the largest of each whole vector."""
    taus = vectors()
    deltas = np.stack([flat(t) for t in taus])
    np.testing.assert_allclose(flat(stitch(taus)), stitched(deltas, [1, 1, 1]), atol=5e-7)
    np.testing.assert_allclose(
        flat(stitch(taus, [1, -0.5, 2], scale=2.0)), 2 * stitched(deltas, [1, -0.5, 2]), atol=5e-7
    )
    size = deltas.shape[1]
    for density in (0.3, 0.0):
        kept = np.zeros_like(deltas)
        for row, out in zip(deltas, kept, strict=True):
            largest = np.argsort(-np.abs(row))[: int(density * size)]
            out[largest] = row[largest]
        np.testing.assert_allclose(flat(stitch(taus, density=density)), stitched(kept, [1, 1, 1]), atol=5e-7)


def test_laws_of_stitch():
    taus = vectors()
    np.testing.assert_allclose(flat(stitch(taus[:1])), flat(taus[0]), atol=1e-7)
    np.testing.assert_allclose(flat(stitch(taus[::-1])), flat(stitch(taus)), atol=1e-6)
    once = stitch(taus[:1], density=0.5)
    np.testing.assert_allclose(flat(stitch([once], density=0.5)), flat(once), atol=1e-7)
    whole = [TaskVector({p: Dense(jnp.ones(s) * i) for p, s in SHAPES.items()}) for i in (1, 2)]
    np.testing.assert_allclose(flat(stitch(whole)), flat(average(whole)), atol=1e-6)


def problem():
    base = tools.parameters(0)
    return base, TaskVector.between(base, tools.parameters(1)), tools.batches(count=2, size=6)


def reference(density, bias, rate, strength, regulariser, steps):
    """The logits after each step, written out; the gradient in the weights is that of `tools`."""
    base, tau, batches = problem()
    start = {p: np.asarray(x, np.float64) for p, x in tree.flatten(base).items()}
    delta = {p: np.asarray(tau[p].dense(), np.float64) for p in PATHS}
    every = np.sort(np.abs(np.concatenate([d.ravel() for d in delta.values()])))[::-1]
    limit = every[int(density * len(every)) - 1]
    s = {p: np.where(np.abs(d) >= limit, bias, -bias) for p, d in delta.items()}
    sigmoid, losses = lambda x: 1 / (1 + np.exp(-x)), []
    for _ in range(steps):
        params = tree.unflatten({p: start[p] + sigmoid(s[p]) * delta[p] for p in PATHS})
        values = [tools.reference_gradient(params, b) for b in batches]
        losses.append(np.mean([v for v, _ in values]))
        for p in PATHS:
            slope = sigmoid(s[p]) * (1 - sigmoid(s[p]))
            push = slope if regulariser == "paper" else -np.where(s[p] > 0, slope, -slope)
            s[p] = s[p] - rate * np.mean([g[p] for _, g in values], 0) * delta[p] * slope - strength * push
    return {p: np.where(s[p] > 0, delta[p], 0) for p in PATHS}, losses


@pytest.mark.parametrize("regulariser", ["paper", "released"])
def test_localize(regulariser):
    base, tau, batches = problem()
    options = {"density": 0.3, "bias": 1.0, "strength": 0.4, "regulariser": regulariser, "steps": 6}
    found = localize(tau, base=base, objective=OBJECTIVE, batches=batches, data="x", learning_rate=30.0, **options)
    expected, losses = reference(0.3, 1.0, 30.0, 0.4, regulariser, 6)
    for p in PATHS:
        np.testing.assert_allclose(found[p].dense(), expected[p], atol=1e-6)
    np.testing.assert_allclose(found.manifest["losses"], losses, rtol=1e-4)
    assert found.manifest["losses"][-1] < found.manifest["losses"][0]
    assert found.manifest["entries"] == sum((e != 0).sum() for e in expected.values())


def test_regularisers_differ():
    """The L1 norm takes entries out; the released code's term keeps the choice of the start."""
    base, tau, batches = problem()
    how = {"base": base, "objective": OBJECTIVE, "batches": batches, "data": "x", "density": 0.3, "bias": 1.0}
    start = localize(tau, steps=0, **how).manifest["entries"]
    assert start == int(0.3 * sum(d.nnz for _, d in tau.items()))
    paper, released = (
        localize(tau, steps=6, learning_rate=0.0, regulariser=r, **how).manifest["entries"]
        for r in ("paper", "released")
    )
    assert (paper, released) == (0, start)


def test_graft_keeps_the_best_mask():
    """No regulariser; the best of all rounded masks by the score, which is never worse than the start's."""
    base, tau, batches = problem()
    loss = lambda params: float(np.mean([OBJECTIVE(params, b) for b in batches]))
    how = {"base": base, "objective": OBJECTIVE, "batches": batches, "data": "x", "density": 0.1, "bias": 1.0}
    seen = []

    def score(params):
        seen.append(-loss(params))
        return seen[-1]

    found = graft(tau, learning_rate=100.0, steps=8, score=score, **how)
    assert len(seen) == 9
    assert -loss(apply(base, found)) == pytest.approx(max(seen), abs=1e-6)
    assert max(seen) > seen[0] + 0.01
    last = graft(tau, learning_rate=100.0, steps=8, **how)
    same = localize(tau, learning_rate=100.0, steps=8, strength=0.0, **how)
    for p in PATHS:
        np.testing.assert_array_equal(last[p].dense(), same[p].dense())


def test_localize_and_stitch():
    """Two tasks of one model: a fifth of each vector does most of its task, and both together do both."""
    base, step = tools.parameters(0), jax.jit(jax.grad(OBJECTIVE))
    data = [tools.batches(count=1, size=64, seed=seed) for seed in (1, 2)]
    # The second task has other inputs.
    data[1][0]["images"] = data[1][0]["images"] + np.linspace(-1, 1, tools.WIDTH, dtype=np.float32)
    taus = []
    for (batch,) in data:
        params = base
        for _ in range(60):
            params = jax.tree.map(lambda w, g: w - 0.5 * g, params, step(params, batch))
        taus.append(TaskVector.between(base, params))
    how = {"base": base, "data": "two tasks", "density": 0.2, "bias": 2.0, "learning_rate": 300.0, "steps": 4}
    both = localize_and_stitch(taus, objectives=[OBJECTIVE] * 2, batches=data, **how)
    alone = [localize(tau, objective=OBJECTIVE, batches=b, **how) for tau, b in zip(taus, data, strict=True)]
    np.testing.assert_array_equal(flat(both, PATHS), flat(stitch(alone), PATHS))
    loss = lambda tau, batch: float(OBJECTIVE(apply(base, tau), batch))
    for (batch,), tau, one in zip(data, taus, alone, strict=True):
        nothing = loss(0.0 * tau, batch)
        assert one.manifest["losses"][-1] < one.manifest["losses"][0]
        assert nothing - loss(one, batch) > 0.7 * (nothing - loss(tau, batch))
        assert loss(both, batch) < nothing
    with pytest.raises(ValueError, match="1 objectives"):
        localize_and_stitch(taus, objectives=[OBJECTIVE], batches=data, **how)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data": ""}, "name the data"),
        ({"density": 1.5}, "density"),
        ({"bias": 0.0}, "bias"),
        ({"regulariser": "l2"}, "regulariser is 'l2'"),
        ({"batches": []}, "no batches"),
        ({"objective": lambda params, batch: jnp.sum(params["one"]["w"]) * jnp.nan}, "nan at step 0"),
    ],
)
def test_wrong_options(options, match):
    base, tau, batches = problem()
    how = {"base": base, "objective": OBJECTIVE, "batches": batches, "data": "x"}
    with pytest.raises(ValueError, match=match):
        localize(tau, **{**how, **options})
