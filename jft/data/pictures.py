"""`Pictures`: labelled grey pictures in memory, under several views: other labels, turned, inverted, mirrored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft.data.errors import DataError, choose
from jft.data.source import Source

# A view of the labels: the names of its classes, and the class of each class of the set.
Views = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]


class Pictures(Source):
    """Records ``{"image": float32 [H, W, 1] in [-1, 1], "label": int, FIELD: int, "name": str}``.

    images: [N, H, W], where ``whitest`` is the value of the brightest pixel and 0 of the darkest. classes: [N], the class of
    each by the view "identity", whose number is the field ``field`` and whose name is the field ``name``. task: a view, which
    ``label`` follows. rotate, invert, flip: as in :class:`jft.data.digits.Digits`; the pictures change, the labels do not.
    """

    def __init__(
        self,
        name: str,
        field: str,
        images: np.ndarray,
        classes: np.ndarray,
        whitest: float,
        views: Views,
        task: str,
        rotate: int,
        invert: bool,
        flip: str | None,
    ):
        if rotate % 90:
            raise DataError(f"{name}: rotate must be a multiple of 90 degrees, got {rotate!r}")
        axis = choose(flip, {None: None, "horizontal": 2, "vertical": 1}, f"{name}: flip")
        self.classes, labels = choose(task, views, f"{name}: task")
        self.name, self.field, self.views, self.whitest, self.inverted = name, field, views, whitest, invert
        # Views of the array, not copies: a study holds one set under several.
        turned = np.rot90(images, k=rotate // 90 % 4, axes=(1, 2))
        self._pixels = turned if axis is None else np.flip(turned, axis)
        self.numbers = classes
        self.labels = np.asarray(labels, np.int32)[classes]

    @property
    def images(self) -> np.ndarray:
        """All pictures, float32 [N, H, W, 1]."""
        return self._scaled(self._pixels)

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        scaled = pixels.astype(np.float32) / (self.whitest / 2) - 1
        return np.ascontiguousarray((-scaled if self.inverted else scaled)[..., None])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.numbers[index])
        picture = {"image": self._scaled(self._pixels[index]), "label": int(self.labels[index])}
        return {**picture, self.field: number, "name": self._names[number]}

    @property
    def _names(self) -> tuple[str, ...]:
        return self.views["identity"][0]

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return {"label": self.classes, self.field: self._names, "name": self._names}.get(field)

    def column(self, field: str) -> Sequence[Any]:
        columns = {"label": self.labels, self.field: self.numbers}
        return columns[field].tolist() if field in columns else super().column(field)
