"""The neural tangent kernel of a base on the data of several tasks, and the tasks on whose data each task vector acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jft import tangent
from jft.data.batches import equally_long
from jft.tangent import Linearized, Spectrum
from jft.tangent import subspace as spaces
from jft.tangent.kernel import Of


@dataclasses.dataclass(frozen=True)
class TaskKernel:
    """spectrum: of the kernel over all examples. tasks: the task of each example. weights: ``{tau: [k]}``, the share of what
    each task vector changes that each eigenfunction carries. located: ``{tau: {task: share}}``, see :func:`task_kernel`.
    """

    spectrum: Spectrum
    tasks: np.ndarray
    weights: Mapping[str, np.ndarray]
    located: Mapping[str, Mapping[str, float]]

    @property
    def effective_rank(self) -> float:
        """``exp(-sum p log p)`` of the eigenvalues as shares p (Roy and Vetterli 2007): how many directions data span."""
        # Rounding may make the smallest eigenvalues negative.
        p = np.clip(np.asarray(self.spectrum.values, np.float64), 0, None)
        p = p[p > 0] / p.sum()
        return float(np.exp(-np.sum(p * np.log(p))))


def task_kernel(
    f_lin: Linearized,
    batches: Mapping[str, Any],
    taus: Mapping[str, Any],
    *,
    moving: Any = None,
    of: Of = "trace",
    select: Any = None,
) -> TaskKernel:
    """The kernel of ``f_lin`` over ``{task: batch}``, and for each task vector the energy of its functions on each task.

    Tau changes the examples' outputs by ``g = J tau``, ``[N, C]``, and ``c_k^2 = sum_c (sum_x phi_k(x) g_c(x))^2`` is its
    part in the k-th eigenfunction. ``E(x) = sum_k c_k^2 |phi_k(x)|^2`` is the local energy of these functions; ``located``
    has the mean of E on the examples of each task, as shares of 1. A task vector whose own task has 1 there cannot disturb
    the others (Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827, section 5). The paper's text may also be read as the
    unweighted sum of ``|phi_k(x)|^2`` over the eigenfunctions that represent a task, :func:`jft.tangent.local_energy` of
    those functions without weights.

    batch: arrays ``[n, ...]`` of the same names and shapes but for n. of: ``trace``, ``sum`` or ``one``: one kernel
    ``[N, N]`` for all outputs, as in :func:`jft.tangent.kernel`, which see for moving and select. Raises ``ValueError`` for
    batches that cannot be joined.
    """
    examples = _concatenated(batches)
    tasks = np.repeat(list(batches), [spaces.rows(batch) for batch in batches.values()])
    if of == "all":
        raise ValueError("of='all' gives a kernel of examples and outputs; choose trace, sum or one")
    spectrum = tangent.spectrum(tangent.kernel(f_lin, examples, moving=moving, of=of, select=select))
    weights, located = {}, {}
    for name, tau in taus.items():
        g = _change(f_lin, tau, examples, select)
        parts = np.square(spectrum.functions.astype(np.float64) @ g).sum(axis=1)
        # A task vector that moves nothing on these data has no parts: 0 / 0 otherwise.
        weights[name] = parts / max(parts.sum(), np.finfo(np.float64).tiny)
        energy = tangent.local_energy(spectrum.functions, weights[name])
        means = {task: float(energy[tasks == task].mean()) for task in batches}
        located[name] = {task: mean / sum(means.values()) for task, mean in means.items()}
    return TaskKernel(spectrum, tasks, weights, located)


def _concatenated(batches: Mapping[str, Any]) -> Any:
    """One batch of them all: the arrays that every one has."""
    batches = dict(zip(batches, equally_long(list(batches.values())), strict=True))
    names = set.intersection(*(set(batch) for batch in batches.values()))
    out = {}
    for name in sorted(names):
        arrays = {task: np.asarray(batch[name]) for task, batch in batches.items()}
        shapes = {task: x.shape[1:] for task, x in arrays.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the tasks' {name} have different shapes, {shapes}: they cannot be in one kernel")
        out[name] = np.concatenate(list(arrays.values()))
    return out


def _change(f_lin: Linearized, tau: Any, batch: Any, select: Any) -> np.ndarray:
    """``J tau`` on the examples, ``[N, C]``."""
    f0, derivatives = tangent.tangents(f_lin, [tau], batch)
    step = jax.tree.map(lambda x: x[0], derivatives)
    if select is not None:
        step = jax.jvp(lambda y: select(y, batch), (f0,), (step,))[1]
    return np.asarray(step, np.float64).reshape(len(step), -1)
