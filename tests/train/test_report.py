"""What a run shows of its first example, by what the batch holds and what the loss is over."""

import numpy as np
import pytest

import jft
from jft.data.tokenizer import byte_tokenizer
from jft.train import report
from jft.train.objectives import Classification, Contrastive, LanguageModel

BYTES = byte_tokenizer()


def text(written: str, length: int = 16) -> dict:
    """One row of tokens and segments, padded."""
    ids = BYTES.encode(written).ids
    row, segments = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
    row[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    return {"tokens": row, "segments": segments}


def test_targets_of_a_language_model_stand_in_brackets():
    batch = text("ask: yes")
    batch["loss_mask"] = np.where(np.arange(16) >= 5, batch["segments"], 0)
    shown = report.example(batch, LanguageModel(), BYTES)
    assert shown == "first example, targets in brackets: ask: ⟦yes⟧"


def test_a_classified_text_is_shown_with_its_label():
    batch = text("good") | {"labels": np.array([3], np.int32)}
    assert report.example(batch, Classification(), BYTES) == "first example, label 3: good"
    assert report.example(batch, Classification(), BYTES, limit=2) == "first example, label 3: go"


def test_a_captioned_image_is_shown_by_its_caption():
    batch = text("a cat") | {"images": np.zeros((1, 2, 2, 3), np.float32)}
    assert report.example(batch, Contrastive(), BYTES) == "first example: a cat"


@pytest.mark.parametrize("coder", [None, BYTES])
def test_images_alone_show_nothing(coder):
    batch = {"images": np.zeros((1, 2, 2, 3), np.float32), "labels": np.array([3], np.int32)}
    assert report.example(batch, Classification(), coder) == ""


def test_the_loss_of_a_row_is_the_mean_since_the_last():
    """Over targets: batches of two and of six rows count by their rows, also in the last, shorter interval."""
    rows = [2, 6, 6, 2, 2]
    batches = [{"x": np.full((n, 1), i + 1, np.float32), "labels": np.zeros(n, np.float32)} for i, n in enumerate(rows)]
    log = {"every": 2, "progress": False}
    run = jft.finetune(
        lambda p, b: b["x"] * p["w"],
        {"w": np.ones(1, np.float32)},
        batches,
        steps=5,
        objective="regression",
        optimizer={"name": "sgd", "lr": 1e-30},
        log=log,
    )
    losses = np.array([1.0, 4, 9, 16, 25])
    means = [np.average(losses[i : i + 2], weights=rows[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose([row["loss"] for row in run.metrics], means, rtol=1e-6)
    # Of one step, as its name says.
    assert [row["weight"] for row in run.metrics] == [6, 2, 2]
