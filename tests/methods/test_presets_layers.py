"""Presets that train whole layers and matrices, against NumPy: what they choose, and one and three steps of what they do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import delta, tree
from jft.merge.half_reset import half_reset
from jft.models import ClipConfig, Model, VisionConfig
from jft.models.clip import TextConfig
from jft.presets.cofitune import RangeSearch
from jft.presets.layers_by_score import Correlation
from jft.presets.subtuning import Greedy
from jft.select import backward
from jft.select.halves import halves
from jft.select.layers import Between, Last, Spaced
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder

DATA = decoder.batches()
LAYERS = decoder.CONFIG.layers


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


@pytest.fixture(scope="module")
def calibration(params):
    paths = [p for p in tree.flatten(params) if p.startswith("layers/")]
    return RunCalibration(decoder.MODEL, params, paths, LanguageModel(), DATA)


def by_layer(values):
    """``[L]`` sums of what is given by path, of the weights in layers."""
    inside = [v.reshape(LAYERS, -1).sum(1) for p, v in values.items() if p.startswith("layers/")]
    return np.sum(inside, axis=0)


# What is a matter of depth alone.


@pytest.mark.parametrize(
    ("chosen", "length", "expected"),
    [
        (Spaced(0.25), 32, tuple(range(0, 32, 4))),
        (Spaced(0.25, ends=True), 32, (0, 4, 9, 13, 18, 22, 27, 31)),
        (Spaced(0.01), 4, (0,)),
        (Last(3), 2, (0, 1)),
        (Last(share=(1, 4)), 6, (4, 5)),
        (Between(0.25, 0.5), 8, (2, 3)),
        (Between(0.25, 0.5), 1, (0,)),
    ],
)
def test_layers_by_depth(chosen, length, expected):
    assert chosen.of(length) == expected


PLAIN = {
    "uniform_layers": ({"fraction": 0.5}, (0, 2), lambda p: True),
    "locft_bf": ({"layers": (1,)}, (1,), lambda p: "mlp/down" in p),
    "cofitune": ({"depth": (0.25, 0.75), "soft_mask": False}, (1, 2), lambda p: "mlp/up" in p or "mlp/down" in p),
}


@pytest.mark.parametrize("name", PLAIN)
def test_layers_by_name(name, params):
    options, layers, include = PLAIN[name]
    masks = decoder.in_layers(params, layers, include)
    decoder.check(jft.method(name, **options), lambda n, w: masks, params, DATA)


# Stages: what trains grows or is drawn anew, and moments of what stays carry over.


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"every": 1, "first": 1, "by": 2}, {"stages": 3}])
def test_gradual_unfreezing(options, params):
    sizes = [1, 3, 4] if "every" in options else [2, 3, 4]
    masks_at = lambda n, w: decoder.in_layers(params, range(LAYERS - sizes[n], LAYERS))
    method = jft.method("gradual_unfreezing", **options)
    base = decoder.wide(params)
    result = decoder.run(method, 3, params, DATA)
    expected = decoder.followed(params, masks_at, 3, DATA)
    decoder.compare(result, expected, params, decoder.in_layers(params, range(LAYERS)))
    assert any(np.abs(expected[p] - base[p]).max() > 1e-3 for p in base)


def test_half_finetuning(params):
    masks_at = lambda n, w: _halves(params, draw=n)
    decoder.check(jft.method("half_finetuning", every=1), masks_at, params, DATA, steps=(3,))


def _halves(params, draw, seed=0):
    found = halves({p: w.shape for p, w in tree.flatten(params).items()}, seed, draw)
    return {p: decoder.in_layers(params, found[p], lambda q, p=p: q == p)[p] for p in found}


@pytest.mark.optimized
def test_a_run_taken_up_at_a_stage_goes_on_as_it_would_have(params, tmp_path):
    method = jft.method("half_finetuning", every=2)
    whole = decoder.run(method, 6, params, DATA)
    for place in (2, 4, 5, 6):
        part = decoder.run(method, place, params, DATA, workdir=tmp_path / "a", checkpoint=1)
    same = jax.tree.map(np.array_equal, part.params, whole.params)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("gated", [True, False])
def test_half_of_each_kind_in_every_layer(gated):
    L = 6
    names = ["attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down", *(["mlp/gate"] if gated else [])]
    shapes = {f"layers/{n}/w": (L, 4, 4) for n in names} | {f"layers/{n}/b": (L, 4) for n in names}
    shapes |= {f"layers/{n}/scale": (L, 4) for n in ("attn_norm", "mlp_norm")} | {"head/w": (4, 4)}
    found = halves(shapes, seed=3)
    count = lambda part, i: sum(i in found[p] for p in found if part in p and not p.endswith("/b"))
    assert [count("attn/", i) for i in range(L)] == [2] * L
    assert [count("norm/", i) for i in range(L)] == [1] * L
    assert sorted(count("mlp/", i) for i in range(L)) == ([1, 1, 1, 2, 2, 2] if gated else [1] * L)
    assert all(found[f"layers/{n}/b"] == found[f"layers/{n}/w"] for n in names) and "head/w" not in found
    assert halves(shapes, seed=3) == found != halves(shapes, seed=3, draw=1)


def entry_by_entry(change):
    """A change as all of its entries."""
    rows, columns = np.divmod(np.arange(np.prod(change.shape), dtype=np.int32), change.shape[-1])
    values = np.asarray(change.value).ravel()
    return delta.Entries(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(values), change.shape)


def test_half_reset_keeps_one_half_and_sets_the_other_back(params):
    tuned = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + np.float32(1)), params)
    tau = delta.TaskVector.between(params, tuned)
    flat, kept = tree.flatten(params), _halves(params, draw=5, seed=0)
    shapes = {p: x.shape for p, x in tau.items()}
    assert shapes.keys() == flat.keys()
    once = half_reset(tau, draw=5)
    changes = decoder.dense(once.deltas)
    drawn = halves(shapes, 5)
    for path, w in flat.items():
        change = np.asarray(changes.get(path, np.zeros(w.shape)))
        layers = drawn.get(path, range(len(w)))
        expected = np.isin(np.arange(len(w)), list(layers)).reshape(-1, *(1,) * (w.ndim - 1)) * np.ones(w.shape)
        np.testing.assert_allclose(change, expected, atol=1e-5)
    sparse = delta.TaskVector({p: entry_by_entry(x) for p, x in tau.items()}, tau.manifest)
    again = half_reset(sparse, draw=5)
    assert all(isinstance(x, delta.Entries) for x in again.deltas.values())
    back = decoder.dense(again.deltas)
    assert all(np.array_equal(back[p], changes[p]) for p in once)
    assert kept.keys() == drawn.keys()


# What is decided from the base and the data.


@pytest.mark.slow
def test_surgical_fisher(params):
    base = decoder.wide(params)
    rows = [{"tokens": b["tokens"][i : i + 1]} for b in DATA for i in range(4)][:7]
    scores = np.mean([by_layer({p: g**2 for p, g in decoder.gradient(base, r).items()}) for r in rows], axis=0)
    masks = decoder.in_layers(params, np.argsort(-scores)[:2])
    decoder.check(jft.method("surgical_fisher", k=2, examples=7), lambda n, w: masks, params, DATA)


def test_layers_by_score(params):
    """Residual values by hand: an independent pass through the model, layer by layer, in float64."""
    base = decoder.wide(params)
    streams = [np.concatenate(x) for x in zip(*(_entering(base, b["tokens"]) for b in DATA[:3]), strict=True)]
    rows = [{"tokens": b["tokens"][i : i + 1]} for b in DATA[:3] for i in range(4)]
    likelihood = np.array([-decoder.loss_and_gradient(base, r)[0] for r in rows])
    scores = []
    for h in streams:
        pooled = h.mean(1) - h.mean(1).mean(0)
        y = likelihood - likelihood.mean()
        r = pooled.T @ y / np.sqrt((pooled**2).sum(0) * (y**2).sum())
        scores.append(np.sqrt(np.mean(r**2)))
    masks = decoder.in_layers(params, np.argsort(-np.asarray(scores))[:1])
    decoder.check(jft.method("layers_by_score", k=1, batches=3), lambda n, w: masks, params, DATA)
    named = [{**b, "prior": np.float32(likelihood[4 * i : 4 * i + 4])} for i, b in enumerate(DATA[:3])]
    found = RunCalibration(decoder.MODEL, params, ["layers/attn/q/w"], LanguageModel(), named)
    np.testing.assert_allclose(decoders_scores("prior", found), scores, rtol=1e-4)
    with pytest.raises(ValueError, match="no 'other' to correlate"):
        decoders_scores("other", found)


def decoders_scores(target, calibration):
    return Correlation(target, batches=3)(calibration)["layers"]


def _entering(w, tokens):
    """The residual stream entering each layer."""
    c = decoder.CONFIG
    B, T = tokens.shape
    h = w["embed/table"][tokens]
    norm = lambda x, s: x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * s
    frequency = c.rope.theta ** (-np.arange(0, c.head_size, 2) / c.head_size)
    angle = np.arange(T)[:, None] * frequency

    def rotate(x):
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    out = []
    for i in range(c.layers):
        out.append(h)
        p = lambda name, i=i: w[f"layers/{name}"][i]
        x = norm(h, p("attn_norm/scale"))
        q, k, v = ((x @ p(f"attn/{n}/w")).reshape(B, T, -1, c.head_size) for n in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(y, c.heads // c.kv_heads, axis=2) for y in (k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(c.head_size)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        h = h + np.einsum("bhts,bshk->bthk", weights, v).reshape(B, T, -1) @ p("attn/o/w")
        x = norm(h, p("mlp_norm/scale"))
        gate = x @ p("mlp/gate/w")
        h = h + (gate / (1 + np.exp(-gate)) * (x @ p("mlp/up/w"))) @ p("mlp/down/w")
    return out


@pytest.mark.slow
def test_subtuning_searches_greedily(params):
    """Every candidate set trained and evaluated by the reference; the search and the run that follows."""
    held_out, steps = decoder.batches(1, seed=9), 2

    def worth(layers):
        masks = decoder.in_layers(params, layers)
        return -decoder.loss_and_gradient(decoder.followed(params, lambda n, w: masks, steps, DATA), held_out[0])[0]

    chosen, best = [], -np.inf
    while len(chosen) < 2:
        found = {i: worth([*chosen, i]) for i in range(LAYERS) if i not in chosen}
        layer = max(found, key=found.get)
        if found[layer] <= best:
            break
        best, chosen = found[layer], [*chosen, layer]
    masks = decoder.in_layers(params, chosen)
    method = jft.method("subtuning", steps=steps, most=2)
    decoder.check(method, lambda n, w: masks, params, DATA, steps=(3,), eval_data=held_out)
    with pytest.raises(ValueError, match="give eval_data"):
        decoder.run(method, 1, params, DATA)


class Evaluations:
    """Stands for a calibration: what is evaluated is looked up by the set of layers that was trained."""

    def __init__(self, calibration, worth):
        self._probe, self._worth, self.asked = calibration, worth, []

    def __getattr__(self, name):
        return getattr(self._probe, name)

    def tuned(self, steps, table=None):
        return table

    def evaluate(self, table):
        self.asked.append({p: tuple(x) for p, x in table.items()})
        return {"loss": self._worth(table)}


def test_greedy_stops_where_the_gain_is_small_and_keeps_to_its_shortlist(calibration):
    gains = {0: 0.5, 1: 0.1, 2: 0.4, 3: 0.3}
    found = Evaluations(calibration, lambda table: 1 - sum(gains[i] for i in table["layers/attn/q/w"]))
    assert Greedy(1, tolerance=0.35)(found)["layers/attn/q/w"] == (0, 2)
    assert Greedy(1, tolerance=0.2)(found)["layers/attn/q/w"] == (0, 2, 3)
    found.asked.clear()
    assert Greedy(1, shortlist=2)(found)["layers/attn/q/w"] == (0, 2)
    assert len(found.asked) == 4 + 1


def test_range_search_goes_down_the_tree(calibration):
    def worth(table):
        layers, cost = table[next(iter(table))], 0.1 * sum("attn" in p for p in table)
        return cost + abs(np.mean(layers) - 2) + 0.01 * len(layers)

    search = RangeSearch(1, modules=((r"attn/",), (r"mlp/up/",)))
    found = Evaluations(calibration, worth)
    table = search(found)
    assert table == {"layers/mlp/up/w": (2,)}
    tried = [x[next(iter(x))] for x in found.asked]
    assert tried == [(0, 1), (2, 3), (2,), (3,), (2,), (2,)]


# GreenTrainer.


@pytest.mark.slow
def test_green_trainer(params):
    base = decoder.wide(params)
    flat = tree.flatten(params)
    g = decoder.gradient(base, DATA[0])
    after = decoder.followed(params, lambda n, w: dict.fromkeys(base, True), 1, DATA)
    chain = _chain(length=6)
    assert {p for p, *_ in chain} == set(flat)
    pick = lambda x, p, i: x[p][i] if p.startswith("layers/") else x[p]
    worth = [-np.sum(pick(g, p, i) * (pick(after, p, i) - pick(base, p, i))) for p, i, *_ in chain]
    forward, backwards = _costs(chain)
    chosen = _best(worth, chain, 0.5 * (forward + backwards) - forward)
    masks = {}
    for j in chosen:
        path, layer = chain[j][:2]
        if path.startswith("layers/"):
            one = decoder.in_layers(params, [layer], lambda q, p=path: q == p)[path]
            masks[path] = masks.get(path, False) | one
        else:
            masks[path] = True
    result = decoder.check(jft.method("green_trainer", fraction=0.5), lambda n, w: masks, params, DATA)
    assert 0 < len(chosen) < len(chain) and result.task_vector.paths == [p for p in flat if p in masks]


def _chain(length):
    """(path, layer, FLOPs of its gradient, FLOPs beyond it), from the loss down, written out."""
    c, T = decoder.CONFIG, length
    D, F, Q, K, V = c.width, c.hidden, c.heads * c.head_size, c.kv_heads * c.head_size, c.vocab
    product = lambda i, o: 2 * T * i * o
    out = [("head/w", 0, product(D, V), product(D, V)), ("final_norm/scale", 0, T * D, 0)]
    for i in reversed(range(c.layers)):
        out += [(f"layers/{n}", i, w, a) for n, w, a in [
            ("mlp/down/w", product(F, D), product(F, D)),
            ("mlp/gate/w", product(D, F), 0), ("mlp/up/w", product(D, F), 2 * product(D, F)),
            ("mlp_norm/scale", T * D, 0),
            ("attn/o/w", product(Q, D), product(Q, D) + 8 * T * T * Q),
            ("attn/k/w", product(D, K), 0), ("attn/q/w", product(D, Q), 0),
            ("attn/v/w", product(D, K), 2 * product(D, K) + product(D, Q)),
            ("attn_norm/scale", T * D, 0),
        ]]  # fmt: skip
    return [*out, ("embed/table", 0, T * D, 0)]


def _costs(chain):
    products = sum(w for p, _, w, _ in chain if p.endswith("/w"))
    attention = sum(a - w for p, _, w, a in chain if p.endswith("attn/o/w"))
    return products + attention // 2, sum(w for *_, w, _ in chain) + sum(a for *_, a in chain[:-1])


def _best(worth, chain, budget):
    """The best choice by looking at all of them: for each deepest tensor a knapsack of what lies above it."""
    best, choice = 0.0, []
    for deepest in range(len(chain)):
        room = budget - sum(a for *_, a in chain[:deepest]) - chain[deepest][2]
        if room < 0 or worth[deepest] <= 0:
            continue
        value, above = _knapsack([(worth[j], chain[j][2], j) for j in range(deepest) if worth[j] > 0], room)
        if value + worth[deepest] > best:
            best, choice = value + worth[deepest], [*above, deepest]
    return sorted(choice)


def _knapsack(items, room):
    states = {0: (0.0, [])}
    for gain, cost, j in items:
        for spent, (value, chosen) in sorted(states.items(), reverse=True):
            now = spent + cost
            if now <= room and value + gain > states.get(now, (-1.0, None))[0]:
                states[now] = (value + gain, [*chosen, j])
    return max(states.values(), key=lambda s: s[0])


def test_green_trainer_decides_again(params, tmp_path):
    """Four steps at once, and in two parts with a new decision between them, give the same weights."""
    method = jft.method("green_trainer", fraction=0.5, every=2)
    whole = decoder.run(method, 4, params, DATA)
    for steps in (2, 4):
        parts = decoder.run(method, steps, params, DATA, workdir=tmp_path, checkpoint=1)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, parts.params, whole.params)))
    with pytest.raises(ValueError, match="the forward pass alone is"):
        decoder.run(jft.method("green_trainer", fraction=0.2), 1, params, DATA)


def test_costs_are_known_for_one_stack_alone():
    params = decoder.parameters(_clip())
    with pytest.raises(ValueError, match="one stack of layers"):
        backward.chain(RunCalibration(Model(_clip()), params, list(tree.flatten(params)), LanguageModel(), DATA))


# Skip tuning.


def _clip():
    vision = VisionConfig(image=8, patch=4, width=8, layers=3, heads=2, hidden=16)
    return ClipConfig(vision, TextConfig(vocab=11, width=8, layers=2, heads=2, hidden=16, positions=6), projection=4)


def test_skip_tuning_trains_what_stands_behind_the_cached_layers():
    model, params = Model(_clip()), decoder.parameters(_clip())
    plan = jft.method("skip_tuning", vision=1, text=2).plan(params, model)

    @jax.jit
    def changes(params):
        kept, trained = plan.init(jax.random.key(0), params)
        return decoder.dense(plan.encode(params, kept, jax.tree.map(lambda x: x + 1, trained)))

    changed = changes(params)
    for path, w in tree.flatten(params).items():
        change = np.asarray(changed.get(path, np.zeros(w.shape)))
        behind = path.startswith(("vision/final_norm", "text/final_norm", "vision_projection", "text_projection"))
        layers = {"vision/layers/": (2,), "text/layers/": (0, 1)}
        own = next((v for k, v in layers.items() if path.startswith(k)), ())
        on = np.full(w.shape, behind) if not own else np.zeros(w.shape, bool)
        for i in own:
            on[i] = True
        np.testing.assert_allclose(change, np.where(on, 1.0, 0.0), atol=1e-5, err_msg=path)
    with pytest.raises(ValueError, match="vision, which has 3"):
        jft.method("skip_tuning", vision=4).plan(params, model)


# CoFiTune's soft mask.


@pytest.mark.slow
def test_soft_mask_scales_gradients_by_unit(params):
    """Importance by hand from differences of the divergence in each gate would take the model's noise: taken as given."""
    from jft.presets.cofitune import importance

    calibration = RunCalibration(decoder.MODEL, params, ["layers/mlp/up/w"], LanguageModel(), DATA)
    found = {k: np.asarray(v, np.float64) for k, v in importance(calibration, 2, 0.1).items()}
    assert found["layers/mlp/channels"].shape == (4, 12) and found["layers/attn/heads"].shape == (4, 4)
    assert all((x >= 0).all() and (x < 1).all() and x.std() > 0.05 for x in found.values())
    scale = {
        "layers/mlp/up/w": 1 - found["layers/mlp/channels"][:, None],
        "layers/mlp/gate/w": 1 - found["layers/mlp/channels"][:, None],
        "layers/mlp/down/w": 1 - found["layers/mlp/outputs"][:, None],
        "layers/attn/q/w": 1 - np.repeat(found["layers/attn/heads"], 2, 1)[:, None],
        "layers/attn/v/w": 1 - np.repeat(found["layers/attn/heads"].reshape(4, 2, 2).max(2), 2, 1)[:, None],
        "layers/attn/o/w": 1 - np.repeat(found["layers/attn/heads"], 2, 1)[:, :, None],
    }
    masks = decoder.in_layers(params, (1, 2), lambda p: p in scale)
    method = jft.method("cofitune", depth=(0.25, 0.75), modules=[f"^{p}$" for p in scale], batches=2)
    change = lambda g: {p: x * scale.get(p, 1.0) for p, x in g.items()}
    decoder.check(method, lambda n, w: masks, params, DATA, change=change)


def test_every_preset_says_what_it_does():
    for name in (*PLAIN, "gradual_unfreezing", "half_finetuning", "surgical_fisher", "subtuning", "green_trainer"):
        entry = jft.methods.entries()[name]
        assert entry.summary and "arXiv" in entry.paper


def test_wrong_choices_are_refused():
    for options, message in (
        ({"name": "uniform_layers", "fraction": 0.0}, "fraction 0.0"),
        ({"name": "cofitune", "depth": (0.5, 0.5)}, "0 <= low < high"),
        ({"name": "gradual_unfreezing", "every": 0, "stages": 0}, "give one of them"),
        ({"name": "surgical_fisher", "k": 0}, "count 0 is not a positive"),
        ({"name": "green_trainer", "every": -1}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            jft.method(**options)


@pytest.mark.slow
def test_importance_is_a_gradient_of_the_divergence(params):
    """Gates move it as their gradient says: central differences, with the same noise."""
    from jft.presets.cofitune import _Gradients

    compute = _Gradients(decoder.MODEL, 0.1, 4, 4)
    ones = lambda n: jnp.ones((4, n), jnp.float32)
    gates = {"layers/attn/o": {"heads": ones(4)}, "layers/mlp/down": {"channels": ones(12), "outputs": ones(8)}}
    key, batch = jax.random.key(3), DATA[0]
    value = jax.jit(lambda g: compute._divergence(params, batch, key, g))
    found = jax.jit(jax.grad(lambda g: compute._divergence(params, batch, key, g)))(gates)
    assert float(value(gates)) > 1e-4
    for (name, unit), i in itertools.product([("layers/attn/o", "heads"), ("layers/mlp/down", "outputs")], (0, 3)):
        moved = lambda by, name=name, unit=unit, i=i: {
            **gates, name: {**gates[name], unit: gates[name][unit].at[1, i].add(by)}
        }  # fmt: skip
        slope = (value(moved(3e-2)) - value(moved(-3e-2))) / 6e-2
        np.testing.assert_allclose(found[name][unit][1, i], slope, rtol=5e-2, atol=2e-4)
