"""Scores of the importance of each weight, by the measures of the literature.

A score is a frozen, hashable value; called with a :class:`jft.select.calibration.Calibration` it gives ``{path: float32
array}``, shaped and sharded like the candidate weights. Larger is more important; :class:`Negated` turns that round.
Notation: w a weight, g the gradient of the step's loss in it, theta0 the base.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jft import delta, tree
from jft.compiled import program_cache
from jft.select.activations import squared_inputs
from jft.select.calibration import Calibration, Per
from jft.select.low_rank import low_rank

Array = jax.Array
Scores = dict[str, Array]


class Score(Protocol):
    """A hashable value that scores every candidate weight."""

    def __call__(self, calibration: Calibration) -> Scores: ...


# By function and constants: weights of one shape share a program, and so do calls.
@program_cache(maxsize=64)
def _compiled(function: Callable, *static: Any) -> Callable:
    return jax.jit(functools.partial(function, *static))


def _each(function: Callable, *values: Mapping[str, Array]) -> Scores:
    """``{path: function(value, ...)}`` in float32, each leaf one compiled program, sharded as the first value is."""
    # Named functions and cached makers alone: a lambda made here would be compiled at each call.
    run = _compiled(_float32, function)
    return {p: run(*(v[p] for v in values)) for p in values[0]}


def _float32(function: Callable, *values: Array) -> Array:
    return function(*(v.astype(jnp.float32) for v in values))


def _candidates(calibration: Calibration) -> Scores:
    return {p: calibration.params[p] for p in calibration.paths}


def _distance(a: Array, b: Array) -> Array:
    return jnp.abs(a - b)


def _size_of_product(a: Array, b: Array) -> Array:
    return jnp.abs(a * b)


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """``|w|``: large weights matter (Han et al. 2015, arXiv:1506.02626); the smallest are free to change under SaRA."""

    def __call__(self, calibration: Calibration) -> Scores:
        return _each(jnp.abs, _candidates(calibration))


@dataclasses.dataclass(frozen=True)
class Gradient:
    """``|mean over batches of g|`` (SIFT, Song et al. 2023, arXiv:2312.11875, one batch; GMT, arXiv:2406.15330)."""

    batches: int = 1

    def __call__(self, calibration: Calibration) -> Scores:
        return _each(jnp.abs, calibration.gradient(self.batches))


@dataclasses.dataclass(frozen=True)
class Accumulated:
    """``|sum over batches of g|`` at the base (SPIDER, Huang et al. 2024, arXiv:2411.10928): n times :class:`Gradient`.

    Its code sums while it trains; here the weights do not move. The order is that of :class:`Gradient`; the size matters
    where scores are added.
    """

    batches: int = 1

    def __call__(self, calibration: Calibration) -> Scores:
        return _each(_scaled_magnitude(self.batches), calibration.gradient(self.batches))


@program_cache
def _scaled_magnitude(factor: float) -> Callable[[Array], Array]:
    # Cached by its factor, so that equal scores have one function and one program.
    return lambda g: factor * jnp.abs(g)


@dataclasses.dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information, ``mean over count draws of |g|^power`` (FISH Mask, Sung et al. 2021, arXiv:2111.09839).

    per: ``example``, the empirical one over ``count`` examples, exact, at the cost of a gradient for each; ``batch``, over
    ``count`` batches, whose gradients are means: cheaper, and another quantity; ``sampled``, targets drawn from the model's
    prediction: the true one. power 1 is FISH's ``label-absolute``, the default of its code, 2 its ``label-square``, the
    paper. tokens: ``mean`` weighs every example equally, as those codes do; ``sum`` is the information in whole targets.
    """

    count: int = 1024
    per: Per = "example"
    power: int = 2
    tokens: Literal["mean", "sum"] = "mean"

    def __call__(self, calibration: Calibration) -> Scores:
        return calibration.squares(self.count, self.per, self.power, self.tokens)


@dataclasses.dataclass(frozen=True)
class Movement:
    """``|theta1 - theta0|``, theta1 after ``steps`` of ordinary training (LT-SFT, Ansell et al. 2022, arXiv:2110.07560).

    penalties: what that training adds to its loss (:mod:`jft.methods.penalties`).
    """

    steps: int
    penalties: tuple[Any, ...] = ()

    def __call__(self, calibration: Calibration) -> Scores:
        return _each(_distance, _candidates(calibration), calibration.tuned(self.steps, penalties=self.penalties))


@dataclasses.dataclass(frozen=True)
class Tuned:
    """``score`` of the run after its first ``steps`` steps: at their weights, over the batches that follow.

    The learning rates are those of the whole run. how: the parametrisation it trains in (:mod:`jft.methods.parametrise`; None
    for in place); a low-rank one is what RoSA takes gradients after (Nikdan et al. 2024, arXiv:2401.04679).
    """

    score: Score
    steps: int
    how: Any = None

    def __call__(self, calibration: Calibration) -> Scores:
        return self.score(calibration.after(self.steps, self.how))


@dataclasses.dataclass(frozen=True)
class Snip:
    """``|g w|``: the loss's first-order change if w were zero (SNIP, Lee et al. 2019, arXiv:1810.02340; SHiRA's SNIP mask)."""

    batches: int = 1

    def __call__(self, calibration: Calibration) -> Scores:
        return _each(_size_of_product, _candidates(calibration), calibration.gradient(self.batches))


@dataclasses.dataclass(frozen=True)
class LowRank:
    """``|W_r|``, W_r the best approximation of rank r of each matrix W (LIFT, Liu et al. 2025, arXiv:2506.00772).

    residual: ``|W - W_r|`` instead, where DSEE (Chen et al. 2021, arXiv:2111.00160) puts its sparse part (it decomposes by
    GreBsmo). W_r is by :func:`jft.select.low_rank.low_rank`: in a random subspace, with ``oversample`` and ``iterations``,
    or ``exact``. Of Gaussian matrices, whose spectrum has no gap, the r (I + O) largest entries of ``|W_r|`` (at most a
    quarter) agree with the exact ones to 99.7% at rank 16 of 1024 x 1024 and to 98.7% at rank 8 of 256 x 128, the least of
    four draws. Vectors are refused.
    """

    rank: int
    residual: bool = False
    oversample: int | None = None
    iterations: int = 12
    exact: bool = False

    def __call__(self, calibration: Calibration) -> Scores:
        out = {}
        for path, w in _candidates(calibration).items():
            if w.ndim - calibration.lead(path) != 2:
                raise ValueError(
                    f"{path} of shape {w.shape} holds no matrices, so LowRank cannot score it; select matrices"
                )
            key = tree.key_for(calibration.key, f"low rank of {path}")
            approximation = low_rank(w, self.rank, self.oversample, self.iterations, key, self.exact)
            # `low_rank` gives float32 in the sharding of the weight: its absolute value needs no program for that.
            out[path] = _compiled(_float32, _distance)(w, approximation) if self.residual else abs(approximation)
        return out


def _sm3(carry: Mapping[str, Any], gradient: Mapping[str, Array]) -> dict[str, Any]:
    """Row and column maxima of ``nu = min(row, column) + g^2`` for each matrix."""
    out = {}
    for path, (rows, columns) in carry.items():
        # Full size only inside the step: two vectors are kept.
        nu = jnp.minimum(rows[..., :, None], columns[..., None, :]) + jnp.square(gradient[path])
        out[path] = (jnp.max(nu, axis=-1), jnp.max(nu, axis=-2))
    return out


def _outer(rows: Array, columns: Array) -> Array:
    return rows[..., :, None] * columns[..., None, :]


@dataclasses.dataclass(frozen=True)
class SM3:
    """``outer(row, column)`` of SM3's accumulators of squared gradients, over ``batches`` (SpIEL-MA, Ansell et al. 2024).

    ``nu = min(row, column) + g^2``, ``row = max of nu over columns``, ``column = max over rows`` (SM3-II, Anil et al. 2019,
    arXiv:1901.11150). SpIEL (arXiv:2401.16405) has gradients of the active entries only; here all enter. Vectors are
    refused.
    """

    batches: int = 5

    def __call__(self, calibration: Calibration) -> Scores:
        start = {}
        for path, w in _candidates(calibration).items():
            if w.ndim - calibration.lead(path) != 2:
                raise ValueError(
                    f"{path} of shape {w.shape} holds no matrices, so SM3 cannot score it; select matrices"
                )
            start[path] = (jnp.zeros(w.shape[:-1], jnp.float32), jnp.zeros((*w.shape[:-2], w.shape[-1]), jnp.float32))
        accumulators = calibration.fold(_sm3, start, self.batches)
        return {path: _compiled(_float32, _outer)(*accumulators[path]) for path in calibration.paths}


@dataclasses.dataclass(frozen=True)
class Wanda:
    """``|w_ij| ||x_i||``, x_i input i of the product over all real tokens of ``batches`` (Sun et al. 2023, arXiv:2306.11695).

    For weights of products (``.../w``) in jft's models; an expert's tokens are those sent to it. Wanda compares weights of
    one output only: :class:`jft.select.PerColumn`.
    """

    batches: int = 1

    def __call__(self, calibration: Calibration) -> Scores:
        # Hooks know products, not the weights in them.
        names = {path: path.removesuffix("/w") for path in calibration.paths}
        squares = squared_inputs(calibration, names.values(), self.batches)
        return {p: _compiled(_float32, _by_input)(w, squares[names[p]]) for p, w in _candidates(calibration).items()}


def _by_input(w: Array, squares: Array) -> Array:
    # Rows are inputs.
    return jnp.abs(w) * jnp.sqrt(squares)[..., None]


@dataclasses.dataclass(frozen=True)
class Random:
    """Uniform in [0, 1) by a counter-based generator, from a key of each path: the same on any mesh.

    draw: another number gives another selection (schedules that draw anew).
    """

    draw: int = 0

    def __call__(self, calibration: Calibration) -> Scores:
        # Independent of other draws of the same run.
        key = jax.random.fold_in(tree.key_for(calibration.key, "random scores"), self.draw)
        out = {}
        for path, w in _candidates(calibration).items():
            # Drawn in the sharding of the weight, so that no device holds all of it.
            run = jax.jit(_uniform, static_argnums=1, out_shardings=getattr(w, "sharding", None))
            out[path] = run(tree.key_for(key, path), w.shape)
        return out


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Scores that the caller has (learned ones, say): an array for every candidate, by path or in the parameters' tree.

    It holds arrays, so it is equal only to itself.
    """

    scores: Any

    def __call__(self, calibration: Calibration) -> Scores:
        flat = tree.flatten(self.scores)
        for path in calibration.paths:
            shape = calibration.params[path].shape
            if path not in flat or flat[path].shape != shape:
                description = f"of shape {flat[path].shape}" if path in flat else "missing"
                raise ValueError(f"the given score of {path} is {description}; the weight has shape {shape}")
        return {p: _like_weight(flat[p], calibration.params[p]) for p in calibration.paths}


def _like_weight(x: Any, w: Any) -> Array:
    return jax.device_put(x, getattr(w, "sharding", None)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
    """1 where ``|theta1 - theta0| > tolerance``, else 0: the subnetwork that training changed (Mukherjee et al. 2025,
    arXiv:2505.11711, who compare bfloat16 weights of reinforcement learning at 1e-5). theta1 is rounded to the dtype of the
    base first, so that a tuned model has one difference in whatever form it is given.

    tuned: a :class:`jft.TaskVector` (paths it does not hold did not change); the tuned parameters, by path or in their
    tree; or their path, a ``.safetensors`` file of a task vector or a directory that :func:`jft.load` reads.
    """

    tuned: Any
    tolerance: float = 1e-5

    def __call__(self, calibration: Calibration) -> Scores:
        if self.tuned is None:
            raise ValueError("a difference needs the tuned model: tuned=, a directory, a task vector or parameters")
        base = _candidates(calibration)
        tuned = _read(self.tuned, calibration) if isinstance(self.tuned, str | os.PathLike) else self.tuned
        if isinstance(tuned, delta.TaskVector):
            tuned = {p: w + _like_weight(tuned[p].dense(), w) if p in tuned else w for p, w in base.items()}
        else:
            tuned = Given(tuned)(calibration)
        # Rounded outside a compiled program, in which XLA may keep the bits that rounding takes.
        return _each(_exceeds(self.tolerance), base, {p: tuned[p].astype(w.dtype) for p, w in base.items()})


@program_cache
def _exceeds(tolerance: float) -> Callable[[Array, Array], Array]:
    return lambda a, b: (jnp.abs(a - b) > tolerance).astype(jnp.float32)


def _read(path: str | os.PathLike, calibration: Calibration) -> Any:
    """A task vector from a file, or the parameters of a model from its directory, on the base's mesh, in its widest dtype."""
    if str(path).endswith(".safetensors"):
        return delta.TaskVector.load(path)
    from jft.models import load

    base = list(_candidates(calibration).values())
    # Weights on one device have no mesh.
    mesh = getattr(getattr(base[0], "sharding", None), "mesh", None)
    return load(str(path), mesh=mesh, dtype=jnp.result_type(*base))[1]


@dataclasses.dataclass(frozen=True)
class Negated:
    """``-score``: the least important first (SaRA takes the smallest weights; so, by mistake, does LIFT's code)."""

    score: Score

    def __call__(self, calibration: Calibration) -> Scores:
        return _each(jnp.negative, self.score(calibration))


@dataclasses.dataclass(frozen=True)
class Sum:
    """``sum of weights[i] * scores[i]``; weights default to one."""

    scores: tuple[Score, ...]
    weights: tuple[float, ...] = ()

    def __call__(self, calibration: Calibration) -> Scores:
        weights = self.weights or (1.0,) * len(self.scores)
        return _each(_weighted_sum(weights), *(score(calibration) for score in self.scores))

    def __post_init__(self) -> None:
        if not self.scores or (self.weights and len(self.weights) != len(self.scores)):
            raise ValueError(f"Sum of {len(self.scores)} scores with {len(self.weights)} weights; give one for each")


@program_cache
def _weighted_sum(weights: tuple[float, ...]) -> Callable[..., Array]:
    return lambda *values: sum(c * v for c, v in zip(weights, values, strict=True))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Product:
    """The product of scores."""

    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("Product of no scores; give at least one")

    def __call__(self, calibration: Calibration) -> Scores:
        return _each(_product, *(score(calibration) for score in self.scores))


def _product(*values: Array) -> Array:
    return functools.reduce(jnp.multiply, values)


@dataclasses.dataclass(frozen=True)
class Normalised:
    """``(s - mean) / std`` over each matrix; with ``squash`` the logistic function of it, as SPIDER ranks weights.

    std is that of the population; a matrix whose scores are all equal becomes 0. SPIDER (Huang et al. 2024, arXiv:2411.10928;
    by the sample's std) compares ``sigmoid(z(|theta0|))`` with ``sigmoid(z(|sum of g|))``.
    """

    score: Score
    squash: bool = False

    def __call__(self, calibration: Calibration) -> Scores:
        scores = self.score(calibration)
        return {p: _compiled(_normalise, calibration.lead(p), self.squash)(x) for p, x in scores.items()}


def _normalise(lead: int, squash: bool, x: Array) -> Array:
    axes = tuple(range(lead, x.ndim))
    centred = x - jnp.mean(x, axis=axes, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True))
    # The inner `where` keeps 0 / 0 out, also of the branch that is not selected.
    z = jnp.where(deviation > 0, centred / jnp.where(deviation > 0, deviation, 1.0), 0.0)
    return jax.nn.sigmoid(z) if squash else z
