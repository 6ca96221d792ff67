"""Gradients and squared gradients for scores, against NumPy and explicit loops over examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import parallel, tree
from jft.models import Classifier, DecoderConfig, Model, T5Config, VisionConfig
from jft.models.moe import Experts
from jft.train import calibration as module
from jft.train.calibration import RunCalibration
from jft.train.objectives import Classification, Contrastive, LanguageModel, Seq2Seq
from tests.train import tools

PATHS = ("one/w", "one/b", "two/w")


def calibration_of(data=None, paths=PATHS, **options):
    options = {"objective": Classification(), "data": tools.batches() if data is None else data} | options
    return RunCalibration(tools.apply, tools.parameters(), paths, **options)


def language(paths=("embed/table", "head/w"), **options):
    options = {"objective": LanguageModel(), "data": tools.token_batches()} | options
    return RunCalibration(tools.bigram, tools.bigram_parameters(), paths, **options)


def close(found, expected, rtol=2e-5):
    assert set(found) == set(expected)
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=rtol, atol=1e-7, err_msg=path)


def bigram_gradient(table, head, tokens, weights, whole=False):
    """Gradient of the weighted mean (or sum) of next-token losses of the bigram model, in float64."""
    x, y, w = tokens[:, :-1].ravel(), tokens[:, 1:].ravel(), weights.ravel().astype(np.float64)
    w = w if whole else w / w.sum()
    h = table[x]
    z = h @ head
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    d = (p - np.eye(head.shape[1])[y]) * w[:, None]
    embed = np.zeros_like(table)
    np.add.at(embed, x, d @ head.T)
    return {"embed/table": embed, "head/w": h.T @ d}


def target_weights(batch):
    s = batch["segments"]
    return (s[:, :-1] == s[:, 1:]) * (s[:, 1:] > 0) * batch["loss_mask"][:, 1:]


def weights64(params):
    return {p: np.asarray(x, np.float64) for p, x in tree.flatten(params).items()}


def test_gradient_is_the_mean_of_the_batches_gradients():
    found = calibration_of().gradient(3)
    each = [tools.reference_gradient(tools.parameters(), b)[1] for b in tools.batches()[:3]]
    close(found, {p: np.mean([g[p] for g in each], axis=0) for p in PATHS})


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradient_of_tokens_weighs_each_target_of_the_batch_alike(accumulate):
    w = weights64(tools.bigram_parameters())
    batch = tools.token_batches()[0]
    expected = bigram_gradient(w["embed/table"], w["head/w"], batch["tokens"], target_weights(batch))
    close(language(accumulate=accumulate).gradient(), expected)


@pytest.mark.parametrize("power", [1, 2])
def test_squares_per_batch(power):
    found = calibration_of().squares(4, "batch", power)
    each = [tools.reference_gradient(tools.parameters(), b)[1] for b in tools.batches()[:4]]
    close(found, {p: np.mean([np.abs(g[p]) ** power for g in each], axis=0) for p in PATHS})


@pytest.mark.parametrize(("power", "chunk", "count"), [(2, 1, 19), (1, 4, 19), (2, 8, 8)])
def test_squares_per_example_stop_at_the_count(power, chunk, count):
    """19 examples: two whole batches of 8, and 3 of the third."""
    found = calibration_of(chunk=chunk).squares(count, power=power)
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in tools.batches() for i in range(8)][:count]
    each = [tools.reference_gradient(tools.parameters(), r)[1] for r in rows]
    close(found, {p: np.mean([np.abs(g[p]) ** power for g in each], axis=0) for p in PATHS})


def test_examples_that_do_not_count_are_passed_over():
    data = tools.batches()
    keep = np.array([1, 0, 1, 1, 0, 0, 1, 1], bool)
    masked = [{**b, "valid": keep} for b in data]
    found = calibration_of(masked).squares(7)
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in data[:2] for i in np.flatnonzero(keep)][:7]
    each = [tools.reference_gradient(tools.parameters(), r)[1] for r in rows]
    close(found, {p: np.mean([g[p] ** 2 for g in each], axis=0) for p in PATHS})


@pytest.mark.parametrize("tokens", ["mean", "sum"])
def test_squares_per_row_of_tokens(tokens):
    w, data = weights64(tools.bigram_parameters()), tools.token_batches()
    rows = [(b["tokens"][i : i + 1], target_weights(b)[i : i + 1]) for b in data for i in range(8)]
    rows = [(t, m) for t, m in rows if m.sum()][:12]
    each = [bigram_gradient(w["embed/table"], w["head/w"], t, m, tokens == "sum") for t, m in rows]
    found = language(chunk=2).squares(12, tokens=tokens)
    close(found, {p: np.mean([g[p] ** 2 for g in each], axis=0) for p in each[0]})


def test_sampled_targets_give_the_true_fisher_information():
    """One batch again and again: the mean over draws approaches the expectation over the model's own predictions."""
    batch = {k: v[:2] for k, v in tools.batches(1)[0].items()}
    params = tools.parameters()
    count = 4000
    found = calibration_of([batch] * 1, paths=("two/b",)).squares(count, "sampled")["two/b"]
    logits = np.asarray(tools.apply(params, batch), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.mean(p * (1 - p), axis=0)  # E[(p - onehot(y))^2] for y ~ p
    np.testing.assert_allclose(found, expected, rtol=0.1)
    empirical = calibration_of([batch], paths=("two/b",)).squares(2)["two/b"]
    assert not np.allclose(empirical, expected, rtol=0.3)


def test_sampled_loss_of_tokens_keeps_the_masks_and_the_inputs():
    """With one certain prediction at each position the draws are known."""
    batch = tools.token_batches(1)[0]
    sure = np.full((*batch["tokens"].shape, 11), -40.0, np.float32)
    sure[..., 3] = 40.0
    total, weight = LanguageModel().sampled_loss(jax.random.key(0), jnp.asarray(sure), batch)
    assert float(total) == 0
    np.testing.assert_allclose(weight, target_weights(batch).sum(), rtol=1e-6)


def test_sampled_targets_are_drawn_for_each_example_and_batch_anew():
    batch = tools.token_batches(1)[0]
    calibration = language(data=[batch])
    counting = len([1 for row in target_weights(batch) if row.sum()])
    first, again = calibration.squares(counting, "sampled"), calibration.squares(counting, "sampled")
    close(first, again, rtol=0)
    twice = calibration.squares(2 * counting, "sampled")
    assert np.abs(twice["head/w"] - first["head/w"]).max() > 1e-4
    other = language(data=[batch], seed=1).squares(counting, "sampled")
    assert np.abs(other["head/w"] - first["head/w"]).max() > 1e-4


def small(**options):
    return Model(DecoderConfig(vocab=16, width=8, layers=2, heads=2, hidden=12, qkv_bias=True, **options))


T5 = Model(T5Config(vocab=16, width=8, layers=2, decoder_layers=2, heads=2, head=4, hidden=12))
VIT = Model(Classifier(VisionConfig(image=8, patch=4, width=8, layers=2, heads=2, hidden=12), 3))


def decoder_batch(r):
    segments = np.array([[1] * 7, [1, 1, 1, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0], [0] * 7], np.int32)
    return {"tokens": r.integers(0, 16, (4, 7)).astype(np.int32), "segments": segments}


def seq2seq_batch(r):
    return {
        "tokens": r.integers(1, 16, (4, 6)).astype(np.int32),
        "decoder_tokens": np.where(np.arange(5) < [[5], [3], [2], [4]], r.integers(1, 16, (4, 5)), 0).astype(np.int32),
    }


def image_batch(r):
    images = r.normal(size=(4, 8, 8, 3)).astype(np.float32)
    return {"images": images, "labels": np.array([0, 1, 2, 0], np.int32), "valid": np.array([1, 1, 0, 1], bool)}


@pytest.mark.parametrize(
    ("model", "objective", "batch", "how", "accumulate"),
    [
        (small(), LanguageModel(), decoder_batch, ("example", 2), 2),
        (small(experts=Experts(4, 2, 6)).with_(remat="full"), LanguageModel(), decoder_batch, ("example", 1), 1),
        (T5, Seq2Seq(), seq2seq_batch, ("sampled", 2, "sum"), 1),
        (VIT, Classification(label_smoothing=0.1), image_batch, ("example", 2), 1),
    ],
)
def test_one_pass_for_matrices_is_a_pass_for_each_example(model, objective, batch, how, accumulate, monkeypatch):
    """Every weight of the model: what the products' taps give is what ``vmap`` of the gradient gives."""
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, model.init(jax.random.key(0)))
    data = [batch(np.random.default_rng(0))]
    calibration = RunCalibration(model, params, tree.flatten(params), objective, data, chunk=2, accumulate=accumulate)
    taps = module.tapped(model, calibration._setting, *calibration._weights, data[0])
    plain = {p for p in calibration.paths if p.endswith("/w") and "/experts/" not in p}
    assert set(taps) == plain
    assert len(plain) >= 6
    found = calibration.squares(3, *how)
    monkeypatch.setattr(module, "tapped", lambda *_: ())
    expected = calibration.squares(3, *how)
    for path in calibration.paths:
        scale = float(jnp.max(expected[path]))
        assert scale > 0 or path.endswith("k/b"), path
        np.testing.assert_allclose(found[path], expected[path], rtol=2e-4, atol=1e-5 * scale, err_msg=path)


def test_candidates_alone_are_differentiated():
    calibration = calibration_of(paths=("two/w",))
    assert set(calibration.gradient()) == {"two/w"}
    jaxpr = jax.make_jaxpr(functools.partial(_gradient_of, calibration))(*calibration._weights, tools.batches()[0])
    assert [x.aval.shape for x in jaxpr.jaxpr.outvars] == [(16, 3)]


def _gradient_of(calibration, rest, chosen, batch):
    return module._gradient(calibration._setting, rest, chosen, batch)


def test_bfloat16_weights_give_float32_gradients():
    calibration = RunCalibration(
        tools.apply, tools.parameters(dtype=jnp.bfloat16), PATHS, Classification(), tools.batches(), accumulate=2
    )
    found = calibration.gradient(2)
    assert {g.dtype for g in found.values()} == {np.dtype("float32")}


def test_data_is_read_from_its_beginning_each_time():
    calls = []

    def anew():
        calls.append(1)
        return tools.batches()

    calibration = calibration_of(anew)
    close(calibration.gradient(2), calibration.gradient(2), rtol=0)
    assert len(calls) == 2


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}])
def test_meshes_agree_with_one_device(shape):
    model = Model(DecoderConfig(vocab=32, width=128, layers=2, heads=4, hidden=256))
    params = model.init(jax.random.key(0))
    r = np.random.default_rng(0)
    data = [{"tokens": r.integers(0, 32, (8, 8)).astype(np.int32)} for _ in range(2)]
    paths = ("layers/mlp/up/w", "head/w", "layers/attn/q/w")
    one = RunCalibration(model, params, paths, LanguageModel(), data)
    many = RunCalibration(model, params, paths, LanguageModel(), data, mesh=parallel.make_mesh(shape))
    for ask in (
        lambda p: p.gradient(2),
        lambda p: p.squares(2, "batch"),
        lambda p: p.squares(13),
        lambda p: p.squares(9, "sampled"),
    ):
        expected, found = ask(one), ask(many)
        for path in paths:
            scale = float(jnp.max(jnp.abs(expected[path])))
            np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, atol=1e-5 * scale, err_msg=path)
            assert found[path].sharding.is_equivalent_to(many.params[path].sharding, found[path].ndim), path


def test_lead_counts_layers_and_experts():
    model = Model(DecoderConfig(vocab=8, width=8, layers=2, heads=2, hidden=8, qkv_bias=True))
    params = model.init(jax.random.key(0))
    calibration = RunCalibration(model, params, ("head/w",), LanguageModel(), [])
    leads = {
        "head/w": 0,
        "layers/attn/q/w": 1,
        "layers/attn/q/b": 1,
        "final_norm/scale": 0,
        "layers/attn_norm/scale": 1,
    }
    assert {p: calibration.lead(p) for p in leads} == leads
    assert calibration_of().lead("one/w") == 0


def test_tuned_gives_the_candidates():
    seen = []

    def train(steps):
        seen.append(steps)
        return jax.tree.map(lambda x: x + 1, tools.parameters())

    found = calibration_of(train=train).tuned(5)
    assert seen == [5] and set(found) == set(PATHS)
    close(found, {p: np.asarray(tree.flatten(tools.parameters())[p]) + 1 for p in PATHS})


def nan_batches():
    return [{**b, "images": np.full_like(b["images"], np.nan)} for b in tools.batches()]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: calibration_of(paths=("three/w",)), "'three/w' is no weight"),
        (lambda: calibration_of(iter(tools.batches())), "which an iterator has left"),
        (lambda: calibration_of().gradient(0), "over 0 batches"),
        (lambda: calibration_of().squares(0), "over 0 examples"),
        (lambda: calibration_of().squares(3, "rows"), "per is 'rows'; choose one of batch, example, sampled"),
        (lambda: calibration_of().squares(3, power=3), "power is 3"),
        (lambda: calibration_of().tuned(3), r"give RunCalibration\(train=...\)"),
        (lambda: calibration_of(train=lambda n: None).tuned(0), "after 0 steps"),
        (lambda: calibration_of(nan_batches()).gradient(), "gradient of one/b is not finite"),
        (lambda: calibration_of(objective=Contrastive()).squares(3), "take per='batch'"),
        (lambda: calibration_of(objective=Contrastive(), accumulate=2), "it does not split"),
        (lambda: calibration_of(lambda: (b for b in tools.batches(2))).gradient(3), "the data ended"),
        (
            lambda: calibration_of([{**b, "valid": np.zeros(8, bool)} for b in tools.batches()]).squares(3),
            "total weight 0",
        ),
    ],
)
def test_refusals(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
