"""The mapping between jft parameters and the tensors of a Hugging Face checkpoint: a `Source` per leaf, a `Family` per type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


def identity(x: np.ndarray) -> np.ndarray:
    """The tensor as it is."""
    return x


def transposed(x: np.ndarray) -> np.ndarray:
    """``[out, in] -> [in, out]``: a torch ``Linear.weight`` as a jft ``w``."""
    return x.T


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor, or tensors, of one jft leaf in a Hugging Face checkpoint.

    name: tensor name; may hold ``{layer}`` and ``{expert}``, which run over the leaf's leading axes in that order.
    shape: shape of that one tensor (one layer, one expert).
    view: from the tensor to the leaf of that layer and expert. It must return a numpy *view*: reading slices it, so
        that only the bytes needed are read, and saving assigns through it. Several leaves may view parts of one tensor
        (a fused ``c_attn``); together they must cover it.
    aliases: other names, in order of preference, under which checkpoints carry it.
    out: final reshape from the view's shape to the leaf's, where the view has more axes than the leaf (a convolution
        ``[p, p, C, D]`` to ``[p * p * C, D]``). It must keep C order, as saving undoes it by reshaping back.
    other: the same leaf in another layout (experts fused into one tensor), read where ``name`` and its aliases are not
        there. Saving never writes it.
    """

    name: str
    shape: tuple[int, ...]
    view: Callable[[np.ndarray], np.ndarray] = identity
    aliases: tuple[str, ...] = ()
    out: Callable[[np.ndarray], np.ndarray] | None = None
    other: Source | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face ``model_type``.

    from_hf: ``config.json`` as a dict to the frozen jft config; ``ValueError`` naming a feature that is not supported.
    to_hf: the jft config to a ``config.json`` that transformers loads (with ``architectures`` and ``model_type``).
    table: every parameter path to its `Source`.
    ignored: regular expressions (``re.fullmatch``) of tensor names that hold no parameter of the jft model: buffers
        (``.*rotary_emb.inv_freq``), tied copies (``lm_head.weight``), heads of other tasks. Others are refused.
    classifier: the `Source` of ``classifier/w`` and ``classifier/b`` given (backbone config, classes); None: a plain
        ``classifier.weight``/``classifier.bias`` (or ``score.*``).
    classifier_architecture: the transformers class that a saved `Classifier` names; None: it cannot be saved as one.
    refine: the config again, once the names of all tensors are known: what ``config.json`` does not tell (a pooler that
        is there or not). None: ``from_hf`` says it all.
    """

    from_hf: Callable[[dict[str, Any]], Any]
    to_hf: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], dict[str, Source]]
    ignored: tuple[str, ...] = ()
    classifier: Callable[[Any, int], dict[str, Source]] | None = None
    classifier_architecture: str | None = None
    refine: Callable[[Any, frozenset[str]], Any] | None = None
