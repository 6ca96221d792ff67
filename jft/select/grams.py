"""Second moments of what products read and of the gradients of what they give: Gram matrices and Kronecker factors.

Read through :class:`jft.models.core.Hooks`, so they need one of jft's models. Padding does not count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft.dot import dot
from jft.models.core import Hooks
from jft.select.activations import fingerprint, hookable, real, rows
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
        pass_ = functools.partial(_tapped, self.model, self.names, params, batch)

        def loss(probes: Any) -> tuple[Array, Any]:
            outputs, reads = pass_(probes)
            return self.objective.loss(outputs, batch)[0], reads

        # Of a probe the "gradient" is the second moment of the gradient in its product's outputs.
        moments, reads = jax.grad(loss, has_aux=True)(_probes(self.model, self.names, params, batch))
        return {name: (gram, moments[name], tokens) for name, (gram, tokens) in reads.items()}


@dataclasses.dataclass(frozen=True)
class _JacobianFactors:
    """Sums of the Gram of inputs with a 1 appended, and of ``g^T g``, g the gradients of ``v^T f``; tokens and examples.

    draws: of v, standard normal, whose mean is taken; 0: all unit vectors in its place, whose sum is.
    """

    model: Any
    names: frozenset[str]
    draws: int
    site: str | None

    def __call__(self, params: Any, batch: Any, key: Array) -> Any:
        pass_ = functools.partial(_tapped, self.model, self.names, params, batch, site=self.site, bias=True)
        outputs, pull, reads = jax.vjp(pass_, _probes(self.model, self.names, params, batch), has_aux=True)
        counts = real("", outputs.shape[:-1], batch)[..., None]
        # ``sums`` passes every batch the same key.
        key = jax.random.fold_in(key, fingerprint(batch))
        size = math.prod(outputs.shape[1:])

        def along(index: Array) -> Any:
            if self.draws:
                v = jax.random.normal(jax.random.fold_in(key, index), outputs.shape) / math.sqrt(self.draws)
            else:
                v = jnp.broadcast_to(jax.nn.one_hot(index, size).reshape(outputs.shape[1:]), outputs.shape)
            return pull((v * counts).astype(outputs.dtype))[0]

        add = lambda total, index: (jax.tree.map(jnp.add, total, along(index)), None)
        zeros = jax.tree.map(jnp.zeros_like, _probes(self.model, self.names, params, batch))
        moments = jax.lax.scan(add, zeros, jnp.arange(self.draws or size))[0]
        return {n: (gram, moments[n], tokens, jnp.sum(rows(batch))) for n, (gram, tokens) in reads.items()}


def _tapped(
    model: Any, names: frozenset[str], params: Any, batch: Any, probes: Any, site: str | None = None, bias: bool = False
) -> tuple[Array, Any]:
    """Outputs (or the value at ``site``) whose derivative in probes is a second moment, and the Grams of what is read."""

    def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
        y = dot(x, w)
        if name not in names:
            return y, None
        # The input of a bias is 1.
        read = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1) if bias else x
        return _identity(_rows(name, y), state).reshape(y.shape), _gram(name, read, batch)

    def value(name: str, h: Array, state: Any) -> tuple[Array, Any]:
        return h, h if name == site else None

    hooks = Hooks(product=product, state=probes) if site is None else Hooks(product, value, probes)
    outputs, reads = model.apply(params, batch, hooks)
    if site is None:
        return outputs, reads
    if site not in reads:
        raise ValueError(f"the model has no site {site!r}")
    return reads[site], {name: x for name, x in reads.items() if name in names}


def _probes(model: Any, names: frozenset[str], params: Any, batch: Any) -> dict[str, Array]:
    """Zeros ``[..., O, O]`` for each product."""

    def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
        y = dot(x, w)
        return y, _rows(name, y)[..., 0, :] if name in names else None

    shapes = jax.eval_shape(lambda p, b: model.apply(p, b, Hooks(product=product))[1], params, batch)
    return {name: jnp.zeros((*x.shape, x.shape[-1]), jnp.float32) for name, x in shapes.items()}


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


def jacobian_factors(
    calibration: Calibration,
    batches: int,
    draws: int = 1,
    site: str | None = None,
    tokens: Literal["mean", "sum"] = "mean",
) -> tuple[dict[str, dict[str, Array]], float]:
    """``({path: {"inputs": [..., I + 1, I + 1], "outputs": [..., O, O]}}, examples)`` of the Jacobian's Gram ``E J^T J``.

    inputs: mean over real tokens of ``(x, 1)^T (x, 1)``, the 1 being the input of the bias. outputs: of ``g^T g`` the mean over
    tokens, as TAK's code has it, or with tokens ``sum`` the sum over those of an example, whose product is K-FAC's own; g the
    gradient of ``v^T f`` in the product's outputs, f the outputs of the model or its value at ``site``, and v standard normal,
    ``draws`` of each batch; ``draws=0`` sums over all unit vectors: exact, one backward pass for each output of an example.
    The Kronecker product is exact for one linear layer of one token (K-FAC, Martens and Grosse 2015, arXiv:1503.05671; of
    tokens "expand", Eschenhagen et al. 2023, arXiv:2311.00636).

    Raises as :func:`grams`, and for a negative number of draws or unknown ``tokens``.
    """
    if tokens not in ("mean", "sum"):
        raise ValueError(f"tokens is {tokens!r}; choose mean or sum")
    if draws < 0:
        raise ValueError(f"draws is {draws}; give how many vectors are drawn, or 0 for the exact sum")
    names = _names(calibration.paths)
    compute = _JacobianFactors(hookable(calibration), frozenset(names.values()), draws, site)
    sums = calibration.sums(compute, batches, calibration.key)
    _check(names, sums)
    examples = float(jnp.ravel(next(iter(sums.values()))[3])[0])
    out = {}
    for path, name in names.items():
        inputs, outputs, count, _ = sums[name]
        outputs = _mean(outputs, count) if tokens == "mean" else outputs / max(examples, 1.0)
        out[path] = {"inputs": _mean(inputs, count), "outputs": outputs}
    return out, examples


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
