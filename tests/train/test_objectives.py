"""Objectives against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import jft
from jft.train.objectives import Classification, Contrastive, LanguageModel, Seq2Seq, infer, objective
from tests.train import tools


def test_language_model_counts_targets_inside_segments():
    batch = tools.token_batches(1)[0]
    r = np.random.default_rng(0)
    logits = r.normal(size=(8, 12, 11)).astype(np.float32)
    loss = weight = hits = squares = 0.0
    for b in range(8):
        for t in range(11):
            s, mask = batch["segments"][b], batch["loss_mask"][b, t + 1]
            if s[t] and s[t] == s[t + 1] and mask:
                row = logits[b, t].astype(np.float64)
                target = batch["tokens"][b, t + 1]
                loss -= log_softmax(row)[target]
                hits += row.argmax() == target
                squares += np.logaddexp.reduce(row) ** 2
                weight += 1
    got, over, sums = LanguageModel().loss(jnp.asarray(logits), batch)
    np.testing.assert_allclose([got, over, sums["accuracy"]], [loss, weight, hits], rtol=1e-5)
    got, _, sums = LanguageModel(z_loss=0.01).loss(jnp.asarray(logits), batch)
    np.testing.assert_allclose([got, sums["nll"]], [loss + 0.01 * squares, loss], rtol=1e-5)
    assert LanguageModel().weight(batch, np) == weight


def test_plain_tokens_predict_all_but_the_first():
    tokens = np.zeros((2, 5), np.int32)
    assert LanguageModel().weight(tokens, np) == 8
    report = LanguageModel().report({"loss": 2.0})
    np.testing.assert_allclose(report["perplexity"], np.exp(2.0))


def test_rows_that_fill_up_do_not_count():
    tokens = {"tokens": np.ones((2, 5), np.int32), "valid": np.array([True, False])}
    assert LanguageModel().weight(tokens, np) == 4
    labels = {"labels": np.array([0, 1]), "valid": np.array([True, False])}
    loss, weight, sums = Classification().loss(jnp.asarray([[1.0, 0.0], [5.0, 0.0]]), labels)
    np.testing.assert_allclose([loss, weight, sums["accuracy"]], [np.log(1 + np.exp(-1)), 1, 1], rtol=1e-5)


def test_examples_without_a_label_are_refused():
    """Indexing would take -1 for the last class, and train it."""
    batch = tools.batches(1)[0]
    batch["labels"] = np.where(np.arange(8) < 7, batch["labels"], -1)
    for refuse in (
        lambda: jft.train.evaluate(tools.apply, tools.parameters(), [batch], "classification"),
        lambda: jft.finetune(tools.apply, tools.parameters(), [batch], steps=1, log={"progress": False}),
    ):
        with pytest.raises(ValueError, match="label -1 is no class"):
            refuse()
    jft.train.evaluate(tools.apply, tools.parameters(), [batch | {"valid": batch["labels"] >= 0}], "classification")


def test_label_smoothing():
    logits, labels = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 2, 1, 1])
    targets = 0.9 * np.eye(3)[labels] + 0.1 / 3
    loss = -(targets * log_softmax(logits, axis=1)).sum()
    got, _, _ = Classification(0.1).loss(jnp.asarray(logits, jnp.float32), {"labels": labels})
    np.testing.assert_allclose(got, loss, rtol=1e-5)


def test_contrastive():
    r = np.random.default_rng(0)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in r.normal(size=(2, 4, 6)))
    logits = np.exp(1.5) * image @ text.T
    loss = -(np.diag(log_softmax(logits, axis=1)) + np.diag(log_softmax(logits, axis=0))).sum() / 2
    outputs = {"image": jnp.asarray(image), "text": jnp.asarray(text), "logit_scale": jnp.asarray(1.5)}
    got, weight, _ = Contrastive().loss(outputs, {"images": np.zeros((4, 1))})
    np.testing.assert_allclose([got, weight], [loss, 4], rtol=1e-5)
    # A row that fills up is neither an example nor a negative.
    wide = {k: jnp.concatenate([v, v[:1]]) if v.ndim else v for k, v in outputs.items()}
    valid = np.array([True] * 4 + [False])
    got, weight, _ = Contrastive().loss(wide, {"images": np.zeros((5, 1)), "valid": valid})
    np.testing.assert_allclose([got, weight], [loss, 4], rtol=1e-5)


def test_seq2seq_ignores_padding():
    tokens = np.array([[0, 5, 1, 0, 0], [0, 3, 4, 2, 1]], np.int32)
    assert Seq2Seq().weight({"decoder_tokens": tokens}, np) == 2 + 4
    segments = (np.arange(5) < np.array([[3], [5]])).astype(np.int32)
    batch = {"decoder_tokens": tokens, "decoder_segments": segments}
    assert Seq2Seq().weight(batch, np) == 2 + 4
    logits = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    expected = -sum(log_softmax(logits[b, t])[tokens[b, t + 1]] for b, n in ((0, 2), (1, 4)) for t in range(n))
    np.testing.assert_allclose(Seq2Seq().loss(jnp.asarray(logits), batch)[0], expected, rtol=1e-5)


def test_accuracy_is_that_of_argmax():
    """With ties, of which the first counts, infinities, numbers that are none, and labels that are no class."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (400, 5)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.02] = np.inf
    logits[rng.random(logits.shape) < 0.02] = np.nan
    labels = rng.integers(0, 5, 400)
    labels[np.isnan(np.take_along_axis(logits, labels[:, None], 1)[:, 0])] = 5
    labels[::50] = -1
    expected = np.sum(np.argmax(logits, axis=1) == labels)
    assert float(Classification().loss(jnp.asarray(logits), {"labels": jnp.asarray(labels)})[2]["accuracy"]) == expected


def test_what_a_batch_asks_for():
    assert isinstance(infer(np.zeros((1, 2))), LanguageModel)
    assert isinstance(infer({"images": 0, "labels": 0}), Classification)
    assert isinstance(infer({"images": 0, "tokens": 0}), Contrastive)
    assert isinstance(infer({"tokens": 0, "decoder_tokens": 0}), Seq2Seq)
    with pytest.raises(ValueError, match="no objective fits a batch of images"):
        infer({"images": 0})


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("llm", r"'llm' is unknown \(did you mean 'lm'"),
        ({"name": "lm", "smoothing": 1}, "'lm' has no option 'smoothing'; it has: z_loss"),
        (3, "objective is 3"),
    ],
)
def test_objective_errors(which, message):
    with pytest.raises(ValueError, match=message):
        objective(which)


def test_evaluation_weighs_every_target_once():
    params, batches = tools.bigram_parameters(), tools.token_batches(3)
    got = jft.train.evaluate(tools.bigram, params, batches, "lm")
    loss = weight = 0.0
    for batch in batches:
        s, w, _ = LanguageModel().loss(tools.bigram(params, batch), batch)
        loss, weight = loss + float(s), weight + float(w)
    np.testing.assert_allclose(got["loss"], loss / weight, rtol=1e-6)
    with pytest.raises(ValueError, match="evaluation has no batch"):
        jft.train.evaluate(tools.bigram, params, [], "lm")
