"""The style of jft's figures, their layout, and files of them.

Colours are Okabe and Ito's, told apart by readers with any colour vision; each method also has its own marker.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jft import files

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, FAINT, GRID = "#222222", "#767676", "#E4E4E4"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9A9A9A",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    # Outlines: a reader need not have the font.
    "svg.fonttype": "path",
    # Ids by a fixed salt: the same figure is the same bytes.
    "svg.hashsalt": "jft",
}
WIDTH = 9.6  # inches: the text width of the report


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``{name: matplotlib line properties}``: the same name looks the same in every figure of a study."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def panels(count: int, columns: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of ``count`` small multiples, and its axes in reading order."""
    # Not pyplot, which would choose a backend and keep every figure.
    from matplotlib.figure import Figure

    rows = math.ceil(count / max(1, columns))
    columns = math.ceil(count / rows)  # as even as it gets: six panels are 3 + 3, not 4 + 2
    width = WIDTH if columns > 2 else WIDTH * (0.45 + 0.25 * (columns - 1))
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def legend(figure: Any, axis: Any, count: int) -> None:
    """One legend above the figure for the lines of ``axis``, in ``count`` columns or what fits; none for a single line."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        inches = 0.6 + 0.08 * max(map(len, labels))  # of a column: the line, and its longest label
        fit = max(1, int(figure.get_figwidth() / inches))
        figure.legend(handles, labels, loc="outside upper left", ncols=min(count, fit))


def styled(draw: Any) -> Any:
    """Run ``draw`` under :data:`STYLE`, whatever the caller's matplotlib settings are."""
    import functools

    @functools.wraps(draw)
    def wrapped(*args: Any, **options: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return wrapped


@styled
def save(figure: Any, path: Path) -> None:
    """Write a figure as the PNG ``path``, whole or not at all."""
    with files.whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


@styled
def svg(figure: Any) -> str:
    """A figure as SVG text, the same bytes for the same figure."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
