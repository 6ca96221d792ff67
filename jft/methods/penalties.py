"""Penalties on what a method trains: added to the loss once per batch, by ``Method(penalties=(...))``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jft import tree

Array = jax.Array


class Penalty(Protocol):
    """A scalar of everything that trains, its weight included: ``penalty(plan, kept, trained)``.

    One that draws says so by ``random = True``, and is given the step's key as well: ``penalty(plan, kept, trained, key)``.
    """

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Array: ...


def _changes(plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> list[Array]:
    return jax.tree.leaves(plan.change(kept, trained))


def _sum(terms: Iterable[Array]) -> Array:
    # float32(0): with nothing to add up the loss still gets an array.
    return sum(terms, jnp.float32(0))


def absolute(x: Array) -> Array:
    """``sum |x|`` with derivative 0 at 0, where JAX's own is 1 and would push every weight off the base."""
    # The sign is a constant to the derivative, which is then sign(x): 0 at 0.
    return jnp.sum(x * jnp.sign(jax.lax.stop_gradient(x)))


def _sized(total: Array, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any], mean: bool) -> Array:
    return total / plan.count(kept, trained) if mean else total


@dataclasses.dataclass(frozen=True)
class L1ToBase:
    """``weight * sum |theta - theta_0|`` over all trained values, or with ``mean`` their mean.

    of: what the mean is divided by, the number of ``trained`` values, or ``all`` parameters of the model, the frozen ones too:
    LT-SFT's ``|theta - theta_0| / N`` (Ansell et al. 2022, arXiv:2110.07560; its code's N). The derivative at no change is 0.
    """

    weight: float
    mean: bool = False
    of: Literal["trained", "all"] = "trained"

    def __post_init__(self) -> None:
        """Refuse a number of values that is not known, or that a sum is not divided by."""
        if self.of not in ("trained", "all"):
            raise ValueError(f"of {self.of!r} is unknown; choose trained or all")
        if self.of == "all" and not self.mean:
            raise ValueError("of='all' says what a mean is divided by, and mean is False; add mean=True")

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Array:
        total = _sum(map(absolute, _changes(plan, kept, trained)))
        if self.of == "all":
            return self.weight / plan.size(kept, trained) * total
        return self.weight * _sized(total, plan, kept, trained, self.mean)


@dataclasses.dataclass(frozen=True)
class L2SP:
    """``weight / 2 * sum (theta - theta_0)^2`` over all trained values, or with ``mean`` their mean: decay to the base.

    Weights whose path ``new`` finds (a new head) have no pretrained value: their term is ``new_weight / 2 * sum theta^2``. Li,
    Grandvalet and Davoine 2018, arXiv:1802.01483, whose alpha and beta are ``weight`` and ``new_weight``. Where decay should
    not pass through an adaptive optimizer, decouple it: the optimizer's decay toward the base.
    """

    weight: float
    mean: bool = False
    new: tuple[str, ...] = ()
    new_weight: float = 0.0

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Array:
        matches = tree.matcher(self.new)
        is_new = {p: bool(self.new) and matches(p) for p in trained}
        # The mean is over the old weights alone, as many as the first term sums.
        old = {p: t for p, t in trained.items() if not is_new[p]}
        away = _sum(jnp.sum(jnp.square(x)) for x in _changes(plan, kept, old))
        values = [plan.leaves[p].bind(kept[p], plan.values(trained, p), False) for p in trained if is_new[p]]
        to_zero = self.new_weight / 2 * _sum(jnp.sum(jnp.square(x)) for x in values)
        return self.weight / 2 * _sized(away, plan, kept, old, self.mean) + to_zero


@dataclasses.dataclass(frozen=True)
class Nuclear:
    """``weight * sum ||theta - theta_0||_*``, the sum of singular values of every matrix's change.

    From the Gram matrix of the shorter side, whose eigenvalues are the squares: ``||X||_* = sum sqrt(eig + eps)``, so that the
    derivative ``weight * X (X^T X + eps)^(-1/2)`` is finite where the change is singular, as at the start. eps is in squared
    units of the change. Where parts of a weight train, X is their change with zeros around it. Vectors have no part in it;
    where the change is no array like the weight, it is refused.
    """

    weight: float
    eps: float = 1e-8

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Array:
        total = jnp.float32(0)
        for path, change in plan.change(kept, trained).items():
            how = plan.leaves[path]
            # Selected parts come as a list of values; singular values need the matrix they lie in.
            if how.selects and isinstance(change, jax.Array):
                change = how.spread(kept[path], change, jnp.zeros(kept[path]["w"].shape, change.dtype))
            if not isinstance(change, jax.Array):
                raise ValueError(
                    f"{path} trains {type(plan.leaves[path]).__name__}, whose change is no matrix; no nuclear norm"
                )
            if change.ndim - tree.lead(path, change.ndim, plan.structured) == 2:
                total = total + jnp.sum(_nuclear(change, self.eps))
        return self.weight * total


def _nuclear(x: Array, eps: float) -> Array:
    # The Gram matrix of the shorter side costs less and has no zeros that are only padding.
    if x.shape[-1] > x.shape[-2]:
        x = jnp.swapaxes(x, -1, -2)
    # HIGHEST: squares lose half of the digits, and TPUs and GPUs multiply float32 in fewer bits by default.
    gram = jnp.einsum("...io,...ip->...op", x, x, precision=jax.lax.Precision.HIGHEST)
    # Rounding makes eigenvalues slightly negative.
    return jnp.sum(jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram), 0) + eps), axis=-1)
