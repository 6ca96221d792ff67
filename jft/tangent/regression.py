"""Closed forms of squared loss in the tangent space: kernel and ridge regression, and the best coefficients."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta
from jft.compiled import program_cache
from jft.data.batches import equally_long
from jft.delta import TaskVector
from jft.tangent import subspace as spaces
from jft.tangent.kernel import MEMORY, kernel, vjp_program
from jft.tangent.linearization import Direction, Linearized
from jft.tangent.subspace import Select, Space
from jft.tangent.sweep import Taus, listed, through

Array = jax.Array
# (batch, targets [N, ...]) or (batch, targets, weights [N]).
Example = tuple[Any, Any] | tuple[Any, Any, Any]
# Numbers to predict beyond which the kernel matrix, and its factor, are too large to be the quick way.
_DUAL = 4096


def kernel_regression(kernel: Any, residual: Any, penalty: float = 0.0, weights: Any = None) -> np.ndarray:
    """``a = (K + penalty W^-1)^-1 residual``, the coefficients of kernel regression, float64, shaped as the residual.

    kernel: of the N training examples, ``[N, C, N, C]``, or ``[N, N]`` for one kernel that serves every output.
    residual: ``y - f(theta0) [N, C]``. weights: of the examples, W (1 for None; those of 0 do not count). Prediction is
    :func:`kernel_predict`. Without a penalty the solution of least norm, by singular values. Jacot, Gabriel and Hongler 2018,
    arXiv:1806.07572. Raises ``ValueError`` for shapes that do not fit, and a negative penalty or weight.
    """
    # float64: the condition number of a kernel is the square of the Jacobian's.
    kernel, residual = np.asarray(kernel, np.float64), np.asarray(residual, np.float64)
    N = len(residual)
    if kernel.shape not in ((N, N), residual.shape + residual.shape) or residual.ndim != 2:
        raise ValueError(
            f"a residual [N, C] needs a kernel [N, C, N, C] or [N, N]; they are {residual.shape}, {kernel.shape}"
        )
    weights = np.ones(N) if weights is None else np.asarray(weights, np.float64)
    if penalty < 0 or (weights < 0).any():
        raise ValueError("the penalty and the weights must not be negative")
    # With s = sqrt(w), b = a / s: (s K s + penalty) b = s residual, which holds for weights of zero as well.
    s = np.sqrt(weights)[:, None]
    if kernel.ndim == 4:
        s = np.broadcast_to(s, residual.shape).reshape(-1, 1)
    size = len(s)
    right = s * residual.reshape(size, -1)
    matrix = s * kernel.reshape(size, size) * s.T
    if penalty:
        b = np.linalg.solve(matrix + penalty * np.eye(size), right)
    else:
        # A kernel without a penalty may be singular.
        b = np.linalg.lstsq(matrix, right, rcond=None)[0]
    return (s * b).reshape(residual.shape)


def kernel_predict(base: Any, kernel: Any, coefficients: Any) -> np.ndarray:
    """``f(theta0) + K(x, X) a [M, C]``, the kernel-regression predictor at M new examples; float64.

    base: ``f(theta0) [M, C]``. kernel: of the new and the training examples, ``[M, C, N, C]`` or ``[M, N]``.
    coefficients: :func:`kernel_regression`. With the full kernel this is ``f_lin(tau)`` of :func:`ridge`.
    """
    kernel, a = np.asarray(kernel, np.float64), np.asarray(coefficients, np.float64)
    return np.asarray(base, np.float64) + np.tensordot(kernel, a, axes=kernel.ndim // 2)


def ridge(
    f_lin: Linearized,
    data: Iterable[Example],
    penalty: float,
    *,
    moving: Any = None,
    how: Literal["auto", "dual", "cg"] = "auto",
    select: Select | None = None,
    tolerance: float = 1e-6,
    steps: int | None = None,
    memory: int = MEMORY,
) -> TaskVector:
    """The task vector ``argmin_tau sum_n w_n |f(theta0, x_n) + J(x_n) tau - y_n|^2 + penalty |tau|^2``.

    data: ``(batch, y [N, ...])``, or ``(batch, y, w [N])``; y is like the outputs (values at the site of f_lin, what
    ``select`` chooses), one-hot or scaled labels for classification. moving: the weights that tau may change, as in
    :func:`jft.tangent.kernel`; its norm is that of the numbers that move (of b, for a low-rank ``a b``).

    how: ``dual`` is ``tau = J^T (K + penalty W^-1)^-1 (y - f(theta0))``, one kernel of all examples and a system of size N
    C in float64; for few examples. ``cg`` are conjugate gradients on ``(J^T W J + penalty) tau = J^T W (y - f(theta0))``
    from zero, a forward and a reverse pass over the data for each of at most ``steps`` (default: as many as unknowns), to
    the relative ``tolerance`` of the residual; for many. ``auto``: dual up to N C = 4096. Both give the same tau; without
    a penalty, that of least norm. The encodings are those of what moves; values are float32 (float64 where the weights
    are). The manifest has ``solver``, ``penalty``, and for cg the ``residual`` reached, with a warning where that is more
    than the tolerance. Raises ``ValueError`` for no data, a negative penalty, and shapes that do not fit.
    """
    if penalty < 0 or how not in ("auto", "dual", "cg"):
        raise ValueError(f"ridge takes a penalty of at least 0 and how auto, dual or cg, not {penalty} and {how!r}")
    space = spaces.space(f_lin, moving)
    blocks = _blocks(data)
    first = jax.eval_shape(lambda b: spaces.outputs(f_lin, space, b, select)(spaces.origin(space)), blocks.batch(0))
    N, C = blocks.examples, first.shape[1]
    blocks.check(C)
    facts: dict[str, Any] = {"penalty": float(penalty)}
    if how == "dual" or (how == "auto" and N * C <= _DUAL):
        facts["solver"] = "dual"
        values = _dual(f_lin, space, blocks, penalty, moving, select, memory)
    else:
        facts["solver"] = "cg"
        program = _conjugate(f_lin.function, f_lin.until, select, tolerance, steps)
        values, residual = program(f_lin.params, space, *blocks.stacked(), penalty)
        facts["residual"] = float(residual)
        # cg stops by a residual that it updates, from which rounding moves the true one.
        if not facts["residual"] <= 2 * tolerance:
            warnings.warn(
                f"conjugate gradients reached a relative residual of {float(residual):.1e}, not {tolerance:.1e}: "
                "allow more steps or tolerance, or a larger penalty",
                stacklevel=2,
            )
    return TaskVector(spaces.encode(f_lin, space, values), delta.describe(f_lin.params, operation="ridge", **facts))


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """``sum_n w_n |f(theta0) + sum_t alpha_t J tau_t - y_n|^2`` as the parabola ``alpha A alpha - 2 b alpha + c``; float64.

    gram: A ``[T, T]``. moment: b ``[T]``. base: c, the loss of the base. weight: ``sum_n w_n``.
    """

    gram: np.ndarray
    moment: np.ndarray
    base: float
    weight: float

    def solve(self, penalty: float = 0.0, shared: bool = False) -> np.ndarray:
        """``argmin`` of the sum ``+ penalty |alpha|^2``, ``[T]``; of least norm where there are several.

        shared: one coefficient for all tasks, the same T times.
        """
        if shared:
            # A gram of zeros: 0 / 1 is the solution of least norm.
            alpha = self.moment.sum() / (self.gram.sum() + penalty * len(self.moment) or 1.0)
            return np.full(len(self.moment), alpha)
        matrix = self.gram + penalty * np.eye(len(self.moment))
        return np.linalg.lstsq(matrix, self.moment, rcond=None)[0]

    def loss(self, alpha: Any) -> np.ndarray:
        """The weighted mean of the squared error at each row of ``alpha [..., T]``."""
        alpha = np.asarray(alpha, np.float64)
        total = np.einsum("...s,st,...t", alpha, self.gram, alpha) - 2 * alpha @ self.moment + self.base
        return total / self.weight


def least_squares(
    f_lin: Linearized,
    taus: Taus,
    data: Iterable[Example],
    *,
    select: Select | None = None,
    at_once: int | None = None,
) -> LeastSquares:
    """Squared loss as a function of the coefficients of T task vectors: ``.solve()`` has the best, ``.loss`` any grid.

    The closed form of :func:`jft.tangent.sweep` for squared loss, from the same T tangent passes over the data: ``A_st =
    sum_n w_n (J tau_s)(x_n) . (J tau_t)(x_n)`` and ``b_t = sum_n w_n (J tau_t)(x_n) . (y_n - f(theta0, x_n))``, summed in
    float64 over the batches. data and select as in :func:`ridge`, taus and at_once as in :func:`jft.tangent.sweep`.
    """
    directions = [f_lin.direction(tau) for tau in listed(taus)]
    program = _moments(f_lin.function, f_lin.until, select, at_once)
    totals: list[np.ndarray] | None = None
    for item in data:
        batch, y, w = _item(item)
        moments = [np.asarray(x, np.float64) for x in program(f_lin.params, directions, batch, y, w)]
        totals = moments if totals is None else [a + b for a, b in zip(totals, moments, strict=True)]
    if totals is None or not totals[3] > 0:
        raise ValueError("least squares was given no data, or none of any weight")
    return LeastSquares(totals[0], totals[1], float(totals[2]), float(totals[3]))


@program_cache
def _moments(apply: Callable, until: str | None, select: Select | None, at_once: int | None) -> Callable:
    """Jitted ``(params, directions, batch, y, w) -> (A, b, c, weight)`` of one batch."""

    def run(params: Any, directions: list[Direction], batch: Any, y: Array, w: Array) -> tuple[Array, ...]:
        f_lin = Linearized(apply, params, until)
        f0, tangents = through(f_lin, directions, batch, at_once)
        values = f0
        if select is not None:
            values, tangents = jax.vmap(
                lambda dy: jax.jvp(lambda o: select(o, batch), (f0,), (dy,)), out_axes=(None, 0)
            )(tangents)
        values, tangents = spaces.to_float32((values, tangents))
        if y.shape != values.shape:
            raise ValueError(f"targets of shape {y.shape} do not fit outputs of shape {values.shape}")
        residual = (y - values).reshape(len(y), -1)
        tangents = tangents.reshape(len(tangents), len(y), -1)
        # Accelerators would multiply float32 with fewer bits by default.
        highest = jax.lax.Precision.HIGHEST
        gram = jnp.einsum("snc,n,tnc->st", tangents, w, tangents, precision=highest)
        moment = jnp.einsum("tnc,n,nc->t", tangents, w, residual, precision=highest)
        return gram, moment, jnp.einsum("n,nc,nc->", w, residual, residual, precision=highest), jnp.sum(w)

    return jax.jit(run)


def _item(item: Example) -> tuple[Any, np.ndarray, np.ndarray]:
    """A batch, its targets and weights. Raises ``ValueError`` where they do not fit."""
    batch, y, *rest = item
    n, y = spaces.rows(batch), np.asarray(y)
    w = np.asarray(rest[0], y.dtype) if rest else np.ones(n, y.dtype)
    if len(y) != n or w.shape != (n,) or not np.issubdtype(y.dtype, np.floating) or (w < 0).any():
        raise ValueError(
            f"data is (batch, floating-point targets [N, ...], weights [N] of at least 0), with N = {n} here; got "
            f"targets {y.dtype}{list(y.shape)} and weights {list(w.shape)}"
        )
    return batch, y, w


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """All examples, in blocks of one size, the last one filled up with examples of no weight."""

    whole: Any
    targets: np.ndarray
    weights: np.ndarray
    size: int

    @property
    def examples(self) -> int:
        return len(self.weights)

    def batch(self, start: int) -> Any:
        index = self._index(start)
        return jax.tree.map(lambda x: x[index], self.whole)

    def stacked(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """Batches, targets and weights with a leading axis over the blocks."""
        starts = range(0, self.examples, self.size)
        index = np.stack([self._index(start) for start in starts])
        real = np.stack([np.arange(start, start + self.size) < self.examples for start in starts])
        return jax.tree.map(lambda x: x[index], self.whole), self.targets[index], self.weights[index] * real

    def check(self, C: int) -> None:
        if self.targets.shape[1] != C:
            raise ValueError(f"targets have {self.targets.shape[1]} numbers for each example, and outputs {C}")

    def _index(self, start: int) -> np.ndarray:
        return np.minimum(np.arange(start, start + self.size), self.examples - 1)


def _blocks(data: Iterable[Example]) -> _Blocks:
    items = [_item(item) for item in data]
    if not items:
        raise ValueError("ridge was given no data")
    batches = equally_long([jax.tree.map(np.asarray, batch) for batch, _, _ in items])
    targets = np.concatenate([y.reshape(len(y), -1) for _, y, _ in items])
    weights = np.concatenate([w for _, _, w in items])
    return _Blocks(jax.tree.map(lambda *x: np.concatenate(x), *batches), targets, weights, len(items[0][2]))


def _dual(
    f_lin: Linearized, space: Space, blocks: _Blocks, penalty: float, moving: Any, select: Select | None, memory: int
) -> Any:
    K = kernel(f_lin, blocks.whole, moving=moving, select=select, memory=memory)
    values = _values(f_lin.function, f_lin.until, select)
    f0 = [np.asarray(values(f_lin.params, blocks.batch(s)), np.float64) for s in range(0, blocks.examples, blocks.size)]
    a = kernel_regression(K, blocks.targets - np.concatenate(f0)[: blocks.examples], penalty, blocks.weights)
    pull = vjp_program(f_lin.function, f_lin.until, select)
    total = None
    for start in range(0, blocks.examples, blocks.size):
        # Zeros for the examples that only fill up the last block.
        part = np.zeros((blocks.size, a.shape[1]), K.dtype)
        rows = a[start : start + blocks.size]
        part[: len(rows)] = rows
        gradient = pull(f_lin.params, space, blocks.batch(start), part)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    return total


@program_cache
def _values(apply: Callable, until: str | None, select: Select | None) -> Callable:
    """Jitted ``(params, batch) -> f(theta0) [N, C]``."""

    def run(params: Any, batch: Any) -> Array:
        return spaces.to_float32(spaces.outputs(Linearized(apply, params, until), {}, batch, select)({}))

    return jax.jit(run)


@program_cache
def _conjugate(
    apply: Callable, until: str | None, select: Select | None, tolerance: float, steps: int | None
) -> Callable:
    """Jitted ``(params, space, batches, targets, weights, penalty) -> (tau, relative residual)``, blocks stacked."""

    def run(params: Any, space: Space, batches: Any, targets: Array, weights: Array, penalty: Array) -> Any:
        f_lin = Linearized(apply, params, until)
        point = spaces.origin(space)
        zero = jax.tree.map(jnp.zeros_like, spaces.to_float32(point))

        def sum_over_blocks(of: Callable[[Array, Callable, Array, Array], Array]) -> Any:
            """``sum J^T of(f(theta0), J, targets, weights)`` over the blocks."""

            def block(total: Any, arrays: Any) -> tuple[Any, None]:
                batch, y, w = arrays
                # One primal pass serves both J and J^T.
                f0, push = jax.linearize(spaces.outputs(f_lin, space, batch, select), point)
                u = of(f0, push, y, w[:, None]).astype(f0.dtype)
                (gradient,) = jax.linear_transpose(push, point)(u)
                return jax.tree.map(jnp.add, total, spaces.to_float32(gradient)), None

            return jax.lax.scan(block, zero, (batches, targets, weights))[0]

        def curvature(v: Any) -> Any:
            product = sum_over_blocks(lambda f0, push, y, w: spaces.to_float32(push(spaces.like(v, point))) * w)
            return jax.tree.map(lambda a, b: a + jnp.asarray(penalty, b.dtype) * b, product, v)

        right = sum_over_blocks(lambda f0, push, y, w: (y - spaces.to_float32(f0)) * w)
        tau, _ = jax.scipy.sparse.linalg.cg(curvature, right, tol=tolerance, maxiter=steps)
        left = jax.tree.map(jnp.subtract, right, curvature(tau))
        norm = lambda x: jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(x)))
        # A residual of zero at the base would give 0 / 0.
        return tau, norm(left) / jnp.where(norm(right) > 0, norm(right), 1)

    return jax.jit(run)
