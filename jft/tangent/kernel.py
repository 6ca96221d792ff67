"""`kernel`: the empirical neural tangent kernel ``J(x) J(x')^T``, in blocks, without the Jacobian of all examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.compiled import program_cache
from jft.names import nearest
from jft.tangent import subspace as spaces
from jft.tangent.linearization import Linearized
from jft.tangent.subspace import Select, Space

Array = jax.Array
Of = Literal["all", "trace", "sum", "one"]
How = Literal["auto", "jacobian", "products"]

MEMORY = 2**30
# Several tangents through one primal pass: enough to make it cheap, few enough to keep their activations small.
_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Multiply-adds of a kernel by either way, estimated from the products of a forward pass.

    jacobian: Jacobians of examples, contracted. products: a product ``J (J^T e)`` for each output of each column.
    """

    jacobian: float
    products: float

    @property
    def cheaper(self) -> How:
        """The way with fewer."""
        return "jacobian" if self.jacobian <= self.products else "products"


def kernel(
    f_lin: Linearized,
    batch: Any,
    other: Any = None,
    *,
    moving: Any = None,
    of: Of = "all",
    how: How = "auto",
    select: Select | None = None,
    key: Array | None = None,
    memory: int = MEMORY,
) -> np.ndarray:
    """The empirical neural tangent kernel ``K[n, c, m, d] = <d f_c(x_n), d f_d(x'_m)>`` at ``theta0``, ``[N, C, M, C]``.

    batch: N examples, and other: M of them; None: the same, and K is then symmetric to the bit. Outputs are those of
    ``f_lin`` (values at its site), C numbers for each example: ``select(outputs, batch) -> [N, ...]`` chooses among them,
    say the logits of the last token. moving: the weights of the derivative: None for all weights, patterns of
    paths, or a task vector that names the parts (:func:`jft.tangent.subspace.space`).

    of: ``all``; or a kernel ``[N, M]`` that stands for many outputs: ``trace``, their mean ``sum_c K[n, c, m, c] / C``,
    for the same passes and a C-th of the contraction; for a C-th of the passes as well, ``sum``, of the scalar ``sum_c f_c
    / sqrt(C)``, the pseudo-NTK (Mohamadi, Bae and Sutherland 2022, arXiv:2206.12543), or ``one``, of one output drawn by
    ``key``, whose mean over draws is the trace.

    how: ``jacobian`` contracts Jacobians of blocks of examples, as large as ``memory`` bytes allow: N C + M C reverse
    passes over one example if all fit, times the number of blocks if not, and ``N C M C P`` multiply-adds for P moving
    numbers. ``products`` pushes each ``J(x'_m)^T e_d`` through the pass of the batch: M C reverse passes and N M C forward
    ones over one example, and never more than a few vectors of length P. ``auto`` takes the cheaper by
    :func:`kernel_cost`. Both are in Novak, Sohl-Dickstein and Schoenholz 2022, arXiv:2206.08720; the kernel is that of
    Jacot, Gabriel and Hongler 2018, arXiv:1806.07572.

    Computed in the dtype of the model, sums in float32 (float64 where the weights are). Raises ``ValueError`` for outputs
    that are not one array, batches with arrays that have no row for each example, and unknown choices.
    """
    _check_choice("of", of, ("all", "trace", "sum", "one"))
    _check_choice("how", how, ("auto", "jacobian", "products"))
    columns = batch if other is None else other
    N, M = spaces.rows(batch), spaces.rows(columns)
    space = spaces.space(f_lin, moving)
    key = jax.random.key(0) if key is None else key
    C = _outputs(f_lin, space, batch, select, of)
    if how == "auto":
        how = kernel_cost(f_lin, batch, other, moving=moving, of=of, select=select, memory=memory).cheaper
    if how == "jacobian":
        K = _by_jacobians(f_lin, space, batch, other, C, of, select, key, memory)
    else:
        K = _by_products(f_lin, space, batch, columns, of, select, key, memory)
    if of in ("sum", "one"):
        K = K[:, 0, :, 0]
    if other is None:
        # The two orders of a product round differently; their mean is symmetric to the bit.
        K = (K + (K.transpose(2, 3, 0, 1) if K.ndim == 4 else K.T)) / 2
    assert K.shape in ((N, C, M, C), (N, M))
    return K


def kernel_cost(
    f_lin: Linearized,
    batch: Any,
    other: Any = None,
    *,
    moving: Any = None,
    of: Of = "all",
    select: Select | None = None,
    memory: int = MEMORY,
) -> KernelCost:
    """The cost of :func:`kernel` by either way: a pass forward counts 1, one in reverse or of a tangent 2."""
    space = spaces.space(f_lin, moving)
    columns = batch if other is None else other
    N, M = spaces.rows(batch), spaces.rows(columns)
    C = _outputs(f_lin, space, batch, select, of)
    P = tree.count(spaces.sizes(space))
    F = spaces.products(f_lin, space, jax.tree.map(lambda x: x[:1], batch), select)
    n, groups = _plan(space, C, N, M, memory)
    # Of one set of examples only the blocks on and above the diagonal are computed.
    triangle = 0.5 if other is None and n < N else 1.0
    # The Jacobians of the columns are taken again for every block of rows.
    column_passes = (0 if other is None else M) if n >= N else N * M / n * triangle
    reverse = (N + column_passes) * len(groups) * (1 + 2 * C) * F
    contraction = N * M * C * (1 if of == "trace" else C) * P * (0.5 + 0.5 * triangle)
    # A tangent costs 2; the primal pass below it is shared by ``_AT_ONCE`` of them.
    return KernelCost(jacobian=reverse + contraction, products=M * (1 + 2 * C) * F + N * M * C * F * (2 + 1 / _AT_ONCE))


class KernelProduct:
    """``u [N, C] -> K u = J (J^T u) [N, C]`` over all examples of several batches, without K itself.

    One reverse and one forward pass over the data for each product, in memory for one batch and one vector of the moving
    weights. For Lanczos iterations (:func:`jft.tangent.top_spectrum`) and iterative solvers; moving and select as in
    :func:`kernel`. ``shape`` is ``(N, C)``, ``dtype`` that of products.
    """

    def __init__(
        self, f_lin: Linearized, batches: Iterable[Any], *, moving: Any = None, select: Select | None = None
    ) -> None:
        # A list, as every product goes through the batches twice.
        self.f_lin, self.batches = f_lin, list(batches)
        if not self.batches:
            raise ValueError("a product with the kernel was given no batches")
        self.moving = spaces.space(f_lin, moving)
        counts = [spaces.rows(batch) for batch in self.batches]
        self._ends = np.cumsum(counts)[:-1]
        self._pull, self._push = (make(f_lin.function, f_lin.until, select) for make in (vjp_program, jvp_program))
        first = jax.eval_shape(self._push, f_lin.params, self.moving, self.batches[0], spaces.origin(self.moving))
        self.shape, self.dtype = (sum(counts), first.shape[1]), first.dtype

    def __call__(self, u: Any) -> np.ndarray:
        params, space = self.f_lin.params, self.moving
        total: Any = None
        for batch, part in zip(self.batches, np.split(np.asarray(u, self.dtype), self._ends), strict=True):
            gradient = self._pull(params, space, batch, part)
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        return np.concatenate([np.asarray(self._push(params, space, batch, total)) for batch in self.batches])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown{nearest(value, choices)}; choose one of {', '.join(choices)}")


def _outputs(f_lin: Linearized, space: Space, batch: Any, select: Select | None, of: Of) -> int:
    """C of the passes: outputs of one example; 1 for ``sum`` and ``one``."""
    first = jax.tree.map(lambda x: jnp.asarray(x[:1]), batch)
    point = spaces.origin(space)
    shape = jax.eval_shape(spaces.outputs(f_lin, space, first, select), point).shape
    if shape[0] != 1:
        raise ValueError(f"outputs of one example have {shape[0]} rows; a kernel needs one row for each example")
    return 1 if of in ("sum", "one") else shape[1]


def _projected(f_lin: Linearized, space: Space, batch: Any, select: Select | None, of: Of, key: Array) -> Callable:
    """The function whose kernel it is: all outputs ``[N, C]``, or their sum or one of them, ``[N, 1]``."""
    all_outputs = spaces.outputs(f_lin, space, batch, select)

    def outputs(point: Any) -> Array:
        y = all_outputs(point)
        if of == "sum":
            return jnp.sum(y, axis=1, keepdims=True) / jnp.sqrt(jnp.asarray(y.shape[1], y.dtype))
        if of == "one":
            return jax.lax.dynamic_slice_in_dim(y, jax.random.randint(key, (), 0, y.shape[1]), 1, axis=1)
        return y

    return outputs


def _plan(space: Space, C: int, N: int, M: int, memory: int) -> tuple[int, list[Space]]:
    """Examples in a block, and groups of weights whose Jacobians of two such blocks fit into ``memory`` bytes."""
    # Twice: a block of rows and one of columns.
    each = {path: 2 * C * tree.nbytes(x) for path, x in spaces.sizes(space).items()}
    n = min(max(N, M), max(1, memory // sum(each.values())))
    groups: list[Space] = [{}]
    size = 0
    for path, change in space.items():
        if groups[-1] and size + n * each[path] > memory:
            groups.append({})
            size = 0
        groups[-1][path] = change
        size += n * each[path]
    return int(n), groups


def _by_jacobians(
    f_lin: Linearized,
    space: Space,
    batch: Any,
    other: Any,
    C: int,
    of: Of,
    select: Select | None,
    key: Array,
    memory: int,
) -> np.ndarray:
    columns = batch if other is None else other
    N, M = spaces.rows(batch), spaces.rows(columns)
    n, groups = _plan(space, C, N, M, memory)
    jacobian = _jacobian(f_lin.function, f_lin.until, select, of)
    K: np.ndarray | None = None
    for group in groups:
        for i in range(0, N, n):
            left = jacobian(f_lin.params, group, _block(batch, i, n), key)
            for j in range(i if other is None else 0, M, n):
                same = other is None and i == j
                right = left if same else jacobian(f_lin.params, group, _block(columns, j, n), key)
                part = np.asarray(_contract(left, right, of == "trace"))
                if K is None:
                    # Not before: the first block tells the dtype.
                    K = np.zeros((N, M) if part.ndim == 2 else (N, C, M, C), part.dtype)
                _add(K, part, i, j, mirrored=other is None and i != j)
    assert K is not None
    return K


def _block(batch: Any, start: int, n: int) -> Any:
    """``n`` examples, the last one repeated past the end: blocks of one size share a program."""
    index = np.minimum(np.arange(start, start + n), spaces.rows(batch) - 1)
    return jax.tree.map(lambda x: x[index], batch)


def _add(K: np.ndarray, part: np.ndarray, i: int, j: int, mirrored: bool) -> None:
    part = part if part.ndim == 4 else part[:, None, :, None]
    whole = K if K.ndim == 4 else K[:, None, :, None]
    rows, columns = min(part.shape[0], len(whole) - i), min(part.shape[2], whole.shape[2] - j)
    part = part[:rows, :, :columns]
    whole[i : i + rows, :, j : j + columns] += part
    if mirrored:
        whole[j : j + columns, :, i : i + rows] += part.transpose(2, 3, 0, 1)


@program_cache
def _jacobian(apply: Callable, until: str | None, select: Select | None, of: Of) -> Callable:
    """Jitted ``(params, space, batch, key) -> {path: [N, C, ...]}``, each example's by reverse passes of its own."""

    def run(params: Any, space: Space, batch: Any, key: Array) -> Any:
        f_lin = Linearized(apply, params, until)
        point = spaces.origin(space)

        def jacobian_of(example: Any) -> Any:
            # Models take batches.
            batch_of_one = jax.tree.map(lambda x: x[None], example)
            return jax.jacrev(lambda p: _projected(f_lin, space, batch_of_one, select, of, key)(p)[0])(point)

        return jax.vmap(jacobian_of)(jax.tree.map(jnp.asarray, batch))

    return jax.jit(run)


@jax.jit(static_argnums=2)
def _contract(left: Any, right: Any, trace: bool) -> Array:
    def product_of(a: Array, b: Array) -> Array:
        a, b = (spaces.to_float32(x).reshape(*x.shape[:2], -1) for x in (a, b))
        # Accelerators would multiply float32 with fewer bits by default.
        product = jnp.einsum("acp,bcp->ab" if trace else "acp,bdp->acbd", a, b, precision=jax.lax.Precision.HIGHEST)
        return product / a.shape[1] if trace else product

    parts = [product_of(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)]
    return sum(parts[1:], parts[0])


def _by_products(
    f_lin: Linearized, space: Space, batch: Any, columns: Any, of: Of, select: Select | None, key: Array, memory: int
) -> np.ndarray:
    at_once = max(1, min(_AT_ONCE, memory // tree.nbytes(spaces.sizes(space))))
    return np.asarray(
        _columns(f_lin.function, f_lin.until, select, of, at_once)(f_lin.params, space, batch, columns, key)
    )


@program_cache
def _columns(apply: Callable, until: str | None, select: Select | None, of: Of, at_once: int) -> Callable:
    """Jitted ``(params, space, batch, columns, key) -> K``, ``at_once`` of its columns at a time."""

    def run(params: Any, space: Space, batch: Any, columns: Any, key: Array) -> Array:
        f_lin = Linearized(apply, params, until)
        point = spaces.origin(space)
        all_outputs = _projected(f_lin, space, batch, select, of, key)
        N, C = jax.eval_shape(all_outputs, point).shape
        M = spaces.rows(columns)

        def column(index: tuple[Array, Array]) -> Array:
            m, c = index
            y, pull = jax.vjp(_projected(f_lin, space, spaces.row(columns, m), select, of, key), point)
            (gradient,) = pull(jax.nn.one_hot(c, C, dtype=y.dtype)[None])
            dy = jax.jvp(all_outputs, (point,), (gradient,))[1]
            return spaces.to_float32(dy[:, c] if of == "trace" else dy)

        m, c = jnp.meshgrid(jnp.arange(M), jnp.arange(C), indexing="ij")
        K = jax.lax.map(column, (m.ravel(), c.ravel()), batch_size=at_once)
        if of == "trace":
            return jnp.mean(K.reshape(M, C, N), axis=1).T
        return jnp.moveaxis(K.reshape(M, C, N, C), (2, 3), (0, 1))

    return jax.jit(run)


@program_cache
def vjp_program(apply: Callable, until: str | None, select: Select | None) -> Callable:
    """Jitted ``(params, space, batch, u [N, C]) -> J^T u``."""

    def run(params: Any, space: Space, batch: Any, u: Array) -> Any:
        f_lin = Linearized(apply, params, until)
        y, pull = jax.vjp(spaces.outputs(f_lin, space, batch, select), spaces.origin(space))
        return spaces.to_float32(pull(u.astype(y.dtype))[0])

    return jax.jit(run)


@program_cache
def jvp_program(apply: Callable, until: str | None, select: Select | None) -> Callable:
    """Jitted ``(params, space, batch, v) -> J v [N, C]``."""

    def run(params: Any, space: Space, batch: Any, v: Any) -> Array:
        f_lin = Linearized(apply, params, until)
        point = spaces.origin(space)
        return spaces.to_float32(
            jax.jvp(spaces.outputs(f_lin, space, batch, select), (point,), (spaces.like(v, point),))[1]
        )

    return jax.jit(run)
