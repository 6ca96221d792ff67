"""Figures of the tangent space: disentanglement maps, spectra of kernels and their energy, distances from linearity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft.analysis.drawing import FAINT, INK, WIDTH, legend, looks, panels, styled


@styled
def disentanglement_maps(rows: Sequence[Mapping[str, Any]]) -> Any:
    """One heat map of xi for each row (``method``, ``pair``, ``grid``, ``xi``), on one scale; the square is [0, 1] x [0, 1].

    Pairs go down, methods across; of one method pairs go across, and of one pair the methods are wrapped.
    """
    from matplotlib.patches import Rectangle

    methods = list(dict.fromkeys(row["method"] for row in rows))
    pairs = list(dict.fromkeys(tuple(row["pair"]) for row in rows))
    ordered = sorted(rows, key=lambda row: (pairs.index(tuple(row["pair"])), methods.index(row["method"])))
    columns = 3 if len(methods) == 1 else min(len(methods), 4) if len(pairs) == 1 else len(methods)
    height = min(2.5, WIDTH / columns + 0.7)  # squares, and room for their labels
    figure, axes = panels(len(rows), columns, height)
    # One scale for all maps; maps of zeros need one as well.
    largest = max(float(np.max(row["xi"])) for row in rows) or 1.0
    for axis, row in zip(axes, ordered, strict=True):
        grid = np.asarray(row["grid"])
        half = (grid[1] - grid[0]) / 2
        extent = (grid[0] - half, grid[-1] + half, grid[0] - half, grid[-1] + half)
        # Rows of an image run down and columns across: the first coefficient goes across.
        image = axis.imshow(np.asarray(row["xi"]).T, origin="lower", extent=extent, vmin=0, vmax=largest, cmap="magma")
        axis.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="white", linewidth=1.2))
        first, second = row["pair"]
        axis.set_title(row["method"])
        axis.set_xlabel(f"α, {first}")
        if len(methods) == 1 or axis.get_subplotspec().is_first_col():
            axis.set_ylabel(f"α, {second}")
        axis.grid(False)
    figure.colorbar(image, ax=axes, shrink=0.85, aspect=25, label="disentanglement error ξ")
    return figure


@styled
def spectra(values: Mapping[str, Sequence[float]]) -> Any:
    """Eigenvalues of kernels, over their rank, both logarithmic; those that are not positive are left out."""
    figure, (axis,) = panels(1, 1, 2.8)
    for name, look in looks(values).items():
        eigenvalues = np.asarray(values[name], np.float64)
        # What is smaller is rounding of the eigenvalue solver.
        positive = eigenvalues > max(eigenvalues.max(), 0.0) * 1e-12
        axis.plot(np.arange(1, len(eigenvalues) + 1)[positive], eigenvalues[positive], label=name, color=look["color"])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("rank")
    axis.set_ylabel("eigenvalue of the kernel")
    legend(figure, axis, 4)
    return figure


@styled
def located(shares: Mapping[str, Mapping[str, float]]) -> Any:
    """A heat map: of the energy of the eigenfunctions that each task vector (rows) moves, the share on each task's data."""
    taus, tasks = list(shares), list(next(iter(shares.values())))
    matrix = np.array([[shares[tau][task] for task in tasks] for tau in taus])
    figure, (axis,) = panels(1, 1, 0.42 * len(taus) + 1.4)
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, j in np.ndindex(*matrix.shape):
        colour = "white" if matrix[i, j] > 0.6 else INK
        axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(taus)), taus)
    axis.set_xlabel("data of")
    axis.set_ylabel("task vector of")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, shrink=0.9, aspect=15, label="share of energy")
    return figure


@styled
def linearity_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> Any:
    """Two panels over the coefficient: the linearization error, and the metric of the model and of its linearization."""
    figure, (left, right) = panels(2, 2, 2.6)
    for name, look in looks(runs).items():
        rows = runs[name]
        known = [row for row in rows if row["error"] is not None]
        left.plot([r["coefficient"] for r in known], [r["error"] for r in known], color=look["color"], label=name)
        x = [row["coefficient"] for row in rows]
        right.plot(x, [row["standard"][metric] for row in rows], color=look["color"], label="model")
        dashed = {"linestyle": (0, (3, 1.5)), "label": "linearized"}
        right.plot(x, [row["linearized"][metric] for row in rows], color=look["color"], **dashed)
    left.axhline(1, color=FAINT, linewidth=0.8)
    left.set_ylim(bottom=0)
    left.set_title("distance from linearity")
    left.set_ylabel("‖f − f_lin‖ / ‖f − f(θ₀)‖")
    right.set_title(f"{metric}: model (solid) and linearized (dashed)")
    for axis in (left, right):
        axis.set_xlabel("coefficient of the task vector")
    legend(figure, left, 4)
    return figure
