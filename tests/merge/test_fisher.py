"""Fisher merging against the formula in float64, and its statistics against loops over examples and classes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import tangent, tree
from jft.delta import Dense, TaskVector
from jft.merge import average
from jft.merge.fisher import fisher
from jft.train.calibration import RunCalibration
from jft.train.objectives import Classification
from tests.merge import peers
from tests.train import tools

MUTATIONS = [
    ("jft/merge/fisher.py", "jnp.maximum(information, floor)", "jnp.minimum(information, floor)"),
    ("jft/merge/fisher.py", "scale = 1 / jnp.where(norms == 0, 1.0, norms)", "scale = norms"),
    ("jft/merge/fisher.py", "jnp.sqrt(tensor.passes[0])", "tensor.passes[0]"),
    ("jft/tangent/fisher.py", "a + jnp.exp(log_p[y]) * x", "a + x"),
    ("jft/tangent/fisher.py", "jax.lax.stop_gradient(log_p) / 2", "jax.lax.stop_gradient(log_p)"),
]
SHAPES = {"a": (4, 3), "b": (), "layers/w": (2, 3, 1), "layers/experts/w": (2, 2, 3, 2)}
NORMALISED = {"paper": 0.0, "fusionbench": 1e-6}


def vectors(count=3, seed=0):
    """Task vectors, and Fisher information that is zero here and there, in all models at once as well."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    taus = [TaskVector({p: Dense(jnp.asarray(draw(s))) for p, s in SHAPES.items()}) for _ in range(count)]
    information = [
        {p: draw(s) ** 2 * 10.0**-i * (rng.random(s) < 0.7) for p, s in SHAPES.items()} for i in range(count)
    ]
    for each in information:
        each["a"][0] = 0
    return taus, [{p: np.asarray(f, np.float32) for p, f in each.items()} for each in information]


def flat(tree):
    return np.concatenate(
        [np.asarray(getattr(tree[p], "dense", lambda p=p: tree[p])(), np.float64).ravel() for p in SHAPES]
    )


def reference(taus, information, weights, floor_by, norm_floor=None):
    """The weighted mean in float64; with ``norm_floor`` each model's weight over the norm of all its information."""
    deltas, f = np.stack([flat(t) for t in taus]), np.stack([flat(i) for i in information])
    weights = np.asarray(weights, np.float64)
    if norm_floor is not None:
        weights = weights / (np.linalg.norm(f, axis=1) + norm_floor)
    if floor_by == "first":
        f[0] = np.maximum(f[0], 1e-6)
    else:
        f = f + 1e-6 if floor_by == "sum" else np.maximum(f, 1e-6)
    return (weights[:, None] * f * deltas).sum(0) / (weights[:, None] * f).sum(0)


@pytest.mark.parametrize(("floor_by", "normalise"), [("max", False), ("max", True), ("sum", True), ("first", False)])
def test_formula(floor_by, normalise):
    taus, information = vectors()
    merged = fisher(taus, [1.0, 0.5, 2.0], statistics=information, floor_by=floor_by, normalise=normalise)
    norm_floor = (1e-6 if floor_by == "sum" else 0.0) if normalise else None
    expected = reference(taus, information, [1.0, 0.5, 2.0], floor_by, norm_floor)
    np.testing.assert_allclose(flat(merged), expected, rtol=1e-5, atol=5e-7)


def test_laws():
    """One model is itself; equal information is the average; the order of models and the unit of information are nothing."""
    taus, information = vectors()
    one = fisher(taus[:1], statistics=information[:1])
    np.testing.assert_allclose(flat(one), flat(taus[0]), atol=1e-6)
    same = fisher(taus, [1.0, 2.0, 3.0], statistics=information[:1] * 3)
    np.testing.assert_allclose(flat(same), flat(average(taus, [1.0, 2.0, 3.0])), atol=1e-6)
    merged = fisher(taus, statistics=information)
    np.testing.assert_allclose(flat(fisher(taus[::-1], statistics=information[::-1])), flat(merged), atol=1e-6)
    larger = [{p: 8 * f for p, f in each.items()} for each in information]
    np.testing.assert_allclose(flat(fisher(taus, statistics=larger, floor=8e-6)), flat(merged), atol=1e-6)
    np.testing.assert_allclose(flat(fisher(taus, statistics=information, scale=-0.5)), -0.5 * flat(merged), atol=1e-6)


def test_presets_differ():
    taus, information = vectors()
    paper, other = (flat(fisher(taus, statistics=information, preset=p)) for p in ("paper", "fusionbench"))
    assert np.linalg.norm(paper - other) > 0.1 * np.linalg.norm(paper)


def test_paths_without_statistics_are_averaged():
    taus, information = vectors()
    some = [{p: f for p, f in each.items() if p != "a"} for each in information]
    merged, whole = fisher(taus, statistics=some), fisher(taus, statistics=information)
    np.testing.assert_allclose(merged["a"].dense(), average(taus)["a"].dense(), atol=1e-6)
    np.testing.assert_array_equal(merged["layers/w"].dense(), whole["layers/w"].dense())


def test_weights_that_cancel():
    taus, information = vectors()
    merged = fisher(taus[:2], [1.0, -1.0], statistics=information[:1] * 2)
    assert not flat(merged).any()


def test_wrong_uses():
    taus, information = vectors()
    with pytest.raises(ValueError, match="give one tree per model"):
        fisher(taus)
    with pytest.raises(ValueError, match="2 models"):
        fisher(taus, statistics=information[:2])
    with pytest.raises(ValueError, match="'a'"):
        fisher(taus, statistics=[{}, *information[1:]])
    with pytest.raises(ValueError, match="shape"):
        fisher(taus, statistics=[each | {"a": each["a"].T} for each in information])
    with pytest.raises(ValueError, match="begin with"):
        fisher(taus, statistics=[each | {"layers/w": each["a"]} for each in information])
    with pytest.raises(ValueError, match="floor"):
        fisher(taus, statistics=information, floor=-1.0)
    with pytest.raises(ValueError, match="floor_by"):
        fisher(taus, statistics=information, floor_by="mean")


def gradients(params, batch):
    """``[(p(y|x), {path: d log p(y|x) / dw}) for every y] for every example``, in float64."""
    logits = np.asarray(tools.apply(params, batch), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    one = lambda i, y: tools.reference_gradient(params, {"images": batch["images"][[i]], "labels": np.array([y])})[1]
    return [
        [(p[i, y], {k: -g for k, g in one(i, y).items()}) for y in range(tools.CLASSES)]
        for i in range(len(batch["images"]))
    ]


def test_diagonal_and_batch_sums():
    """Exact and empirical information, and MergeLM's squares of sums, against loops; these are other quantities."""
    params, batches = tools.parameters(), tools.batches(count=2, size=4)
    every = [gradients(params, b) for b in batches]
    paths = list(every[0][0][0][1])
    exact = {k: sum(p * g[k] ** 2 for rows in every for row in rows for p, g in row) / 8 for k in paths}
    labelled = [
        row[y][1] for b, rows in zip(batches, every, strict=True) for y, row in zip(b["labels"], rows, strict=True)
    ]
    of_data = {k: sum(g[k] ** 2 for g in labelled) / 8 for k in paths}
    sums = {k: sum(sum(p**0.5 * g[k] for row in rows for p, g in row) ** 2 for rows in every) / 8 for k in paths}
    expected = tangent.fisher_diagonal(tools.apply, params, batches, chunk=2)
    empirical = tangent.fisher_diagonal(tools.apply, params, batches, labels="data")
    theirs = tangent.squared_batch_sums(tools.apply, params, batches)
    for k in paths:
        np.testing.assert_allclose(expected[k], exact[k], rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(empirical[k], of_data[k], rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(theirs[k], sums[k], rtol=2e-4, atol=1e-7)
        assert np.abs(sums[k] - exact[k]).max() > 0.3 * exact[k].max()
    # What a calibration measures is the same empirical information.
    calibration = RunCalibration(tools.apply, params, paths, Classification(), batches)
    for k, x in calibration.squares(8).items():
        np.testing.assert_allclose(x, of_data[k], rtol=2e-4, atol=1e-7)


def test_sampled_labels_have_the_exact_mean():
    params, (batch,) = tools.parameters(), tools.batches(count=1, size=2)
    exact = tangent.fisher_diagonal(tools.apply, params, [batch])
    many = {k: np.tile(x, (256,) + (1,) * (x.ndim - 1)) for k, x in batch.items()}
    drawn = tangent.fisher_diagonal(tools.apply, params, [many], labels="sampled", chunk=512, key=jax.random.key(0))
    # 512 draws: the total is within a few percent.
    total = lambda f: sum(float(jnp.sum(x)) for x in f.values())
    assert abs(total(drawn) / total(exact) - 1) < 0.1
    with pytest.raises(ValueError, match="key"):
        tangent.fisher_diagonal(tools.apply, params, [batch], labels="sampled")
    with pytest.raises(ValueError, match="labels is 'true'"):
        tangent.fisher_diagonal(tools.apply, params, [batch], labels="true")
    with pytest.raises(ValueError, match="no batches"):
        tangent.squared_batch_sums(tools.apply, params, [])


@pytest.mark.peers
def test_fusionbench():
    """From the data to the merged model, by FusionBench's own loop over a torch model."""
    import torch

    theirs = peers.fusionbench("method.fisher_merging.fisher_merging")

    class Perceptron(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            for name, x in tree.flatten(params).items():
                self.register_parameter(name.replace("/", "_"), torch.nn.Parameter(torch.tensor(np.asarray(x))))

        def forward(self, images, labels):
            logits = torch.tanh(images @ self.one_w + self.one_b) @ self.two_w + self.two_b
            return types.SimpleNamespace(logits=logits)

    class Trainer:
        _train_batch_size = 4

        def __init__(self, batches):
            self.batches = batches

        def get_train_dataloader(self):
            return [{k: torch.tensor(x) for k, x in b.items()} for b in self.batches]

        def _prepare_inputs(self, inputs):
            return inputs

    base, weights = tools.parameters(0), [0.2, 0.5, 0.3]
    models = [tools.parameters(seed) for seed in (1, 2, 3)]
    data = [tools.batches(count=2, size=4, seed=seed) for seed in (4, 5, 6)]
    expected = theirs.fisher_merging(
        [Perceptron(m) for m in models], [Trainer(b) for b in data], [], [8] * 3, fisher_scaling_coefficients=weights
    )
    statistics = [tangent.squared_batch_sums(tools.apply, m, b) for m, b in zip(models, data, strict=True)]
    taus = [TaskVector.between(base, m) for m in models]
    merged = fisher(taus, weights, statistics=statistics, preset="fusionbench")
    for path, x in tree.flatten(base).items():
        # Two ways to the gradient differ by rounding, which the quotient of small numbers carries on.
        np.testing.assert_allclose(x + merged[path].dense(), expected[path.replace("/", "_")].detach(), atol=2e-5)
    # The formula alone, of equal statistics.
    given = [{k.replace("/", "_"): torch.tensor(np.asarray(x)) for k, x in s.items()} for s in statistics]
    values = {k.replace("/", "_"): [torch.tensor(np.asarray(t[k].dense())) for t in taus] for k in statistics[0]}
    formula = theirs.merging_with_fisher_weights(values, given, torch.tensor(weights))
    for path in statistics[0]:
        np.testing.assert_allclose(merged[path].dense(), formula[path.replace("/", "_")], atol=5e-7)
