"""Compression of task vectors: fewer entries, fewer bits, or lower rank, each stored as what it is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.delta import Dense, Encoding, Entries, Product, Quantized, Signs, Sum, TaskVector, Ternary
from jft.delta import manifest as manifests
from jft.delta.encoding import standing_alone
from jft.delta.singular import svd, truncated
from jft.merge.in_memory import stack_axes
from jft.merge.rule import in_range
from jft.names import nearest
from jft.select import threshold

Array = jax.Array
Deltas = Mapping[str, Encoding]
Patterns = str | tuple[str, ...] | list[str]


def compress(
    tau: TaskVector, method: str, *, include: Patterns | None = None, seed: int = 0, **options: Any
) -> TaskVector:
    """``tau`` compressed by a method of :data:`METHODS`, in encodings that take as little as the method promises.

    The result is a task vector as any other: it adds, scales, applies and saves without being made dense. include: regular
    expressions of the paths to compress (``re.search``); None is all. Others stay as they are, and so do vectors and scalars
    where a method is one of matrices. Layers of a stack, and experts, are matrices of their own. seed: for random methods.

    ========== ================================================================================================
    compeft    :func:`compeft`: the largest entries as plus or minus one scale
    bitdelta   :func:`bitdelta`: the sign of every entry and one scale a matrix
    delta_come :func:`delta_come`: singular vectors of many bits for large singular values, of few for the others
    low_rank   :func:`low_rank`: truncated singular value decompositions
    magnitude  :func:`magnitude`: the largest entries
    random     :func:`random`: random entries
    quantize   :func:`quantize`: integers of few bits with a scale for each group
    ========== ================================================================================================

    Raises ``ValueError`` for a method or an option that does not exist, a value out of range, a pattern that matches nothing,
    and deltas that are relative to a base (``tau.resolve(base)`` first).
    """
    if method not in METHODS:
        raise ValueError(f"there is no compression {method!r}{nearest(method, METHODS, otherwise=f'; {_listed()}')}")
    function = METHODS[method]
    known = [name for name in inspect.signature(function).parameters if name not in ("deltas", "key")]
    for name in options:
        if name not in known:
            hint = nearest(name, known, otherwise=f"; it has {', '.join(known)}")
            raise ValueError(f"{method} has no option {name!r}{hint}")
    paths = tau.paths if include is None else tree.matching(tau.paths, tree.patterns(include), "include")
    for path in paths:
        try:
            standing_alone("compression", tau[path])
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
    results = function({path: tau[path] for path in paths}, key=jax.random.key(seed), **options)
    note = {"method": method, "seed": seed, "options": options, "include": include}
    manifest = manifests.derive([tau.manifest], "compress", compression=note)
    return TaskVector({path: results.get(path, delta) for path, delta in tau.items()}, manifest)


def compeft(
    deltas: Deltas, key: Array, density: float = 0.05, alpha: float | str = 1.0, scope: str = "model"
) -> dict[str, Encoding]:
    """``alpha * sigma(tau) * sign(tau)`` at the ``int(density * d)`` largest of ``d`` magnitudes, zero elsewhere.

    sigma: the standard deviation of all ``d`` entries, before any are dropped. alpha: a number, which the paper searches among
    0.5 to 10 on validation data (1 for large models), or ``"stc"`` for the mean magnitude of what stays, as in sparse ternary
    compression (Sattler et al. 2019, arXiv:1903.02891), in place of ``alpha * sigma``. scope: ``"model"``, one threshold and
    one scale for the whole vector (the paper), or ``"tensor"``, for each tensor its own. Of equal magnitudes the first stay;
    the released code keeps all of them and one more, and its "STC" averages what stays with its sign. Stored as positions and
    bits (:class:`jft.delta.Ternary`). Yadav et al. 2023, arXiv:2311.13171.
    """
    _check_density(density, scope)
    values = {path: delta.dense() for path, delta in deltas.items()}
    support = _largest(values, density, scope)
    if alpha == "stc":
        scales = _mean({path: jnp.where(support[path], jnp.abs(x), 0) for path, x in values.items()}, scope, support)
    elif isinstance(alpha, str) or not np.isfinite(alpha):
        raise ValueError(f"alpha must be a number or 'stc', not {alpha!r}")
    else:
        scales = {path: alpha * sigma for path, sigma in _deviation(values, scope).items()}
    return {path: _ternary(x, support[path], scales[path]) for path, x in values.items()}


def bitdelta(deltas: Deltas, key: Array, zero: str = "minus") -> dict[str, Encoding]:
    """``mean(|delta|) * sign(delta)`` of every matrix: the scale with the least squared error for these signs.

    zero: the sign of an entry that is zero, ``"minus"`` (the paper) or ``"plus"`` (the released code). The paper compresses
    the linear layers of transformer blocks (``include="layers/"``), and may train the scales afterwards, which this does not.
    Stored as a bit for each weight (:class:`jft.delta.Signs`). Liu et al. 2024, arXiv:2402.10193.
    """
    _one_of("zero", zero, ("minus", "plus"))
    results: dict[str, Encoding] = {}
    for path, delta in _matrices(deltas).items():
        x = delta.dense()
        scale = _mean({path: jnp.abs(x)}, "tensor")[path]
        results[path] = Signs.of(x > 0 if zero == "minus" else x >= 0, scale)
    return results


def delta_come(
    deltas: Deltas,
    key: Array,
    bits: int | tuple[int, ...] = (8, 3, 2),
    ranks: tuple[int, ...] = (2, 32),
    ratio: float = 1 / 16,
    group: int = 128,
) -> dict[str, Encoding]:
    """``sum_g Q_g(U_g) S_g Q_g(V_g)^T``: the singular vectors of every matrix in groups, with fewer bits for smaller values.

    Group g has ``ranks[g]`` pairs of vectors of ``bits[g]`` bits; the last, which ``ranks`` leaves out, has as many as make the
    whole ``ratio`` of the delta in 16 bits, and the others are dropped. A small matrix may have fewer groups. Q rounds to the
    nearest of the symmetric levels of :class:`jft.delta.Quantized`, with a scale for every ``group`` entries of a vector that
    minimises the squared error; the paper's rounds with GPTQ and calibration data. S enters the scales. Stored as a sum of
    :class:`jft.delta.Product`. Ping et al. 2024, arXiv:2406.08903.
    """
    bits = (bits,) if isinstance(bits, int) else tuple(bits)
    if len(ranks) != len(bits) - 1 or any(r < 1 for r in ranks):
        raise ValueError(f"ranks must be positive, one for each of bits {bits} but the last, not {ranks}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, not {ratio:g}")
    results: dict[str, Encoding] = {}
    for path, delta in _matrices(deltas).items():
        sizes = _group_ranks(delta.shape[-2:], bits, ranks, ratio)
        u, s, vt = svd(delta, rank=sum(sizes))
        parts, start = [], 0
        for b, size in zip(bits, sizes, strict=False):
            at = slice(start, start + size)
            left = Quantized.of(u[..., at], b, group, axis=-2, search=True)
            right = Quantized.of(vt[..., at, :], b, group, search=True)
            parts.append(Product(left, right.scaled_along(s[..., at])))
            start += size
        results[path] = parts[0] if len(parts) == 1 else Sum(tuple(parts))
    return results


def low_rank(deltas: Deltas, key: Array, rank: int | None = None, energy: float | None = None) -> dict[str, Encoding]:
    """The nearest matrix of ``rank``, or of the least rank with ``energy`` of the squared singular values, for every matrix.

    A dense delta becomes a LoRA; the sum of several LoRAs becomes one of smaller rank without its product being formed
    (peft's ``add_weighted_adapter`` of ``combination_type="svd"``). See :func:`jft.delta.singular.svd`.
    """
    return {path: truncated(delta, rank, energy) for path, delta in _matrices(deltas).items()}


def magnitude(
    deltas: Deltas, key: Array, density: float = 0.1, scope: str = "tensor", rescale: str = "none"
) -> dict[str, Encoding]:
    """The ``int(density * n)`` entries of the largest magnitude, of each tensor or (``scope="model"``) of the whole vector.

    rescale: multiply what stays by ``1 / density`` (``"density"``), or so that the ``"l1"`` or ``"l2"`` norm is what it was, of
    each tensor or of the whole; ``"none"``. Of equal magnitudes the first stay.
    """
    _check_density(density, scope)
    values = {path: delta.dense() for path, delta in deltas.items()}
    return _pruned(values, _largest(values, density, scope), density, scope, rescale)


def random(deltas: Deltas, key: Array, density: float = 0.1, rescale: str = "density") -> dict[str, Encoding]:
    """Each entry stays with probability ``density``, drawn by the seed and the path alone.

    rescale: as in :func:`magnitude`; with ``1 / density`` the expectation is the delta (DARE, Yu et al. 2023,
    arXiv:2311.03099).
    """
    _check_density(density, "tensor")
    values = {path: delta.dense() for path, delta in deltas.items()}
    support = {path: jax.random.bernoulli(tree.key_for(key, path), density, x.shape) for path, x in values.items()}
    return _pruned(values, support, density, "tensor", rescale)


def quantize(
    deltas: Deltas, key: Array, bits: int = 8, group: int | None = 128, search: bool = False
) -> dict[str, Encoding]:
    """Integers of ``bits`` bits, 2 to 8, with one symmetric scale for every ``group`` entries of a row (None: a whole row).

    search: the scale of each group that minimises the squared error, in place of that of its largest magnitude. See
    :class:`jft.delta.Quantized`. Scalars stay as they are.
    """
    many = {path: delta for path, delta in deltas.items() if delta.shape}
    return {path: Quantized.of(delta.dense(), bits, group, search=search) for path, delta in many.items()}


METHODS: dict[str, Callable[..., dict[str, Encoding]]] = {
    f.__name__: f for f in (compeft, bitdelta, delta_come, low_rank, magnitude, random, quantize)
}


def _matrices(deltas: Deltas) -> dict[str, Encoding]:
    return {path: x for path, x in deltas.items() if len(x.shape) - stack_axes(path, len(x.shape)) >= 2}


def _group_ranks(shape: tuple[int, ...], bits: tuple[int, ...], ranks: tuple[int, ...], ratio: float) -> list[int]:
    """The numbers of singular vectors of the groups, those without any left out; at least one vector."""
    budget = ratio * 16 * math.prod(shape) / sum(shape)  # bits of a pair of vectors, by entry
    left, sizes = min(shape), []
    for b, most in zip(bits, (*ranks, left), strict=True):
        size = min(most, left, int(budget / b))
        budget, left = budget - b * size, left - size
        sizes.append(size)
        # A group that the budget cuts short is the last.
        if size < most:
            break
    return [max(1, sizes[0]), *(size for size in sizes[1:] if size)]


def _largest(values: Mapping[str, Array], density: float, scope: str) -> dict[str, Array]:
    """Bool masks of the ``int(density * n)`` largest magnitudes of each tensor or of all."""
    magnitudes = {path: jnp.abs(x) for path, x in values.items()}
    if scope == "model":
        return threshold.top(magnitudes, int(density * sum(tree.size(x) for x in values.values())))
    masks = {}
    for path, x in magnitudes.items():
        stack = stack_axes(path, x.ndim)
        masks[path] = threshold.top_each(x, int(density * math.prod(x.shape[stack:])), stack)
    return masks


def _ternary(x: Array, support: Array, scale: Array) -> Encoding:
    # A scalar has no position to store.
    return Ternary.of(x, support, scale) if scale.ndim < x.ndim else Dense(jnp.where(support, scale * jnp.sign(x), 0))


def _pruned(
    values: Mapping[str, Array], support: Mapping[str, Array], density: float, scope: str, rescale: str
) -> dict[str, Encoding]:
    _one_of("rescale", rescale, ("none", "density", "l1", "l2"))
    results: dict[str, Encoding] = {}
    kept = {path: jnp.where(support[path], x, 0) for path, x in values.items()}
    if rescale in ("l1", "l2"):
        norm = (lambda x: jnp.abs(x)) if rescale == "l1" else jnp.square
        before, after = (_sum({p: norm(x) for p, x in xs.items()}, scope) for xs in (values, kept))
        # Of a tensor of which nothing stays nothing can be rescaled.
        ratio = {p: jnp.where(after[p] > 0, before[p] / jnp.where(after[p] > 0, after[p], 1), 1) for p in values}
        factors = {p: x if rescale == "l1" else jnp.sqrt(x) for p, x in ratio.items()}
    else:
        factors = dict.fromkeys(values, jnp.float32(1 / density if rescale == "density" and density else 1))
    for path, x in kept.items():
        y = x * _expanded(factors[path], x)
        results[path] = Entries.from_dense(y) if y.ndim else Dense(y)
    return results


def _sum(values: Mapping[str, Array], scope: str) -> dict[str, Array]:
    """The sum of each tensor ``[*stack]``, or for scope "model" of all, as one scalar for every path."""
    sums = {path: jnp.sum(x, axis=tuple(range(stack_axes(path, x.ndim), x.ndim))) for path, x in values.items()}
    if scope == "tensor":
        return sums
    return dict.fromkeys(sums, jnp.float32(sum(float(jnp.sum(x)) for x in sums.values())))


def _mean(
    values: Mapping[str, Array], scope: str, support: Mapping[str, Array] | None = None, less: int = 0
) -> dict[str, Array]:
    """The sum divided by the number of entries, or of those of ``support``, minus ``less``; of none it is 0."""
    ones = {p: jnp.ones_like(x) if support is None else support[p].astype(jnp.float32) for p, x in values.items()}
    totals, counts = _sum(values, scope), _sum(ones, scope)
    return {path: totals[path] / jnp.maximum(counts[path] - less, 1) for path in values}


def _deviation(values: Mapping[str, Array], scope: str) -> dict[str, Array]:
    """The standard deviation with Bessel's correction, as torch has it."""
    mean = _mean(values, scope)
    squares = {path: (x - _expanded(mean[path], x)) ** 2 for path, x in values.items()}
    return {path: jnp.sqrt(x) for path, x in _mean(squares, scope, less=1).items()}


def _expanded(x: Array, like: Array) -> Array:
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim))


def _check_density(density: float, scope: str) -> None:
    in_range("density", density, 0, 1)
    _one_of("scope", scope, ("model", "tensor"))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _listed() -> str:
    return f"those there are: {', '.join(METHODS)}"
