"""Coefficients that are learned: AdaMerging, aTLAS and AdaRank against their gradients and updates in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import tree
from jft.delta import BaseMismatch, Dense, TaskVector, apply
from jft.merge import adamerging, adarank, atlas, cross_entropy, entropy, task_arithmetic, ties, ties_split
from jft.merge.adarank import straight_through
from jft.models import DecoderConfig, Model
from tests.merge import peers
from tests.train import tools

MUTATIONS = [
    ("jft/merge/learned.py", "-jnp.sum(jnp.exp(log_p) * log_p, axis=-1)", "jnp.sum(jnp.exp(log_p) * log_p, axis=-1)"),
    (
        "jft/merge/learned.py",
        "sum(loss(f(params, batch[task]), batch[task])",
        "max(loss(f(params, batch[task]), batch[task])",
    ),
    ("jft/merge/adamerging.py", '"clamp": (0.0, 1.0)', '"clamp": (0.0, 0.9)'),
    (
        "jft/merge/ties.py",
        'agreeing(tensor, trimmed, "sum", "majority"), t',
        '~agreeing(tensor, trimmed, "sum", "majority"), t',
    ),
    ("jft/merge/adamerging.py", 'learned.stack_of(path, shape) if by == "layer" else ()', "()"),
    ("jft/merge/atlas.py", "0, partitions, jnp.int32", "0, 1, jnp.int32"),
    ("jft/merge/atlas.py", "weight_decay=weight_decay)", "weight_decay=0.0)"),
    ("jft/merge/adarank.py", "(soft > 0.5)", "(soft < 0.5)"),
    ("jft/merge/adarank.py", "mean + total", "total"),
]
TASKS = ("one", "two")
DECODER = Model(DecoderConfig(vocab=16, width=8, layers=2, heads=2, hidden=12))


@functools.cache
def problem():
    """A base, two task vectors, and a batch per task and step."""
    base = tools.parameters(0)
    taus = [TaskVector.between(base, tools.parameters(seed)) for seed in (1, 2)]
    batches = [{t: tools.batches(count=1, size=6, seed=10 * i + j)[0] for j, t in enumerate(TASKS)} for i in range(2)]
    return base, taus, batches


OBJECTIVE = entropy(dict.fromkeys(TASKS, tools.apply))
PATHS = ("one/b", "one/w", "two/b", "two/w")


def entropy_and_gradient(flat, x):
    """Mean entropy of the perceptron's predictions and its gradient in the weights, in float64."""
    h = np.tanh(x @ flat["one/w"] + flat["one/b"])
    z = h @ flat["two/w"] + flat["two/b"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    each = -(p * np.log(p)).sum(1, keepdims=True)
    dz = -p * (np.log(p) + each) / len(x)
    dh = dz @ flat["two/w"].T * (1 - h**2)
    return each.mean(), {"one/w": x.T @ dh, "one/b": dh.sum(0), "two/w": h.T @ dz, "two/b": dz.sum(0)}


def float64(tree_of):
    return {p: np.asarray(getattr(x, "dense", lambda x=x: x)(), np.float64) for p, x in tree_of.items()}


def reference(by, init, bounds, rate, steps):
    """Coefficients ``{path: [N]}`` by Adam, written out."""
    base, taus, batches = problem()
    base, taus = float64(tree.flatten(base)), [float64(t) for t in taus]
    c = {p: np.full(2, init) for p in (PATHS if by == "layer" else ("all",))}
    m, v, losses = {p: 0.0 for p in c}, {p: 0.0 for p in c}, []
    for step in range(steps):
        used = {p: np.clip(x, *bounds) for p, x in c.items()}
        of = lambda p, used=used: used[p if by == "layer" else "all"]
        flat = {p: base[p] + sum(k * t[p] for k, t in zip(of(p), taus, strict=True)) for p in PATHS}
        values = [entropy_and_gradient(flat, b["images"].astype(np.float64)) for b in batches[step % 2].values()]
        losses.append(sum(value for value, _ in values))
        slope = {p: np.array([sum((g[p] * t[p]).sum() for _, g in values) for t in taus]) for p in PATHS}
        slope = slope if by == "layer" else {"all": sum(slope.values())}
        for p in c:
            g = slope[p] * ((c[p] >= bounds[0]) & (c[p] <= bounds[1]))
            m[p], v[p] = 0.9 * m[p] + 0.1 * g, 0.999 * v[p] + 0.001 * g**2
            c[p] = c[p] - rate * m[p] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[p] / (1 - 0.999 ** (step + 1))) + 1e-8)
    return {p: np.clip(x, *bounds) for p, x in c.items()}, losses


@pytest.mark.parametrize(
    ("by", "init", "options", "bounds"),
    [
        ("layer", 0.3, {}, (0, 1)),
        ("task", 0.3, {}, (0, 1)),
        # The coefficients cross both bounds, and none at all.
        ("layer", 0.95, {}, (0, 1)),
        ("layer", 0.95, {"clamp": ()}, (-np.inf, np.inf)),
    ],
)
def test_adamerging(by, init, options, bounds):
    base, taus, batches = problem()
    how = {"base": base, "objective": OBJECTIVE, "batches": batches, "data": "two batches", "by": by, "init": init}
    merged = adamerging(taus, **how, learning_rate=0.1, steps=4, **options)
    expected, losses = reference(by, init, bounds, 0.1, 4)
    learned = merged.manifest["coefficients"]
    for p in PATHS:
        c = expected[p if by == "layer" else "all"]
        np.testing.assert_allclose(learned[p] if by == "layer" else learned, c, atol=2e-5)
        delta = sum(k * np.asarray(t[p].dense(), np.float64) for k, t in zip(c, taus, strict=True))
        np.testing.assert_allclose(merged[p].dense(), delta, atol=5e-5)
    np.testing.assert_allclose(merged.manifest["objective"]["first"], losses[0], rtol=1e-5)
    np.testing.assert_allclose(merged.manifest["objective"]["last"], losses[-1], rtol=1e-4)
    assert merged.manifest["data"] == "two batches"


def test_presets_of_adamerging():
    """The paper's code clamps and takes 500 steps, FusionBench neither; where no bound is met they are the same."""
    base, taus, batches = problem()
    how = {"base": base, "objective": OBJECTIVE, "batches": batches, "data": "x", "learning_rate": 0.1, "init": 0.95}
    paper, other = (adamerging(taus, **how, steps=4, preset=p) for p in ("paper", "fusionbench"))
    assert (paper.manifest["clamp"], other.manifest["clamp"]) == ([0, 1], [])
    assert float((paper - other).norm()) > 0.05 * float(paper.norm())
    assert adamerging(taus, **how | {"learning_rate": 1e-4}).manifest["objective"]["steps"] == 500


def test_objectives_improve():
    """All of them end below task arithmetic with their own first coefficients, on the batches they were learned on."""
    base, taus, batches = problem()
    value = lambda tau, objective: sum(float(objective(apply(base, tau), b)) for b in batches)
    how = {"base": base, "batches": batches, "data": "x", "steps": 40}
    start = task_arithmetic(taus, 0.3)
    for merged in (
        adamerging(taus, objective=OBJECTIVE, learning_rate=0.02, **how),
        adamerging(taus, objective=OBJECTIVE, learning_rate=0.02, density=0.5, **how),
        adarank(taus, objective=OBJECTIVE, learning_rate=0.02, **how),
    ):
        assert value(merged, OBJECTIVE) < 0.95 * value(start, OBJECTIVE)
    few = cross_entropy(dict.fromkeys(TASKS, tools.apply))
    for partitions in (1, 5):
        merged = atlas(taus, objective=few, partitions=partitions, **how)
        assert value(merged, few) < 0.8 * value(0.0 * taus[0], few)


def test_stacked_layers_have_coefficients_of_their_own():
    """On a decoder, with every layer of a stack a tensor; vectors that lack a path, and a list that is read twice."""
    base = DECODER.init(jax.random.key(0))
    tuned = [jax.tree.map(lambda x, y: x + 0.5 * y, base, DECODER.init(jax.random.key(i))) for i in (1, 2)]
    taus = [TaskVector.between(base, t) for t in tuned]
    taus[0] = taus[0].exclude("^embed/")
    batches = [np.random.default_rng(i).integers(0, 16, (3, 5)).astype(np.int32) for i in range(2)]
    how = {"base": base, "objective": entropy(DECODER.apply), "batches": batches, "data": "tokens", "steps": 6}
    merged = adamerging(taus, learning_rate=0.1, **how)
    learned = merged.manifest["coefficients"]
    c = np.asarray(learned["layers/mlp/up/w"])
    assert c.shape == (2, 2)
    assert len(set(np.ravel(c))) > 1
    assert np.shape(learned["embed/table"]) == (2,)
    assert merged.manifest["objective"]["last"] < merged.manifest["objective"]["first"]
    up = [np.asarray(t["layers/mlp/up/w"].dense()) for t in taus]
    np.testing.assert_allclose(
        merged["layers/mlp/up/w"].dense(), sum(k[:, None, None] * t for k, t in zip(c, up, strict=True)), atol=1e-5
    )
    ranked = adarank(taus, learning_rate=0.1, density=0.5, **how)
    assert np.shape(ranked.manifest["components"]["layers/mlp/up/w"]) == (2, 2)


def test_scalars_vectors_and_experts():
    """Every tensor of a stack of layers or experts has its own coefficient; scalars and single columns have one."""
    shapes = {"layers/experts/w": (2, 3, 4, 2), "layers/scale": (2, 4), "column": (5, 1), "s": ()}
    draw = lambda seed: {p: np.random.default_rng(seed).normal(size=s).astype(np.float32) for p, s in shapes.items()}
    base = {p: jnp.zeros(s) for p, s in shapes.items()}
    taus = [TaskVector({p: Dense(jnp.asarray(x)) for p, x in draw(seed).items()}) for seed in (1, 2)]
    target = draw(3)
    objective = lambda params, batch: sum(jnp.sum((x - target[p]) ** 2) for p, x in params.items()) * batch
    how = {
        "base": base,
        "objective": objective,
        "batches": [jnp.ones(())],
        "data": "x",
        "learning_rate": 0.1,
        "steps": 30,
    }
    for rule, options in (
        (adamerging, {"clamp": ()}),
        (atlas, {"weight_decay": 0.0}),
        (atlas, {"partitions": 3}),
        (adarank, {}),
    ):
        merged = rule(taus, **how, **options)
        assert merged.manifest["objective"]["last"] < merged.manifest["objective"]["first"]
        assert all(np.isfinite(merged[p].dense()).all() for p in shapes)
        if "coefficients" in merged.manifest:
            found = merged.manifest["coefficients"]
            assert {p: np.shape(c) for p, c in found.items()} == {
                "layers/experts/w": (2, 2, 3), "layers/scale": (2, 2), "column": (2,), "s": (2,)
            }  # fmt: skip
    assert np.shape(merged.manifest["components"]["layers/experts/w"]) == (2, 2, 3)
    assert set(merged.manifest["components"]) == {"layers/experts/w", "column"}


def test_ties_split_adds_up_to_ties():
    _, taus, _ = problem()
    split = ties_split(taus, density=0.4)
    count = {p: sum(np.asarray(s[p].dense()) != 0 for s in split) for p in PATHS}
    merged = ties(taus, density=0.4)
    for p in PATHS:
        total = sum(np.asarray(s[p].dense()) for s in split)
        np.testing.assert_allclose(total / np.maximum(count[p], 1), merged[p].dense(), atol=1e-6)
        assert all(
            np.isin(np.asarray(s[p].dense()), [0, *np.ravel(t[p].dense())]).all()
            for s, t in zip(split, taus, strict=True)
        )


def test_atlas_steps():
    """From zero one step of Adam is the sign of the gradient times the rate; the second decays by rate times decay."""
    base, taus, batches = problem()
    batches, flat = batches[:1], float64(tree.flatten(base))
    objective = entropy(tools.apply)
    batches = [batches[0]["one"]]
    _, g = entropy_and_gradient(flat, batches[0]["images"].astype(np.float64))
    how = {"base": base, "objective": objective, "batches": batches, "data": "x", "learning_rate": 0.01}
    one = atlas(taus, steps=1, **how)
    for p in PATHS:
        slope = np.array([(g[p] * np.asarray(t[p].dense(), np.float64)).sum() for t in taus])
        np.testing.assert_allclose(one.manifest["coefficients"][p], -0.01 * np.sign(slope), atol=1e-5)
    plain, decayed = (atlas(taus, steps=2, weight_decay=w, **how).manifest["coefficients"] for w in (0.0, 10.0))
    for p in PATHS:
        expected = np.asarray(plain[p]) - 0.01 * 10.0 * np.asarray(one.manifest["coefficients"][p])
        np.testing.assert_allclose(decayed[p], expected, atol=1e-6)


def test_partitions():
    """Every entry takes one of K coefficients, by its draw; matrices_only leaves vectors out."""
    base, taus, batches = problem()
    how = {"base": base, "objective": OBJECTIVE, "batches": batches, "data": "x", "steps": 3}
    merged = atlas(taus[:1], partitions=4, **how)
    ratio = np.asarray(merged["one/w"].dense()) / np.asarray(taus[0]["one/w"].dense())
    values = np.unique(ratio.round(3))
    assert 2 <= len(values) <= 4
    again, other = (atlas(taus[:1], partitions=4, seed=s, **how)["one/w"].dense() for s in (0, 1))
    np.testing.assert_array_equal(again, merged["one/w"].dense())
    assert (np.asarray(other) != again).any()
    assert set(atlas(taus, partitions=4, matrices_only=True, **how).paths) == {"one/w", "two/w"}


def test_straight_through():
    logits = jnp.asarray([-2.0, -0.01, 0.0, 0.01, 3.0])
    np.testing.assert_array_equal(straight_through(logits), [0, 0, 0, 1, 1])
    s = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    np.testing.assert_allclose(jax.grad(lambda x: straight_through(x).sum())(logits), s * (1 - s), rtol=1e-5)


def test_adarank_takes_components_out():
    """Of diagonal vectors the components are entries: those that raise the objective go, the others stay."""
    base = {"w": jnp.zeros((4, 4))}
    tau = TaskVector({"w": Dense(jnp.diag(jnp.asarray([4.0, 3.0, 2.0, 1.0])))})
    sign = jnp.asarray([1.0, -1.0, 1.0, -1.0])
    objective = lambda params, batch: jnp.sum(jnp.diagonal(params["w"]) * sign) * batch
    how = {
        "base": base,
        "objective": objective,
        "batches": [jnp.ones(())],
        "data": "x",
        "learning_rate": 0.03,
        "steps": 5,
    }
    merged = adarank([tau], init=1.0, temperature=1.0, **how)
    assert merged.manifest["components"] == {"w": [2]}
    w = np.asarray(merged["w"].dense())
    # The coefficient is pulled at as well, by the same objective.
    np.testing.assert_allclose(np.diagonal(w) / np.array([4, 3, 2, 1]) > 0.5, [False, True, False, True])
    kept = adarank([tau], init=1.0, density=0.5, **how | {"learning_rate": 0.0})["w"].dense()
    np.testing.assert_allclose(kept, np.diag([4.0, 3.0, 0, 0]), atol=1e-5)
    # Around the average of the models nothing of one model is left.
    alone = adarank([tau], centred=True, **how | {"learning_rate": 0.0})["w"].dense()
    np.testing.assert_allclose(alone, tau["w"].dense(), atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "options", "match"),
    [
        (adamerging, {"data": " "}, "name the data"),
        (adamerging, {"by": "model"}, "by of adamerging is 'model'"),
        (adamerging, {"clamp": (1.0, 0.0)}, "clamp"),
        (adamerging, {"preset": "mergekit"}, "mergekit"),
        (adamerging, {"steps": 0}, "steps"),
        (adamerging, {"batches": iter([])}, "0 batches"),
        (adamerging, {"objective": lambda params, batch: jnp.float32(jnp.nan)}, "nan at step 0"),
        (adamerging, {"objective": entropy({"one": tools.apply})}, "'two' is in one alone"),
        (atlas, {"partitions": 0}, "partitions"),
        (adarank, {"density": 2.0}, "density"),
        (adarank, {"temperature": 0.0}, "temperature"),
    ],
)
def test_wrong_options(rule, options, match):
    base, taus, batches = problem()
    how = {"base": base, "objective": OBJECTIVE, "batches": batches, "data": "x", "steps": 2}
    with pytest.raises(ValueError, match=match):
        rule(taus, **{**how, **options})


def test_another_base_is_refused():
    _, taus, batches = problem()
    with pytest.raises(BaseMismatch):
        adamerging(taus, base=tools.parameters(7), objective=OBJECTIVE, batches=batches, data="x", steps=1)


@pytest.mark.peers
def test_fusionbench():
    """Four steps of FusionBench's layer-wise module, entropy and Adam."""
    import torch

    theirs = peers.fusionbench("models.wrappers.layer_wise_fusion")
    loss = peers.fusionbench("method.adamerging.entropy_loss").entropy_loss

    class Perceptron(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            for name, x in tree.flatten(params).items():
                self.register_parameter(name.replace("/", "_"), torch.nn.Parameter(torch.tensor(np.asarray(x))))

        def forward(self, images):
            return torch.tanh(images @ self.one_w + self.one_b) @ self.two_w + self.two_b

    base, taus, batches = problem()
    for preset in ("fusionbench", "paper"):
        weights = theirs.get_layer_wise_weights(2, 4, 0.95)
        tuned = [Perceptron(tools.parameters(seed)) for seed in (1, 2)]
        module = theirs.LayerWiseMergedModel(weights, Perceptron(base), tuned, clamp_weights=preset == "paper")
        optimizer = torch.optim.Adam([module.merge_weight], lr=0.1)
        for step in range(4):
            module.merge_weights()
            for batch in batches[step % 2].values():
                loss(module(torch.tensor(batch["images"]))).backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
        how = {"base": base, "objective": OBJECTIVE, "batches": batches, "data": "x", "learning_rate": 0.1}
        merged = adamerging(taus, init=0.95, steps=4, preset=preset, **how)
        learned = module.merge_weight.detach().numpy()
        learned = learned if preset == "fusionbench" else learned.clip(0, 1)
        for i, path in enumerate(tree.flatten(base)):
            np.testing.assert_allclose(merged.manifest["coefficients"][path], learned[:, i], atol=1e-5)
