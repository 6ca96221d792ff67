"""Task arithmetic: weighted sums of task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft.delta import TaskVector

Vectors = Sequence[TaskVector] | Mapping[str, TaskVector]


def task_arithmetic(vectors: Vectors, weights: Any = None, scale: Any = 1.0) -> TaskVector:
    """``scale * sum_i weights[i] * vectors[i]``.

    weights: one number for all, or one per vector; None is 1. Addition is the plain sum with ``scale`` from
    :func:`jft.merge.addition_search`; forgetting a task is negation, ``-tau``, with :func:`jft.merge.negation_search`;
    an analogy "A is to B as C is to ?" is ``C + B - A``, weights ``[1, 1, -1]`` of ``[C, B, A]``. Computed in float32;
    every delta keeps its closest encoding. Ilharco et al. 2022, arXiv:2212.04089.

    Raises ``ValueError`` for no vectors, for weights that do not fit, and for vectors of different bases.
    """
    taus = listed(vectors)
    return TaskVector.combine(taus, [scale * w for w in weights_of(weights, len(taus))])


def average(vectors: Vectors, weights: Any = None) -> TaskVector:
    """``sum_i weights[i] * vectors[i] / sum(weights)``: the mean of the fine-tuned models, seen from the base.

    A uniform model soup, where ``weights`` is None. Wortsman et al. 2022, arXiv:2203.05482. Raises ``ValueError`` as
    :func:`task_arithmetic` does, and where the weights sum to zero.
    """
    taus = listed(vectors)
    coefficients = weights_of(weights, len(taus))
    total = sum(coefficients)
    if total == 0:
        raise ValueError(f"weights {coefficients} sum to zero: there is no average")
    return TaskVector.combine(taus, [w / total for w in coefficients])


def listed(vectors: Vectors) -> list[TaskVector]:
    """The vectors as a list; ``ValueError`` where there are none, or something else is among them."""
    if isinstance(vectors, TaskVector):
        raise ValueError("merging takes a list of task vectors, not one; [tau] is a list of one")
    taus = list(vectors.values() if isinstance(vectors, Mapping) else vectors)
    if not taus:
        raise ValueError("merging needs at least one task vector")
    for i, vector in enumerate(taus):
        if not isinstance(vector, TaskVector):
            raise ValueError(
                f"vectors[{i}] is a {type(vector).__name__}, not a TaskVector; load files with TaskVector.load"
            )
    return taus


def weights_of(value: Any, count: int, name: str = "weights", default: float = 1.0) -> list[Any]:
    """One number per vector from an option that may be None, one number, or one per vector.

    Numbers may be traced scalars (learned coefficients). Raises ``ValueError`` naming the option where the count differs.
    """
    if value is None:
        return [default] * count
    # np.ndim and np.shape take traced scalars as well.
    if np.ndim(value) == 0:
        return [value] * count
    if np.ndim(value) != 1 or len(value) != count:
        raise ValueError(f"{name} must be one number or one per vector ({count} of them), not shape {np.shape(value)}")
    return list(value)
