"""Weighted sums of task vectors: task arithmetic, averages, and interpolation and extrapolation along one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range

Array = jax.Array
Values = Mapping[str, Sequence[Any]]


@register(paper="Ilharco et al. 2022, arXiv:2212.04089", presets={"paper": {}, "mergekit": {}, "fusionbench": {}})
def task_arithmetic(*, normalize: bool = False) -> Rule:
    """``scale * sum_i weights[i] * vectors[i]``.

    weights: one number for all, or one per vector; None is 1. Addition is the plain sum with ``scale`` from
    :func:`jft.merge.addition_search`; forgetting a task is negation, ``-tau``, with :func:`jft.merge.negation_search`;
    an analogy "A is to B as C is to ?" is ``C + B - A``, weights ``[1, 1, -1]`` of ``[C, B, A]``. Computed in float32;
    every delta keeps its closest encoding. Ilharco et al. 2022, arXiv:2212.04089. normalize: divide by the sum of the
    weights, unless it is below 1e-8 (an option of mergekit's, off there too); the presets agree.

    Of LoRAs it is the sum of their products, exactly, as one of the summed rank (peft's ``combination_type="cat"``), dense
    once that is smaller; :func:`jft.merge.compress` with ``"low_rank"`` gives it a small rank again ("svd"). Adding the
    factors ("linear") is another change and not offered.

    Raises ``ValueError`` for no vectors, for weights that do not fit, and for vectors of different bases.
    """
    return _sum(_normalized if normalize else _weights)


@register(paper="Wortsman et al. 2022, arXiv:2203.05482")
def average() -> Rule:
    """``sum_i weights[i] * vectors[i] / sum(weights)``: the mean of the fine-tuned models, seen from the base.

    The uniform model soup, where ``weights`` is None. Wortsman et al. 2022, arXiv:2203.05482. Raises ``ValueError`` as
    :func:`task_arithmetic` does, and where the weights sum to zero.
    """
    return _sum(_mean)


@register(paper="Wortsman et al. 2022, arXiv:2203.05482", presets={"paper": {}, "mergekit": {}, "fusionbench": {}})
def linear(*, normalize: bool = True) -> Rule:
    """``sum_i weights[i] * (base + vectors[i])``, by default divided by ``sum(weights)``: a sum of whole models.

    Normalised it is :func:`average`. Otherwise the base has a coefficient too, ``sum(weights) - 1``: every weight of it
    changes, and ``base=params`` is needed. mergekit's ``linear`` and FusionBench's weighted average. Raises ``ValueError``
    where weights to be normalised sum to zero (there mergekit divides by zero).
    """
    return _sum(_mean) if normalize else _sum(_whole_models, base=True)


@register(paper="Wortsman et al. 2021, arXiv:2109.01903")
def wise_ft(*, alpha: float = 0.5) -> Rule:
    """``(1 - alpha) * base + alpha * tuned``, which is ``alpha * tau``: between a base and one model tuned from it.

    alpha in [0, 1]; 0.5 is what the paper recommends without a search. Wortsman et al. 2021, arXiv:2109.01903.
    """
    in_range("alpha", alpha, 0, 1)
    return _sum(_along, {"factor": alpha}, models=(1, 1))


@register(paper="Zheng et al. 2024, arXiv:2404.16792", presets={"paper": {}, "fusionbench": {}})
def expo(*, alpha: float = 0.1) -> Rule:
    """``theta_1 + alpha * (theta_1 - theta_0)``, which is ``(1 + alpha) * tau``: extrapolation beyond an aligned model.

    theta_0 is the model before alignment (SFT), which is the base of the vector, theta_1 the one after it. Of several
    aligned models the mean is extrapolated, as FusionBench does; its ``alpha`` is the default here, the paper searches one.
    ExPO: Zheng et al. 2024, arXiv:2404.16792. Raises ``ValueError`` for a negative ``alpha``, which is interpolation.
    """
    in_range("alpha", alpha, 0, float("inf"))
    return _sum(_along, {"factor": 1 + alpha})


@register(paper="Stojanovski et al. 2022, arXiv:2211.03186")
def momentum_interpolation(*, momentum: Any = 0.9) -> Rule:
    """``slow <- momentum * slow + (1 - momentum) * fast`` over checkpoints in their order, beginning at the base.

    vectors: the fast weights of a run at set intervals, oldest first; the result is the slow weights, a moving average in
    which checkpoint t of T counts ``(1 - momentum) * momentum**(T - t)``. momentum in [0, 1], one number or one per
    checkpoint; the paper searches it. Stojanovski et al. 2022, arXiv:2211.03186.
    """
    in_range("momentum", momentum, 0, 1)
    return _sum(_moving_average, {"momentum": momentum})


@register(paper="mergekit 0.1.5", presets={"mergekit": {}})
def passthrough(*, factor: float | None = None) -> Rule:
    """``factor * (base + tau)``: one model, all of its weights multiplied; None leaves it as it is.

    With a factor, mergekit's ``scale``, the base has the coefficient ``factor - 1``: every weight of it changes, and
    ``base=params`` is needed.
    """
    if factor is None:
        return _sum(_weights, models=(1, 1))
    return _sum(_scaled_model, {"factor": factor}, base=True, models=(1, 1))


def _sum(
    coefficients: Callable[[Values], list[Any]],
    parameters: Mapping[str, Any] | None = None,
    base: bool = False,
    models: tuple[int, int | None] = (1, None),
) -> Rule:
    return Rule(
        merge=_summed,
        # As an option too, for those who merge tensor by tensor.
        options={"coefficients": coefficients},
        parameters=parameters or {},
        coefficients=coefficients,
        base=base,
        models=models,
    )


def _summed(tensor: Tensor, coefficients: Callable[[Values], list[Any]]) -> Array:
    c = coefficients({name: list(values) for name, values in tensor.parameters.items()})
    terms = list(tensor.deltas) if tensor.base is None else [*tensor.deltas, tensor.base]
    return sum((x * y for x, y in zip(c, terms, strict=True)), jnp.zeros_like(terms[0]))


def _weights(values: Values) -> list[Any]:
    return list(values["weight"])


def _normalized(values: Values) -> list[Any]:
    total = sum(values["weight"])
    divisor = jnp.where(abs(total) < 1e-8, 1, total) if _traced(total) else 1 if abs(total) < 1e-8 else total
    return [w / divisor for w in values["weight"]]


def _mean(values: Values) -> list[Any]:
    total = sum(values["weight"])
    # Whether a traced sum is zero is not known.
    if not _traced(total) and total == 0:
        raise ValueError(f"weights {list(values['weight'])} sum to zero: there is no average")
    return [w / total for w in values["weight"]]


def _whole_models(values: Values) -> list[Any]:
    return [*values["weight"], sum(values["weight"]) - 1]


def _along(values: Values) -> list[Any]:
    """The mean times a factor."""
    return [f * w / len(values["weight"]) for f, w in zip(values["factor"], values["weight"], strict=True)]


def _moving_average(values: Values) -> list[Any]:
    coefficients: list[Any] = []
    for momentum, weight in zip(values["momentum"], values["weight"], strict=True):
        coefficients = [momentum * c for c in coefficients] + [(1 - momentum) * weight]
    return coefficients


def _scaled_model(values: Values) -> list[Any]:
    (factor,), (weight,) = values["factor"], values["weight"]
    return [factor * weight, factor - 1]


def _traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)
