"""Eigenvalues and eigenfunctions of a neural tangent kernel, and their energy on the data of each task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jft.tangent.kernel import KernelProduct
from jft.tangent.linearization import Linearized
from jft.tangent.subspace import Select


class Spectrum(NamedTuple):
    """Eigenvalues ``values [k]`` of a kernel matrix, largest first, and eigenfunctions ``functions [k, N, C]`` (``[k, N]``).

    Each function is known on the N examples, the sum of its squares there being 1. The eigenvalues of the kernel's
    integral operator over the examples are ``values / N``.
    """

    values: np.ndarray
    functions: np.ndarray

    def coefficients(self, target: Any) -> np.ndarray:
        """``c [k]``: the components ``sum_x phi(x) target(x)`` of a function given on the examples, like an eigenfunction."""
        target = np.asarray(target, self.functions.dtype)
        if target.shape != self.functions.shape[1:]:
            raise ValueError(f"the target must have shape {self.functions.shape[1:]}, not {target.shape}")
        return np.tensordot(self.functions, target, axes=target.ndim)


def spectrum(kernel: Any, count: int | None = None) -> Spectrum:
    """All eigenvalues and eigenfunctions of a kernel ``[N, C, N, C]`` or ``[N, N]``, or the ``count`` largest.

    By ``numpy.linalg.eigh`` in the dtype given: ``O((N C)^3)``. Raises ``ValueError`` for a kernel of another shape.
    """
    kernel = np.asarray(kernel)
    shape = kernel.shape[: kernel.ndim // 2]
    if kernel.ndim not in (2, 4) or kernel.shape != shape + shape:
        raise ValueError(f"a kernel of one set of examples is [N, C, N, C] or [N, N], not {list(kernel.shape)}")
    size = int(np.prod(shape))
    values, vectors = np.linalg.eigh(kernel.reshape(size, size))
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    # eigh sorts upwards. Copies, so that a few functions do not keep the whole matrix in memory.
    return Spectrum(values.copy(), np.ascontiguousarray(vectors.T).reshape(-1, *shape))


def top_spectrum(
    f_lin: Linearized,
    batches: Iterable[Any],
    count: int,
    *,
    moving: Any = None,
    select: Select | None = None,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Spectrum:
    """The ``count`` largest eigenvalues and their functions, by Lanczos iterations on ``K u = J (J^T u)``; without K itself.

    One reverse and one forward pass over the data for each product, a few products for each eigenvalue wanted, and
    ``2 count + 1`` vectors ``[N, C]`` of memory. batches: N examples in all. tolerance: relative, of the eigenvalues; 0 is
    machine precision. moving and select as in :func:`jft.tangent.kernel`. scipy's ``eigsh`` (ARPACK) does the iterations.
    Raises ``ValueError`` for a count that is not between 1 and ``N C - 1``.
    """
    # Imported here, as scipy.sparse costs time that few callers need to spend.
    from scipy.sparse.linalg import LinearOperator, eigsh

    product = KernelProduct(f_lin, batches, moving=moving, select=select)
    size = product.shape[0] * product.shape[1]
    if not 1 <= count < size:
        raise ValueError(f"count must be between 1 and {size - 1} (N C - 1), not {count}")
    matvec = lambda u: product(u.reshape(product.shape)).reshape(-1)
    operator = LinearOperator((size, size), matvec=matvec, dtype=product.dtype)
    # Drawn here, as ARPACK's own start differs from run to run.
    start = np.random.default_rng(seed).standard_normal(size).astype(product.dtype)
    # Not the largest in magnitude: rounding may make tiny eigenvalues negative.
    values, vectors = eigsh(operator, k=count, which="LA", tol=tolerance, v0=start)
    order = np.argsort(values)[::-1]
    return Spectrum(values[order], np.ascontiguousarray(vectors.T[order]).reshape(count, *product.shape))


def local_energy(functions: Any, weights: Any = None) -> np.ndarray:
    """``E(x) = sum_k weights[k] |phi_k(x)|^2 [N]``: the local energy of the eigenfunctions at each example.

    functions: ``[k, N, C]`` or ``[k, N]``. weights: 1 for None; ``spectrum.coefficients(f)**2`` are those with which they
    represent a function f. Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827, section 5.
    """
    functions = np.asarray(functions)
    energy = np.square(functions).reshape(*functions.shape[:2], -1).sum(axis=2)
    weights = np.ones(len(functions)) if weights is None else np.asarray(weights)
    if weights.shape != (len(functions),):
        raise ValueError(f"weights must be one for each of {len(functions)} eigenfunctions, not {list(weights.shape)}")
    return weights @ energy


def localisation(functions: Any, tasks: Sequence[Any] | np.ndarray) -> dict[Any, np.ndarray]:
    """``{task: share [k]}``: of each eigenfunction's local energy, the share that lies on each task's examples.

    tasks: the task of each example ``[N]``. The share of task t is its mean energy for an example, ``mean_{x in t}
    |phi_k(x)|^2``, divided by the sum of these over the tasks, so that tasks may have different numbers of examples; the
    shares of a function sum to 1, and one that is local to a task has 1 there. Where all are local, and each task is
    represented by its own, task arithmetic works in the tangent space (Ortiz-Jimenez, Favero and Frossard 2023,
    arXiv:2305.12827, section 5). Raises ``ValueError`` where tasks are not as many as examples.
    """
    functions, tasks = np.asarray(functions), np.asarray(tasks)
    if tasks.shape != functions.shape[1:2]:
        raise ValueError(f"tasks must be one for each of {functions.shape[1]} examples, not {list(tasks.shape)}")
    energy = np.square(functions).reshape(*functions.shape[:2], -1).sum(axis=2)
    means = {task.item(): energy[:, tasks == task].mean(axis=1) for task in np.unique(tasks)}
    total = sum(means.values())
    return {task: mean / total for task, mean in means.items()}
