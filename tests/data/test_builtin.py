import numpy as np
import pytest

from jft import data
from jft.data.digits import SPLITS, TASKS, Digits
from jft.data.source import few_shot, held_out, limited
from jft.data.stdlib import Stdlib, split_of


def test_digit_splits_are_disjoint_and_fixed():
    parts = [Digits(split=s) for s in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [1197, 300, 300]
    everything = Digits(split="all")
    assert np.array_equal(np.concatenate([p.images for p in parts]), everything.images)
    assert Digits(split="train").numbers[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
    assert list(SPLITS) == ["train", "validation", "test", "all"]


@pytest.mark.parametrize("task", TASKS)
def test_digit_tasks_label_the_same_scans(task):
    source = Digits(task=task)
    names = source.class_names("label")
    assert set(source.column("label")) == set(range(len(names)))
    rules = {"identity": lambda d: d, "parity": lambda d: d % 2, "magnitude": lambda d: int(d >= 5),
             "prime": lambda d: int(d in (2, 3, 5, 7)), "thirds": lambda d: d % 3,
             "loops": lambda d: {0: 1, 6: 1, 9: 1, 8: 2}.get(d, 0)}  # fmt: skip
    assert all(source[i]["label"] == rules[task](source[i]["digit"]) for i in range(50))


def test_digit_pictures():
    plain = Digits()
    image = plain[0]["image"]
    assert image.shape == (8, 8, 1)
    assert image.dtype == np.float32
    assert plain.images.min() == -1
    assert plain.images.max() == 1
    assert np.array_equal(Digits(rotate=90)[5]["image"], np.rot90(plain[5]["image"]))
    assert np.array_equal(Digits(invert=True)[5]["image"], -plain[5]["image"])
    assert np.array_equal(Digits(flip="horizontal")[5]["image"], plain[5]["image"][:, ::-1])
    assert len(Digits(limit=10)) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "pairty"}, "Did you mean 'parity'"),
        ({"rotate": 45}, "multiple of 90"),
        ({"split": "dev"}, "split 'dev' is unknown"),
        ({"flip": "diagonal"}, "flip"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_wrong_digit_settings(settings, message):
    with pytest.raises(data.DataError, match=message):
        Digits(**settings)


def test_stdlib_splits_by_module():
    parts = {s: Stdlib("source", s) for s in ("train", "validation", "test")}
    paths = {s: {p.files[i][0] for i in range(len(p))} for s, p in parts.items()}
    assert not paths["train"] & paths["test"]
    assert all(split_of(p) == s for s, names in paths.items() for p in names)
    assert not any("test" in p.split("/") for names in paths.values() for p in names)
    assert len(paths["train"]) > 300
    assert "import" in parts["train"][5]["text"]
    assert split_of("json/decoder.py") == "train"  # a fixed hash: the same in every Python


def test_stdlib_docstrings_pair_signature_and_text():
    source = Stdlib("docstrings", "test")
    records = [source[i] for i in range(len(source))]
    assert any(r["prompt"].startswith("def ") for r in records)
    assert all(r["text"] == r["response"] for r in records)
    with pytest.raises(data.DataError, match="kind"):
        Stdlib("sources")


def test_views_are_fixed_and_ordered():
    source = Digits()
    rest, held = held_out(source, 0.1, keep=False), held_out(source, 0.1, keep=True)
    assert sorted([*rest.rows, *held.rows]) == list(range(1197))
    assert len(held) == 120
    small, large = set(limited(source, 10).rows), set(limited(source, 20).rows)
    assert small < large
    assert np.bincount(few_shot(source, 4, "label").column("label")).tolist() == [4] * 10
    with pytest.raises(data.DataError, match="fewer than shots=500"):
        few_shot(source, 500, "label")
    with pytest.raises(data.DataError, match="between 0 and 1"):
        held_out(source, 1.5, keep=True)
