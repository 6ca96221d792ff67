"""Callbacks, and the metrics of evaluation that are no means of examples."""

import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.train.objectives import Classification, Regression, infer
from tests.train import tools

QUIET = {"every": 2, "progress": False}


def run(callbacks, **options):
    options = {
        "steps": 8,
        "objective": "classification",
        "log": QUIET,
        "optimizer": {"name": "sgd", "lr": 0.1},
    } | options
    return jft.finetune(tools.apply, tools.parameters(), tools.batches(), callbacks=callbacks, **options)


def test_callbacks_see_every_row_and_the_parameters():
    seen, params = [], []

    def follow(event):
        seen.append((event.step, event.split, event.metrics["loss"], event.steps, event.member))
        if event.split == "eval":
            params.append(event.params)

    result = run([follow], eval_data=tools.batches(2, seed=5), eval_every=4)
    assert [(s[0], s[1]) for s in seen] == [
        (2, "train"), (4, "train"), (4, "eval"), (6, "train"), (8, "train"), (8, "eval"),
    ]  # fmt: skip
    assert [s[2] for s in seen] == [row["loss"] for row in result.metrics] and {s[3:] for s in seen} == {(8, "")}
    np.testing.assert_array_equal(params[-1]["one"]["w"], result.params["one"]["w"])
    assert not np.array_equal(params[0]["one"]["w"], params[1]["one"]["w"])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_callback_ends_the_run_and_it_goes_on_from_there(tmp_path, split):
    stop = lambda event: event.split == split and event.step >= 4
    options = {
        "eval_data": tools.batches(2, seed=5),
        "eval_every": 3 + (split == "eval"),
        "workdir": tmp_path,
        "checkpoint": 3,
    }
    calls = []
    ended = run([stop, lambda event: calls.append(event.step)], **options)
    # A training row is fetched while the next step is under way.
    assert int(ended.state.step) == (5 if split == "train" else 4)
    assert calls and ended.evaluation["loss"] == ended.metrics[-1]["loss"] and ended.metrics[-1]["split"] == "eval"
    whole, fresh = run([], **options), run([], **options | {"workdir": tmp_path / "fresh"})
    np.testing.assert_array_equal(whole.params["one"]["w"], fresh.params["one"]["w"])


def test_members_of_a_fleet_say_who_they_are():
    seen = []
    run(
        [lambda event: seen.append((event.member, event.step))],
        fleet=[{"name": "a"}, {"name": "b", "lr": 0.2}],
        steps=2,
    )
    assert seen == [("a", 2), ("b", 2)]


@pytest.mark.parametrize("classes", [2, 5])
def test_f1_and_matthews_are_those_of_scikit_learn(classes):
    from sklearn import metrics

    r = np.random.default_rng(0)
    labels = r.integers(0, classes, 60).astype(np.int32)
    outputs = (np.eye(classes)[labels] + 1.2 * r.normal(size=(60, classes))).astype(np.float32)
    outputs[:, classes - 1] += 0.3
    batches = [{"x": outputs[i : i + 16], "labels": labels[i : i + 16]} for i in range(0, 60, 16)]
    # A row that does not count, and a class that no row has.
    batches[0] = {k: np.concatenate([v, v[:1]]) for k, v in batches[0].items()} | {"valid": np.arange(17) < 16}
    wide = lambda params, batch: (
        batch["x"] if classes == 2 else jnp.pad(batch["x"], ((0, 0), (0, 1)), constant_values=-9)
    )
    found = jft.train.evaluate(
        lambda p, b: wide(p, b) + p["zero"], {"zero": np.zeros((), np.float32)}, batches, "classification"
    )
    predicted = outputs.argmax(1)
    average = {"average": "binary"} if classes == 2 else {"average": "macro"}
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, predicted, **average), abs=1e-6)
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(labels, predicted), abs=1e-6)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert set(found) == {"loss", "accuracy", "f1", "matthews"}


def test_of_one_class_alone_there_is_no_correlation():
    report = Classification().report({"loss": 1.0, "by_class": np.asarray([[1, 0], [1, 0], [1, 0]])})
    assert report == {"loss": 1.0, "f1": 0.0, "matthews": 0.0}


def test_regression_has_the_correlation_of_numpy():
    r = np.random.default_rng(1)
    y = (3 + r.normal(size=40)).astype(np.float32)
    x = (y + r.normal(size=40)).astype(np.float32)
    batches = [
        {"x": x[i : i + 16, None], "labels": y[i : i + 16], "valid": np.ones(len(y[i : i + 16]), bool)}
        for i in (0, 16, 32)
    ]
    batches[1]["valid"][3] = False
    keep = np.arange(40) != 19
    apply, params = lambda p, b: b["x"] * p["one"], {"one": np.ones((), np.float32)}
    objective = infer(batches[0])
    assert isinstance(objective, Regression)
    found = jft.train.evaluate(apply, params, batches, objective)
    assert found["pearson"] == pytest.approx(np.corrcoef(x[keep], y[keep])[0, 1], abs=1e-5)
    assert found["loss"] == pytest.approx(np.mean((x - y)[keep] ** 2), rel=1e-5)
    with pytest.raises(ValueError, match=r"a regression takes outputs \[B, 1\], got \(16, 2\)"):
        jft.train.evaluate(lambda p, b: b["x"] * p["one"] * np.ones((1, 2), np.float32), params, batches, objective)
    with pytest.raises(ValueError, match="labels of a regression are one number for each example"):
        jft.train.evaluate(apply, params, [{"x": x[:4, None], "labels": np.ones((4, 2), np.float32)}], objective)
