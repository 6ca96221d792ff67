"""Interpolation on spheres: weights or task vectors by their direction and their length."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft.merge.registry import register
from jft.merge.rule import Rule, Tensor, in_range

Array = jax.Array
Origin = Literal["base", "zero"]


@register(paper="Shoemake 1985, doi:10.1145/325334.325242", presets={"paper": {}, "mergekit": {}, "fusionbench": {}})
def slerp(*, t: float = 0.5, threshold: float = 0.9995, eps: float = 1e-8) -> Rule:
    """``sin((1 - t) w) / sin(w) * a + sin(t w) / sin(w) * b``, w the angle between the tensors a and b of two models.

    a, b: of one vector, the base and its model, as mergekit's ``slerp`` has it; of two, their models, as FusionBench's.
    Whole weights, so ``base=params`` is needed; the result is their change. threshold: beyond this magnitude of the cosine
    the interpolation is linear; eps: a tensor of a smaller norm counts as zero. The presets agree. Both extend Shoemake's
    interpolation of unit vectors to any length by the same two coefficients.
    """
    in_range("t", t, 0, 1)
    in_range("threshold", threshold, 0, 1)
    return Rule(
        merge=_slerp,
        options={"threshold": threshold, "eps": eps},
        parameters={"t": t},
        base=True,
        models=(1, 2),
        weighted=False,
    )


@register(paper="mergekit 0.1.5", presets={"mergekit": {}})
def nuslerp(*, origin: Origin = "base", axis: int | None = None) -> Rule:
    """:func:`slerp` of two models with ``t = weights[1] / sum(weights)``, of task vectors or of whole weights.

    origin: the centre of the sphere: the ``base`` (task vectors; mergekit with a ``base_model``) or ``zero`` (whole weights;
    ``base=params`` is needed). axis: None takes a tensor as one vector (``nuslerp_flatten``, mergekit's default); 0 a matrix
    ``[in, out]`` as one vector of inputs for each output; -1 as one vector of outputs for each input. On tensors as torch
    stores them, ``[out, in]``, -1 is mergekit's ``nuslerp_flatten: false`` and 0 its ``nuslerp_row_wise: true``. Weights
    that sum to less than 1e-6 count the same. Parallel vectors are interpolated linearly.
    """
    options = {"origin": origin, "axis": _axis(axis)}
    return Rule(merge=_nuslerp, options=options, base=origin == "zero", models=(2, 2))


@register(paper="mergekit 0.1.5, goddard.blog/posts/multislerp-wow-what-a-cool-idea", presets={"mergekit": {}})
def multislerp(*, origin: Origin = "base", normalize: bool = True, eps: float = 1e-8) -> Rule:
    """``sum_i w_i |x_i|`` in the direction of ``sum_i w_i x_i / |x_i|``: the mean of N tensors' directions and lengths apart.

    The post goes from the mean direction along the weighted mean of the directions in its tangent plane, which is zero there:
    what is added is rounding, and is left out. origin: the ``base`` (task vectors) or ``zero`` (whole weights), as in
    :func:`nuslerp`. normalize: weights by their sum, where that is not zero. eps: added to every norm; where the mean of
    directions is shorter, they cancel, and the mean is linear (mergekit refuses that of more than two models). One model is
    what it is.
    """
    return Rule(
        merge=_multislerp,
        options={"origin": origin, "normalize": normalize, "eps": eps},
        base=origin == "zero",
    )


@register(paper="Buss and Fillmore 2001, doi:10.1145/502122.502124", presets={"paper": {}, "mergekit": {"steps": 10}})
def karcher(*, steps: int = 100, tol: float = 1e-5, origin: Origin = "zero") -> Rule:
    """The point of the unit sphere whose squared angles to the N tensors' directions sum, weighted, to the least.

    From the direction of the weighted mean, at most ``steps`` times: the mean of the directions seen in the tangent plane,
    followed along the sphere, until it is shorter than ``tol``; then times the weighted mean of the norms. Tensors of a norm
    up to ``tol`` have no direction. mergekit stops after 10 steps; it counts all models the same. origin: as in
    :func:`nuslerp`; ``zero``, whole weights, is mergekit's. Weights are divided by their sum, where that is not zero. Buss
    and Fillmore 2001, *Spherical averages*; for merging arXiv:2603.04972.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    options = {"steps": steps, "tol": tol, "origin": origin}
    return Rule(merge=_karcher, options=options, base=origin == "zero")


@register(paper="huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", presets={"mergekit": {}})
def nearswap(*, t: float = 1e-4) -> Rule:
    """``min(1, t / |tau|) * tau``: the base goes over to the model entirely where they are nearer than ``t``.

    Elsewhere it moves towards it by ``t``. Differences below 1e-6 count as 1e-6. t >= 0.
    """
    in_range("t", t, 0, float("inf"))
    return Rule(merge=_nearswap, parameters={"t": t}, models=(1, 1), weighted=False)


@register(
    paper="Jang, Yun and Han 2024, arXiv:2403.19522",
    presets={
        "paper": {},
        "mergekit": {"floor": 1e-6},
        "fusionbench": {"mean": "angle", "eps": 1e-8},
    },
)
def model_stock(
    *,
    axis: int | None = None,
    mean: Literal["cosine", "angle"] = "cosine",
    floor: float = 0.0,
    eps: float = 0.0,
) -> Rule:
    """``t * mean_i(tau_i)`` for every tensor, ``t = N cos / (1 + (N - 1) cos)``, cos that of the angle between two vectors.

    The paper has one angle; of three models and more it is the mean over pairs, of the ``cosine`` (mergekit) or of the
    ``angle`` (FusionBench). axis: None for one ratio a tensor (the paper's layer-wise averaging), 0 for one each output of a
    matrix ``[in, out]``; -1 is mergekit's ``filter_wise`` on tensors ``[out, in]`` as torch stores them. floor, eps: the
    least product of two norms and what is added to it, which matter for tiny changes alone. Where the denominator is below
    1e-6 the base stays. Two models or more; without weights. Jang, Yun and Han 2024, arXiv:2403.19522.
    """
    options = {"axis": _axis(axis), "mean": mean, "floor": floor, "eps": eps}
    return Rule(merge=_model_stock, options=options, models=(2, None), weighted=False)


def _axis(axis: Any) -> Any:
    if axis not in (None, 0, -1):
        raise ValueError(f"axis must be None, 0 or -1, not {axis!r}")
    return axis


def _points(tensor: Tensor, origin: Origin) -> Array:
    """What is interpolated: ``[N, ...]``."""
    if origin == "base":
        return tensor.deltas
    assert tensor.base is not None, "whole weights need the base"
    return tensor.base + tensor.deltas


def _change(tensor: Tensor, point: Array, origin: Origin) -> Array:
    return point if origin == "base" or tensor.base is None else point - tensor.base


def _dot(a: Array, b: Array, axis: int | None = None) -> Array:
    """Inner products along an axis, or of all; it stays as an axis of one."""
    # A scalar has no axes.
    return jnp.sum(a * b, axis=None if a.ndim == 0 else axis, keepdims=True)


def _norm(a: Array, axis: int | None = None) -> Array:
    return jnp.sqrt(_dot(a, a, axis))


def _arc(a: Array, b: Array, t: Array, cosine: Array, straight: Array) -> Array:
    """Between two points at an angle; a chord where ``straight``."""
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    first = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    second = jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle))
    return first * a + second * b


def _slerp(tensor: Tensor, threshold: float, eps: float) -> Array:
    points = _points(tensor, "zero")
    assert tensor.base is not None
    a, b = (tensor.base, points[0]) if len(points) == 1 else (points[0], points[1])
    unit = lambda x: x / jnp.where(_norm(x) > eps, _norm(x), 1)
    cosine = jnp.clip(_dot(unit(a), unit(b)), -1, 1)
    return _arc(a, b, tensor.parameters["t"][0], cosine, jnp.abs(cosine) > threshold) - tensor.base


def _nuslerp(tensor: Tensor, origin: Origin, axis: int | None) -> Array:
    a, b = _points(tensor, origin)
    weights = tensor.parameters["weight"]
    total = jnp.sum(weights)
    none = jnp.abs(total) < 1e-6
    t = jnp.where(none, 0.5, weights[1] / jnp.where(none, 1, total))
    unit = lambda x: x / jnp.maximum(_norm(x, axis), 1e-7)
    cosine = jnp.clip(_dot(unit(a), unit(b), axis), -1, 1)
    return _change(tensor, _arc(a, b, t, cosine, 1 - cosine**2 <= 1e-16), origin)


def _multislerp(tensor: Tensor, origin: Origin, normalize: bool, eps: float) -> Array:
    points = _points(tensor, origin)
    if len(points) == 1:
        return _change(tensor, points[0], origin)
    weights = tensor.weighted()
    if normalize:
        weights = weights / _nonzero(jnp.sum(weights))
    norms = jax.vmap(_norm)(points)
    units = points / (norms + eps)
    mean = jnp.sum(weights * units, axis=0)
    length = _norm(mean)
    cancel = length < eps
    lengths = jnp.sum(weights * norms, axis=0)
    point = jnp.where(cancel, jnp.sum(weights * points, axis=0), mean / jnp.where(cancel, 1, length) * lengths)
    return _change(tensor, point, origin)


def _karcher(tensor: Tensor, steps: int, tol: float, origin: Origin) -> Array:
    points = _points(tensor, origin)
    weights = tensor.weighted()
    weights = weights / _nonzero(jnp.sum(weights))
    norms = jax.vmap(_norm)(points)
    valid = norms > tol
    units = jnp.where(valid, points / jnp.where(valid, norms, 1), 0)
    shares = jnp.where(valid, weights, 0)
    shares = shares / _nonzero(jnp.sum(shares))
    start = jnp.sum(shares * units, axis=0)
    # Where directions cancel, from the first of them.
    first = units[jnp.argmax(valid.reshape(len(points)))]
    start = jnp.where(_norm(start) < tol, first, start / jnp.where(_norm(start) < tol, 1, _norm(start)))

    def tangent(mean: Array) -> Array:
        """The weighted mean of the directions in the plane that touches the sphere at ``mean``."""
        cosine = jnp.clip(jax.vmap(lambda u: _dot(u, mean))(units), -1, 1)
        angle = jnp.arccos(cosine)
        near = (angle < tol) | ~valid
        rate = jnp.where(near, 0, angle / jnp.where(near, 1, jnp.sin(angle)))
        return jnp.sum(shares * rate * (units - cosine * mean), axis=0)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mean, move, count = carry
        length = jnp.sum(_norm(move))
        mean = jnp.cos(length) * mean + jnp.sin(length) * move / _nonzero(length)
        mean = mean / _nonzero(_norm(mean))
        return mean, tangent(mean), count + 1

    more = lambda carry: (jnp.sum(_norm(carry[1])) >= tol) & (carry[2] < steps)
    mean, _, _ = jax.lax.while_loop(more, step, (start, tangent(start), jnp.int32(0)))
    return _change(tensor, _without_gradient(jnp.sum(weights * norms, axis=0) * mean), origin)


@jax.custom_vjp
def _without_gradient(x: Array) -> Array:
    return x


def _refused(_: None, cotangent: Array) -> tuple[Array]:
    raise ValueError(
        "karcher has no gradient: it takes as many steps as it needs; learn the weights of multislerp, which goes to nearly "
        "the same point at once, or search those of karcher with coordinate_search"
    )


_without_gradient.defvjp(lambda x: (x, None), _refused)


def _nearswap(tensor: Tensor) -> Array:
    delta = tensor.deltas[0]
    return delta * jnp.clip(tensor.parameters["t"][0] / jnp.maximum(jnp.abs(delta), 1e-6), 0, 1)


def _model_stock(tensor: Tensor, axis: int | None, mean: str, floor: float, eps: float) -> Array:
    deltas = tensor.deltas
    count = len(deltas)
    norms = [_norm(x, axis) for x in deltas]
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            product = jnp.maximum(norms[i] * norms[j] + eps, floor)
            cosines.append(jnp.clip(_dot(deltas[i], deltas[j], axis) / _nonzero(product), -1, 1))
    stacked = jnp.stack(cosines)
    cosine = jnp.mean(stacked, axis=0) if mean == "cosine" else jnp.cos(jnp.mean(jnp.arccos(stacked), axis=0))
    denominator = 1 + (count - 1) * cosine + eps
    singular = jnp.abs(denominator) < 1e-6
    ratio = jnp.where(singular, 0, count * cosine / jnp.where(singular, 1, denominator))
    return ratio * jnp.mean(deltas, axis=0)


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)
