"""Task arithmetic: weighted sums of task vectors."""

from __future__ import annotations

from typing import Any

from jft.delta import TaskVector
from jft.merge.rule import Vectors, listed, weights_of


def task_arithmetic(vectors: Vectors, weights: Any = None, scale: Any = 1.0) -> TaskVector:
    """``scale * sum_i weights[i] * vectors[i]``.

    weights: one number for all, or one per vector; None is 1. Addition is the plain sum with ``scale`` from
    :func:`jft.merge.addition_search`; forgetting a task is negation, ``-tau``, with :func:`jft.merge.negation_search`;
    an analogy "A is to B as C is to ?" is ``C + B - A``, weights ``[1, 1, -1]`` of ``[C, B, A]``. Computed in float32;
    every delta keeps its closest encoding. Ilharco et al. 2022, arXiv:2212.04089.

    Of LoRAs it is the sum of their products, exactly, as one of the summed rank (peft's ``combination_type="cat"``), dense
    once that is smaller; :func:`jft.merge.compress` with ``"low_rank"`` gives it a small rank again ("svd"). Adding the
    factors ("linear") is another change and not offered.

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
