"""Tensor names of the head of a `Classifier` in a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

from jft.models.hf.mapping import Family, Source, transposed

KEY = "jft_classifier"
"""The entry of ``config.json`` with pool and dense of a classifier, for which transformers has no names."""


CAUSAL = ("ForCausalLM", "LMHeadModel")


def default_table(family: Family, config: Any) -> dict[str, Source]:
    """A linear head as most of transformers' classes name it: ``score`` on a decoder, ``classifier`` on others."""
    first, second = ("score", "classifier") if _causal(family, config.backbone) else ("classifier", "score")
    width, classes = config.width, config.classes
    return {
        "classifier/w": Source(f"{first}.weight", (classes, width), transposed, (f"{second}.weight",)),
        "classifier/b": Source(f"{first}.bias", (classes,), aliases=(f"{second}.bias",)),
        "classifier/dense/w": Source("classifier.dense.weight", (width, width), transposed, ("pre_classifier.weight",)),
        "classifier/dense/b": Source("classifier.dense.bias", (width,), aliases=("pre_classifier.bias",)),
    }


def table(family: Family, config: Any, paths: list[str]) -> dict[str, Source]:
    """The `Source` of each head path of a `Classifier` config: the family's own where it has one."""
    of_family = family.classifier(config.backbone, config.classes) if family.classifier else {}
    known = default_table(family, config) | of_family
    return {path: known[path] for path in paths}


def architecture(family: Family, config: Any) -> str | None:
    """The transformers class whose sequence classification this `Classifier` is; None where there is none."""
    defaults = getattr(config.backbone, "head_defaults", lambda: ("last", "none"))()
    # With another pooling the class would load the weights and compute something else.
    if (config.pool, config.dense) != defaults:
        return None
    if family.classifier_architecture is not None:
        return family.classifier_architecture
    causal = _causal(family, config.backbone)
    return (
        causal.removesuffix(next(c for c in CAUSAL if causal.endswith(c))) + "ForSequenceClassification"
        if causal
        else None
    )


def _causal(family: Family, backbone: Any) -> str | None:
    """The causal language model class that a backbone is saved as, if it is one."""
    architectures = family.to_hf(backbone).get("architectures") or [""]
    return architectures[0] if architectures[0].endswith(CAUSAL) else None


def is_head(path: str) -> bool:
    """Whether a parameter path belongs to the head that `Classifier` adds."""
    return path.startswith("classifier/")
