"""What scores read inside a model, against the same thing written out: unrolled layers, loops over examples and heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import parallel, tree
from jft.dot import dot
from jft.models import DecoderConfig, Model, T5Config
from jft.models.core import Hooks
from jft.models.moe import Experts, route
from jft.select import activations, heads, layers, scores
from jft.train.calibration import RunCalibration
from jft.train.objectives import Contrastive, LanguageModel, Seq2Seq
from tests.train import tools

DECODER = Model(DecoderConfig(vocab=32, width=16, layers=2, heads=4, kv_heads=2, hidden=24))
MIXTURE = Model(DecoderConfig(vocab=32, width=16, layers=2, heads=4, hidden=16, experts=Experts(4, 2, 16)))


@functools.cache
def data():
    r = np.random.default_rng(0)
    tokens = r.integers(0, 32, (2, 4, 9)).astype(np.int32)
    segments = (np.arange(9)[None] < r.integers(4, 10, (2, 4))[..., None]).astype(np.int32)
    valid = np.array([[1, 1, 1, 1], [1, 0, 1, 1]], bool)
    return [{"tokens": t, "segments": s, "valid": v} for t, s, v in zip(tokens, segments, valid, strict=True)]


@functools.cache
def initial(model, seed):
    return model.init(jax.random.key(seed))


@functools.cache
def calibration_of(model, paths=("layers/attn/q/w",)):
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, initial(model, 1))
    return RunCalibration(model, params, paths, LanguageModel(), data())


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_products(model, params, batch):
    def product(name, x, w, state):
        y = dot(x, w)
        return y, (x, y)

    return model.apply(params, batch, Hooks(product=product))


def products(calibration, batch):
    """Inputs and outputs of every product, by name, as numpy."""
    _, reads = outputs_and_products(calibration.model, tree.unflatten(calibration.params), batch)
    return {k: tuple(np.asarray(z, np.float64) for z in v) for k, v in reads.items()}


def kept(batch):
    return (batch["segments"] > 0) & batch["valid"][:, None]


def test_wanda():
    paths = ("layers/attn/o/w", "layers/mlp/down/w", "head/w")
    calibration = calibration_of(DECODER, paths)
    found = scores.Wanda(2)(calibration)
    for path in paths:
        w = np.asarray(calibration.params[path], np.float64)
        total = 0
        for batch in data():
            x = products(calibration, batch)[path.removesuffix("/w")][0]
            total = total + (x[..., kept(batch), :] ** 2).sum(-2)
        np.testing.assert_allclose(found[path], np.abs(w) * np.sqrt(total)[..., None], rtol=2e-5)


def test_wanda_of_experts_counts_the_tokens_sent_to_them():
    path = "layers/mlp/experts/up/w"
    calibration = calibration_of(MIXTURE, (path,))
    w = np.asarray(calibration.params[path], np.float64)
    total = np.zeros(w.shape[:-1])
    for batch in data():
        x, logits = products(calibration, batch)["layers/mlp/router"]
        chosen = np.asarray(route(jnp.asarray(logits, jnp.float32), MIXTURE.config.experts)[1])
        for layer in range(2):
            for b, t in zip(*np.nonzero(kept(batch)), strict=True):
                for e in chosen[layer, b, t]:
                    total[layer, e] += x[layer, b, t] ** 2
    np.testing.assert_allclose(
        scores.Wanda(2)(calibration)[path], np.abs(w) * np.sqrt(total)[..., None], rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", ["token", "gate"])
def test_experts(kind):
    calibration = calibration_of(MIXTURE)
    expected = np.zeros((2, 4))
    for batch in data():
        logits = products(calibration, batch)["layers/mlp/router"][1]
        for layer in range(2):
            for b, t in zip(*np.nonzero(kept(batch)), strict=True):
                p = np.exp(logits[layer, b, t]) / np.exp(logits[layer, b, t]).sum()
                best = np.argsort(-p)[:2]
                expected[layer, best] += p[best] / p[best].sum() if kind == "gate" else 0.5
    expected /= expected.sum(1, keepdims=True)
    found = activations.experts(calibration, 2, kind)
    assert set(found) == {"layers/mlp/router"}
    np.testing.assert_allclose(found["layers/mlp/router"], expected, rtol=1e-4)


def test_until_takes_the_largest_until_the_share_is_reached():
    table = [[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 3.0]]
    for p, expected in {
        0.2: [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
        0.4: [[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]],
        0.7: [[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 1]],
        1.0: [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]],
    }.items():
        np.testing.assert_array_equal(activations.until(table, p), np.array(expected, bool), err_msg=str(p))


@functools.partial(jax.jit, static_argnums=0)
def logits_with(model, params, batch, gates):
    """Logits with every head's output times ``gates[L, H]``, and each product's input as edited."""

    def product(name, x, w, state):
        if state is None:
            return dot(x, w), None
        edited = (x.reshape(*x.shape[:2], 4, -1) * state[None, None, :, None]).reshape(x.shape)
        return dot(edited, w), None

    hooks = Hooks(product=product, state={"layers/attn/o": jnp.asarray(gates)})
    return model.apply(params, batch, hooks)[0]


def test_gates_are_the_mean_size_of_each_examples_gradient():
    calibration = calibration_of(DECODER)
    objective, params = LanguageModel(), tree.unflatten(calibration.params)

    @jax.jit
    @jax.grad
    def gradient(gates, row):
        total, weight, _ = objective.loss(logits_with(DECODER, params, row, gates), row)
        return total / weight

    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in data() for i in np.flatnonzero(b["valid"])]
    expected = np.mean([np.abs(gradient(np.ones((2, 4), np.float32), row)) for row in rows], axis=0)
    found = heads.gates(calibration, 2)
    assert len(rows) == 7
    np.testing.assert_allclose(found["layers/attn/o"], expected, rtol=1e-4, atol=1e-8)


def right_logit(objective, logits, batch):
    """Mean over targets of the right next token's logit."""
    weights = np.asarray(objective.weights(batch))[:, :-1]
    picked = np.take_along_axis(np.asarray(logits, np.float64)[:, :-1], batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return (weights * picked).sum(), weights.sum()


def test_ablation_is_what_gating_a_head_off_does():
    calibration = calibration_of(DECODER)
    expected, total = np.zeros((2, 4)), 0
    logits = functools.partial(logits_with, DECODER, tree.unflatten(calibration.params))
    for batch in data():
        clean, weight = right_logit(LanguageModel(), logits(batch, np.ones((2, 4))), batch)
        total += weight
        for layer in range(2):
            for head in range(4):
                gates = np.ones((2, 4))
                gates[layer, head] = 0
                expected[layer, head] += clean - right_logit(LanguageModel(), logits(batch, gates), batch)[0]
    found = heads.patching(calibration, 2, None, freeze=False)["layers/attn/o"]
    np.testing.assert_allclose(found, expected / total, rtol=1e-3, atol=1e-5)


def patched(calibration, batch, name, layer, part, other, clean=None):
    """Logits with one part of one product's input taken from ``other``; all heads' from ``clean`` where it is given."""

    def product(at, x, w, index):
        if index is None:
            return dot(x, w), None
        if clean is not None and at == "layers/attn/o":
            x = jnp.asarray(clean[at], x.dtype)[index]
        if at == name:
            x = jnp.where((index == layer) & part, jnp.asarray(other[at], x.dtype)[layer], x)
        return dot(x, w), None

    state = {"layers/attn/o": jnp.arange(2), "layers/mlp/down": jnp.arange(2)}
    return calibration.model.apply(tree.unflatten(calibration.params), batch, Hooks(product=product, state=state))[0]


@pytest.mark.parametrize("freeze", [True, False])
def test_patching_against_one_pass_for_each_head(freeze):
    calibration = calibration_of(DECODER)
    objective = LanguageModel()
    expected, total = {"layers/attn/o": np.zeros((2, 4)), "layers/mlp/down": np.zeros((2, 1))}, 0
    run = jax.jit(functools.partial(patched, calibration), static_argnums=1)
    unpatched = lambda batch: outputs_and_products(DECODER, tree.unflatten(calibration.params), batch)[0]
    for batch in data():
        clean = {k: v[0] for k, v in products(calibration, batch).items()}
        other = {k: v[0] for k, v in products(calibration, heads.rolled(batch)).items()}
        before, weight = right_logit(objective, unpatched(batch), batch)
        total += weight
        for name, table in expected.items():
            size = clean[name].shape[-1] // table.shape[1]
            for layer in range(2):
                for head in range(table.shape[1]):
                    part = np.arange(clean[name].shape[-1]) // size == head
                    after = run(batch, name, layer, part, other, clean if freeze else None)
                    table[layer, head] += before - right_logit(objective, after, batch)[0]
    found = heads.patching(calibration, 2, freeze=freeze, mlps=True)
    assert set(found) == set(expected)
    for name, table in expected.items():
        np.testing.assert_allclose(found[name], table / total, rtol=1e-3, atol=2e-5, err_msg=name)


def test_freezing_leaves_the_last_layer_alone_and_changes_the_first():
    calibration = calibration_of(DECODER)
    one, other = (heads.patching(calibration, 1, freeze=freeze)["layers/attn/o"] for freeze in (True, False))
    np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-6)
    assert np.abs(one[0] - other[0]).max() > 1e-3


def prior(outputs, batch):
    return jnp.sum(jnp.where(batch["segments"] > 0, batch["tokens"], 0), axis=1) / 100


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_correlation(pool):
    calibration = calibration_of(DECODER)
    values, targets = [], []

    def value(name, h, state):
        return h, h if name == "layers/mlp/out" else None

    read = jax.jit(lambda params, batch: DECODER.apply(params, batch, Hooks(value=value))[1]["layers/mlp/out"])
    for batch in data():
        h = np.asarray(read(tree.unflatten(calibration.params), batch), np.float64)
        for b in np.flatnonzero(batch["valid"]):
            real = h[:, b, batch["segments"][b] > 0]
            values.append(real.mean(1) if pool == "mean" else real[:, -1])
            targets.append(batch["tokens"][b][batch["segments"][b] > 0].sum() / 100)
    h = np.stack(values)
    r = np.array([[np.corrcoef(h[:, layer, d], targets)[0, 1] for d in range(16)] for layer in range(2)])
    found = activations.correlation(calibration, prior, 2, "layers/mlp/out", pool)
    np.testing.assert_allclose(found, np.sqrt((r**2).mean(1)), rtol=1e-3)


def test_by_layer():
    r = np.random.default_rng(0)
    table = {
        "embed/table": (4, 2),
        "layers/mlp/up/w": (3, 2, 5),
        "layers/norm/scale": (3, 2),
        "text/layers/q/w": (2, 2, 2),
    }
    table = {p: r.random(shape).astype(np.float32) for p, shape in table.items()}
    up, scale, text = (np.asarray(table[p], np.float64) for p in list(table)[1:])
    sums = {"layers": up.sum((1, 2)) + scale.sum(1), "text/layers": text.sum((1, 2))}
    found = layers.pooled_layers(table)
    assert set(found) == set(sums)
    for stack in sums:
        np.testing.assert_allclose(found[stack], sums[stack], rtol=1e-6)
    np.testing.assert_allclose(layers.pooled_layers(table, "mean")["layers"], sums["layers"] / 12, rtol=1e-6)


def test_towers_and_decoders_read_their_own_tokens():
    """Contents of padded source and target tokens, and of texts, change nothing that is scored."""
    model = Model(T5Config(vocab=32, width=16, layers=2, decoder_layers=2, heads=2, head=8, hidden=16))
    params = initial(model, 0)
    r = np.random.default_rng(0)
    batch = {
        "tokens": r.integers(1, 32, (2, 6)).astype(np.int32),
        "segments": np.array([[1] * 6, [1, 1, 1, 0, 0, 0]], np.int32),
        "decoder_tokens": r.integers(1, 32, (2, 5)).astype(np.int32),
        "decoder_segments": np.array([[1] * 5, [1, 1, 0, 0, 0]], np.int32),
    }
    noise = {
        k: np.where(batch[s] > 0, batch[k], 7)
        for k, s in (("tokens", "segments"), ("decoder_tokens", "decoder_segments"))
    }
    paths = tuple(p for p in model.linear_paths(params) if p.endswith("/w"))
    one, other = (RunCalibration(model, params, paths, Seq2Seq(), [b]) for b in (batch, {**batch, **noise}))
    a, b = scores.Wanda()(one), scores.Wanda()(other)
    assert set(a) == set(paths)
    for path in paths:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-5, atol=1e-7, err_msg=path)
    found = heads.gates(one, 1)
    assert {k: v.shape for k, v in found.items()} == dict.fromkeys(
        ("encoder/layers/attn/o", "decoder/layers/attn/o", "decoder/layers/cross/o"), (2, 2)
    )


def test_a_mesh_agrees_with_one_device():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    one = calibration_of(MIXTURE)
    many = RunCalibration(MIXTURE, tree.unflatten(one.params), one.paths, LanguageModel(), data(), mesh=mesh)
    for ask in (
        lambda p: activations.experts(p, 2),
        lambda p: heads.gates(p, 2),
        lambda p: heads.patching(p, 2),
        lambda p: scores.Wanda(2)(p),
    ):
        expected, found = ask(one), ask(many)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


CONTRASTIVE = Contrastive()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: activations.experts(p, 1), "'llama' model has no experts"),
        (lambda p: activations.experts(calibration_of(MIXTURE), 1, "count"), "kind is 'count'"),
        (lambda p: activations.until([[1.0, 2.0]], 0), "p is 0"),
        (lambda p: activations.until([[0.0, 0.0]], 0.5), "not all zero in a row"),
        (lambda p: layers.pooled_layers({"head/w": np.ones(3)}), "none of the scored weights is in a layer: head/w"),
        (lambda p: layers.pooled_layers({"layers/a": np.ones(3)}, "median"), "pool 'median' is unknown"),
        (lambda p: activations.correlation(p, lambda o, b: b["segments"][:, 0], 1), "same for all examples"),
        (lambda p: activations.correlation(p, prior, 1, "layers/out"), "no site 'layers/out'"),
        (lambda p: activations.correlation(p, prior, 1, pool="first"), "pool is 'first'"),
        (lambda p: scores.Wanda()(calibration_of(DECODER, ("layers/attn_norm/scale",))), "norm/scale' is no product"),
        (
            lambda p: scores.Wanda()(
                RunCalibration(tools.apply, tools.parameters(), ("one/w",), LanguageModel(), data())
            ),
            "own models",
        ),
        (
            lambda p: heads.gates(RunCalibration(DECODER, tree.unflatten(p.params), (), CONTRASTIVE, data()), 1),
            "no gradient",
        ),
        (
            lambda p: heads.patching(RunCalibration(DECODER, tree.unflatten(p.params), (), CONTRASTIVE, data()), 1),
            "no answer",
        ),
    ],
)
def test_refusals(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(calibration_of(DECODER))
