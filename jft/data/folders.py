"""`ImageFolder`: one directory per class, one file per image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.errors import DataError, choose
from jft.data.source import Source
from jft.files import check_regular

MAX_PIXELS = 2**26
"""Of an image: 8192 x 8192. A file of some kilobytes may say that it has any number."""
EXTENSIONS = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class ImageFolder(Source):
    """``root/CLASS/any/depth/image.png``: records ``{"image": uint8 [H, W, 3], "label": int, "file": str}``.

    Classes are the directories directly under ``root`` (under ``root/split`` where ``split`` is given), sorted by name.
    classes: rename or check them: a list in sorted-directory order, or a mapping of directory to name.
    Raises :class:`DataError` where there is no class directory, a class is empty, or a file is not an image, or one of more
    than ``MAX_PIXELS`` (naming it).
    """

    def __init__(self, root: str, split: str | None = None, classes: list | dict | None = None):
        top = Path(root) / split if split else Path(root)
        if not top.is_dir():
            raise DataError(f"image_folder: {str(top)!r} is not a directory")
        # Sorted: file systems list in any order, and labels must not depend on it.
        folders = sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise DataError(f"image_folder: {str(top)!r} holds no class directories")
        self.name = f"image_folder {top}"
        self.names = self._names([f.name for f in folders], classes)
        self.files: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            files = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not files:
                raise DataError(f"image_folder: {str(folder)!r} holds no images ({', '.join(EXTENSIONS)})")
            self.files += files
            labels += [label] * len(files)
        self.labels = np.asarray(labels, np.int32)

    @staticmethod
    def _names(folders: list[str], classes: Any) -> tuple[str, ...]:
        if classes is None:
            return tuple(folders)
        if isinstance(classes, list | tuple):
            if len(classes) != len(folders):
                raise DataError(f"image_folder: {len(classes)} class names for {len(folders)} class directories")
            return tuple(classes)
        return tuple(choose(folder, classes, "image_folder: classes: directory") for folder in folders)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        file = self.files[index]
        # Here, not for all files at the start: network file systems take a while for each.
        check_regular(file, DataError)
        try:
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"{file}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
                # Grey, palette and alpha files too, so that all records have three channels.
                pixels = np.asarray(image.convert("RGB"))
        except DataError:
            raise
        # Of damaged files Pillow raises its own errors, those of its decoders, SyntaxError and more.
        except Exception as error:
            raise DataError(f"{file}: not a readable image: {error}") from error
        return {"image": pixels, "label": int(self.labels[index]), "file": os.path.basename(file)}

    def where(self, index: int) -> str:
        return self.files[index]

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return self.names if field == "label" else None

    def column(self, field: str) -> Sequence[Any]:
        return self.labels.tolist() if field == "label" else super().column(field)
