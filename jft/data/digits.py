"""`digits`: scikit-learn's 1797 handwritten digits, and several tasks over the same scans.

The scans are of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and Kaynak 1998), 8 x 8 pixels of 17
grey levels. They ship inside scikit-learn: nothing is downloaded. Several tasks over the same images make the smallest
honest test bed of task arithmetic.
"""

from __future__ import annotations

import functools

import numpy as np

from jft.data.errors import DataError, choose
from jft.data.pictures import Pictures

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


class Digits(Pictures):
    """Records ``{"image": float32 [8, 8, 1] in [-1, 1], "label": int, "digit": int, "name": str}``.

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
        if limit is not None and limit < 1:
            raise DataError(f"digits: limit must be at least 1, got {limit!r}")
        rows = choose(split, SPLITS, "digits: split")
        # Grey levels 0 to 16.
        scans, digits = (part[rows][:limit] for part in _scans())
        super().__init__(f"digits ({task}, {split})", "digit", scans, digits, 16, TASKS, task, rotate, invert, flip)
