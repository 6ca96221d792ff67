import pickle
import sys
import warnings

import numpy as np
import pytest

from jft import data
from jft.data.tfds import Tfds


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from tests.data.tiny_builder import prepare

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, while it writes
        return prepare(tmp_path_factory.mktemp("tfds"))


def test_reads_a_local_builder_without_tensorflow(prepared):
    source = Tfds(directory=prepared, split="train[:50%]")
    assert len(source) == 10
    record = source[3]
    assert record["image"].dtype == np.uint8
    assert isinstance(record["text"], str)
    assert source.class_names("label") == ("cat", "dog")
    assert source.class_names("text") is None
    assert source.class_names("absent") is None
    assert [source[i]["label"] for i in range(10)] == list(source.column("label"))
    assert len(pickle.loads(pickle.dumps(source))) == 10
    assert "tensorflow" not in sys.modules


def test_classification_end_to_end(prepared):
    settings = {"source": "tfds", "directory": prepared, "task": "classification",
                "image": {"size": 8, "crop": "random", "flip": True, "normalize": "clip"}}  # fmt: skip
    train = data.build(settings, batch_size=4)
    batch = next(iter(train))
    assert batch["images"].shape == (4, 8, 8, 3)
    assert batch["images"].dtype == np.float32
    assert train.classes == ("cat", "dog")
    test = list(data.build({**settings, "split": "test"}, batch_size=4, train=False))
    assert sum(b["valid"].sum() for b in test) == 7
    assert [b["labels"].shape for b in test] == [(4,), (4,)]


def test_few_shot_and_held_out_parts(prepared):
    settings = {"source": "tfds", "directory": prepared, "image": {"size": 4, "normalize": "none"}}
    few = data.build({**settings, "shots": 3}, batch_size=6, train=False)
    labels = np.concatenate([b["labels"][b["valid"]] for b in few])
    assert np.bincount(labels).tolist() == [3, 3]
    # A picture is filled with its number: it tells which rows are in a part.
    parts = [
        {float(b["images"][i, 0, 0, 0]) for b in data.build({**settings, k: 0.1}, batch_size=2, train=False)
         for i in range(2) if b["valid"][i]}
        for k in ("holdout", "held_out")
    ]  # fmt: skip
    assert len(parts[0]) == 18
    assert len(parts[1]) == 2
    assert not parts[0] & parts[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mnits"}, "no data set named 'mnits'. Nearest: mnist"),
        ({"name": "mnist"}, "not prepared in .*download: true"),
        ({}, "give either name .* or directory"),
        ({"directory": "nowhere"}, "no dataset_info.json"),
    ],
)
def test_wrong_names(settings, message, tmp_path):
    with pytest.raises(data.DataError, match=message):
        Tfds(data_dir=str(tmp_path), **settings)


def test_unknown_split_lists_the_splits(prepared):
    with pytest.raises(data.DataError, match=r"the set has train \(20\), test \(7\)"):
        Tfds(directory=prepared, split="valid")


@pytest.mark.parametrize("name", ["cars196", "dtd", "eurosat", "mnist", "resisc45", "sun397", "svhn_cropped"])
def test_tfds_has_the_clip_sets(name):
    import tensorflow_datasets as tfds

    assert tfds.builder_cls(name)
