"""Hugging Face `datasets` as a source (optional: ``pip install 'jft[hf]'``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jft.data.errors import DataError, shorten
from jft.data.source import Source


def _plain(value: Any) -> Any:
    """PIL images as uint8 arrays; everything else as it is."""
    # By its methods: without images Pillow need not be there.
    return np.asarray(value.convert("RGB")) if hasattr(value, "convert") and hasattr(value, "getbbox") else value


class HuggingFace(Source):
    """``datasets.load_dataset(name, config, split=split, ...)``, or ``load_from_disk(directory)``.

    revision, data_files: as in ``load_dataset``. Raises :class:`DataError` where `datasets` is not installed (naming the
    extra), where it cannot load the set, or where the set has splits and none was named.
    """

    def __init__(
        self,
        name: str | None = None,
        split: str = "train",
        config: str | None = None,
        directory: str | None = None,
        revision: str | None = None,
        data_files: Any = None,
    ):
        try:
            import datasets
        except ImportError:
            raise DataError("source 'hf' needs the datasets library: pip install 'jft[hf]'") from None
        if (name is None) == (directory is None):
            raise DataError("hf: give either name (a hub id, or a format as 'parquet') or directory (of save_to_disk)")
        if directory is not None and not os.path.isdir(directory):
            raise DataError(f"hf: {directory!r} is not a directory")
        self.name = f"hf {name or directory} ({split})"
        try:
            if directory is not None:
                data = datasets.load_from_disk(directory)
            else:
                data = datasets.load_dataset(name, config, split=split, revision=revision, data_files=data_files)
        except Exception as error:  # the library raises many kinds, its own and those of the network
            raise DataError(
                f"{self.name}: cannot be loaded: {type(error).__name__}: {shorten(str(error), 300)}"
            ) from error
        # load_from_disk returns every split that was saved.
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise DataError(f"{self.name}: no split {split!r}; it has {', '.join(data)}")
            data = data[split]
        if len(data) == 0:
            raise DataError(f"{self.name}: the split holds no examples")
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {k: _plain(v) for k, v in self.data[index].items()}

    def class_names(self, field: str) -> tuple[str, ...] | None:
        names = getattr(self.data.features.get(field), "names", None)
        return None if names is None else tuple(names)

    def column(self, field: str) -> Sequence[Any]:
        return list(self.data[field]) if field in self.data.column_names else super().column(field)
