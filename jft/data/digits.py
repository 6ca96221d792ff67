"""`digits`: scikit-learn's 1797 handwritten digits, and several tasks over the same scans.

The scans are of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and Kaynak 1998), 8 x 8 pixels of 17
grey levels. They ship inside scikit-learn: nothing is downloaded. Several tasks over the same images make the smallest
honest test bed of task arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jft.data.errors import DataError, choose
from jft.data.source import Source

# task -> (class names, class of each digit 0..9)
TASKS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "identity": (tuple("0123456789"), tuple(range(10))),
    "parity": (("even", "odd"), (0, 1) * 5),
    "magnitude": (("below 5", "5 or more"), (0,) * 5 + (1,) * 5),
    "prime": (("not prime", "prime"), (0, 0, 1, 1, 0, 1, 0, 1, 0, 0)),
    # Closed loops of the numeral; a handwritten 4 is open in most of these scans.
    "loops": (("none", "one", "two"), (1, 0, 0, 0, 0, 0, 1, 0, 2, 1)),
    "thirds": (("3k", "3k+1", "3k+2"), (0, 1, 2, 0, 1, 2, 0, 1, 2, 0)),
}
# Rows of a fixed permutation (np.random.RandomState(0)) of the 1797 scans.
SPLITS = {"train": slice(0, 1197), "validation": slice(1197, 1497), "test": slice(1497, 1797), "all": slice(0, 1797)}


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    # The legacy generator: its permutations are the same in every version of NumPy.
    order = np.random.RandomState(0).permutation(len(data.target))
    return data.images[order].astype(np.float32), data.target[order].astype(np.int32)


class Digits(Source):
    """Records ``{"image": float32 [8, 8, 1] in [-1, 1], "label": int, "digit": int}``.

    split: "train" (1197), "validation" (300), "test" (300) or "all"; task: a key of :data:`TASKS`.
    rotate: degrees counter-clockwise, a multiple of 90; invert: light on dark becomes dark on light; flip: None,
    "horizontal" or "vertical". The pictures are changed, the labels are not: a shifted domain of the same task.
    limit: the first so many scans of the split (in its fixed random order).
    Raises :class:`DataError` for an unknown split, task or flip, and for another angle.
    """

    def __init__(
        self,
        split: str = "train",
        task: str = "identity",
        rotate: int = 0,
        invert: bool = False,
        flip: str | None = None,
        limit: int | None = None,
    ):
        if rotate % 90:
            raise DataError(f"digits: rotate must be a multiple of 90 degrees, got {rotate!r}")
        if limit is not None and limit < 1:
            raise DataError(f"digits: limit must be at least 1, got {limit!r}")
        axis = choose(flip, {None: None, "horizontal": 2, "vertical": 1}, "digits: flip")
        rows = choose(split, SPLITS, "digits: split")
        self.name = f"digits ({task}, {split})"
        self.classes, labels = choose(task, TASKS, "digits: task")
        scans, digits = _scans()
        # Grey levels 0 to 16 become [-1, 1].
        images = np.rot90(scans[rows][:limit], k=rotate // 90 % 4, axes=(1, 2)) / 8 - 1
        images = -images if invert else images
        images = images if axis is None else np.flip(images, axis)
        self.images = np.ascontiguousarray(images[..., None], np.float32)
        self.digits = digits[rows][:limit]
        self.labels = np.asarray(labels, np.int32)[self.digits]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index]), "digit": int(self.digits[index])}

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return {"label": self.classes, "digit": TASKS["identity"][0]}.get(field)

    def column(self, field: str) -> Sequence[Any]:
        columns = {"label": self.labels, "digit": self.digits}
        return columns[field].tolist() if field in columns else super().column(field)
