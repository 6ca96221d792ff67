"""Where the head of a `Classifier` lives in a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

from jft.models.hf.mapping import Family, Source, transposed

KEY = "jft_classifier"
"""Where ``config.json`` notes pool and dense of a classifier, which transformers has no names for."""


def default_table(width: int, classes: int) -> dict[str, Source]:
    """A linear head as most of transformers' classes name it."""
    return {
        "classifier/w": Source("classifier.weight", (classes, width), transposed, ("score.weight",)),
        "classifier/b": Source("classifier.bias", (classes,), aliases=("score.bias",)),
        "classifier/dense/w": Source("classifier.dense.weight", (width, width), transposed, ("pre_classifier.weight",)),
        "classifier/dense/b": Source("classifier.dense.bias", (width,), aliases=("pre_classifier.bias",)),
    }


def table(family: Family, config: Any, paths: list[str]) -> dict[str, Source]:
    """The `Source` of each head path of a `Classifier` config: the family's own where it has one."""
    own = family.classifier(config.backbone, config.classes) if family.classifier else {}
    known = default_table(config.width, config.classes) | own
    return {path: known[path] for path in paths}


def is_head(path: str) -> bool:
    """Whether a parameter path belongs to the head that `Classifier` adds."""
    return path.startswith("classifier/")
