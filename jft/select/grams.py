"""Second moments of what products read and of the gradients of what they give: Gram matrices and Kronecker factors.

Read through :class:`jft.models.core.Hooks`, so they need one of jft's models. Padding does not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jft.dot import dot
from jft.models.core import Hooks
from jft.select.activations import hookable, real
from jft.select.calibration import Calibration

Array = jax.Array


def second_moment(x: Array) -> Array:
    """``[..., D, D]``, ``sum over rows of x_n^T x_n`` in float32 of ``x[..., N, D]``."""
    return jnp.einsum("...ni,...nj->...ij", x, x, precision="highest", preferred_element_type=jnp.float32)


def _rows(name: str, x: Array) -> Array:
    """``x`` with its tokens in one axis; experts ``[E, N, I]`` stay apart."""
    return x if "/experts/" in name and x.ndim == 3 else x.reshape(-1, x.shape[-1])


# A value rather than a closure: `sums` compiles one program for equal ones.
@dataclasses.dataclass(frozen=True)
class _Grams:
    """Sums over tokens of ``x^T x`` of the products ``names``, and the number of tokens."""

    model: Any
    names: frozenset[str]

    def __call__(self, params: Any, batch: Any) -> Any:
        def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
            return dot(x, w), _gram(name, x, batch) if name in self.names else None

        return self.model.apply(params, batch, Hooks(product=product))[1]


def _gram(name: str, x: Array, batch: Any) -> tuple[Array, Array]:
    keep = real(name, x.shape[:-1], batch)
    # Of experts the tokens are those of the layer, so that one that is hardly used counts little.
    tokens = jnp.sum(keep[0] if keep.ndim == 2 and "/experts/" in name else keep)
    # 0 or 1, so that it may stand on both sides of the square.
    return second_moment(_rows(name, x.astype(jnp.float32) * keep[..., None])), tokens


@dataclasses.dataclass(frozen=True)
class _Factors:
    """Sums of :class:`_Grams`, and of ``g^T g``, g the gradients of the objective in the outputs of the products."""

    model: Any
    objective: Any
    names: frozenset[str]

    def __call__(self, params: Any, batch: Any) -> Any:
        def loss(probes: Any) -> tuple[Array, Any]:
            def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
                y = dot(x, w)
                if name not in self.names:
                    return y, None
                return _identity(_rows(name, y), state).reshape(y.shape), _gram(name, x, batch)

            outputs, reads = self.model.apply(params, batch, Hooks(product=product, state=probes))
            return self.objective.loss(outputs, batch)[0], reads

        shapes = jax.eval_shape(self._widths, params, batch)
        probes = {name: jnp.zeros((*x.shape, x.shape[-1]), jnp.float32) for name, x in shapes.items()}
        # Of a probe the "gradient" is the second moment of the gradient in its product's outputs.
        moments, reads = jax.grad(loss, has_aux=True)(probes)
        return {name: (gram, moments[name], tokens) for name, (gram, tokens) in reads.items()}

    def _widths(self, params: Any, batch: Any) -> Any:
        """One row of outputs of each product, ``[L, O]`` or ``[L, E, O]``."""

        def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
            y = dot(x, w)
            return y, _rows(name, y)[..., 0, :] if name in self.names else None

        return self.model.apply(params, batch, Hooks(product=product))[1]


@jax.custom_vjp
def _identity(y: Array, probe: Array) -> Array:
    return y


def _forward(y: Array, probe: Array) -> tuple[Array, None]:
    return y, None


def _backward(_: None, dy: Array) -> tuple[Array, Array]:
    return dy, second_moment(dy.astype(jnp.float32))


_identity.defvjp(_forward, _backward)


def grams(calibration: Calibration, batches: int) -> dict[str, Array]:
    """``{path: mean over real tokens of x^T x}`` of the inputs x of the candidates' products, ``[..., I, I]``.

    The candidates are weights of products, ``.../w`` (``model.linear_paths()``). Of experts ``[L, E, I, I]``: sums over the
    tokens sent to each, divided by all tokens of the layer. Jin et al. 2023, arXiv:2212.09849, take the sum, their code and
    others the mean; with equal data for all models it is the same. Raises ``ValueError`` for a weight that is no product's.
    """
    names = _names(calibration.paths)
    sums = calibration.sums(_Grams(hookable(calibration), frozenset(names.values())), batches)
    _check(names, sums)
    return {path: _mean(*sums[name]) for path, name in names.items()}


def factors(calibration: Calibration, batches: int) -> dict[str, dict[str, Array]]:
    """``{path: {"inputs": [..., I, I], "outputs": [..., O, O]}}``: :func:`grams`, and the same of gradients in the outputs.

    The gradients are those of the objective's sum, at the targets of the data; means over real tokens. The Kronecker product
    of both approximates the Fisher information of a weight (K-FAC, Martens and Grosse 2015, arXiv:1503.05671), here the
    empirical one. Raises as :func:`grams`.
    """
    names = _names(calibration.paths)
    compute = _Factors(hookable(calibration), calibration.objective, frozenset(names.values()))
    sums = calibration.sums(compute, batches)
    _check(names, sums)
    return {
        path: {"inputs": _mean(sums[name][0], sums[name][2]), "outputs": _mean(sums[name][1], sums[name][2])}
        for path, name in names.items()
    }


def _names(paths: Iterable[str]) -> dict[str, str]:
    return {path: path.removesuffix("/w") for path in paths}


def _check(names: dict[str, str], sums: Any) -> None:
    missing = sorted(set(names.values()) - set(sums))
    if missing:
        raise ValueError(
            f"{missing[0]!r} is no product of the model, so it has no inputs; choose weights that end in /w"
        )


def _mean(total: Array, tokens: Array) -> Array:
    # Tokens are one number for each layer: `[L]`, or none outside stacks.
    tokens = tokens.reshape(*tokens.shape, *(1,) * (total.ndim - tokens.ndim))
    return total / jnp.maximum(tokens, 1.0)
