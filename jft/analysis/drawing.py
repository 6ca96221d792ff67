"""The style of jft's figures, their layout, and files of them.

Colours are Okabe and Ito's, told apart by readers with any colour vision; each method also has its own marker.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
DASHES = (3, 1.5)
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
    # Above a spare one, shared ticks would have no numbers.
    for axis in axes[count - columns : count]:
        axis.tick_params(labelbottom=True)
    return figure, axes[:count]


def lowest(axes: Sequence[Any]) -> list[Any]:
    """The axes of :func:`panels` that have none below them: those that name what is common along x."""
    columns = axes[0].get_subplotspec().get_gridspec().ncols
    return list(axes[-columns:])


def curve(
    axis: Any, x: Sequence[float], y: Sequence[float], look: Mapping[str, Any], dashed: bool = False, **line: Any
) -> None:
    """A line smoothed over a twentieth of its points, the values themselves faint behind it.

    look: of :func:`looks`. Where lines coincide all show: later ones have smaller markers, and at other points. dashed: with
    hollow markers, for what belongs to a solid line of the same look.
    """
    span = len(x) // 20
    if span > 1:
        axis.plot(x, y, color=look["color"], linewidth=0.7, alpha=0.3)
    number = MARKERS.index(look["marker"])
    # A run may have a single point, which no line shows.
    between = max(2, len(x) // 6) if len(x) > 6 else 1
    first = number * between // len(MARKERS) if between >= len(MARKERS) else number % between
    width = 1.7 - 0.1 * number
    line |= {"linewidth": 1.3 * width, "markersize": 5 - 0.3 * number, "markevery": (first, between)}
    if dashed:
        # Dashes of later lines begin later, so that they leave gaps to those below.
        line |= {"linewidth": width, "markerfacecolor": "white", "linestyle": (1.1 * number, DASHES)}
    axis.plot(x, smooth(y, span), **look, **line)


def smooth(values: Sequence[float], span: int) -> np.ndarray:
    """Centred running mean over ``span`` points, shorter at the ends, ``[N] -> [N]``."""
    x = np.asarray(values, np.float64)
    if span <= 1 or len(x) < 3:
        return x
    span = min(span, len(x))
    kernel = np.ones(span)
    # The second convolution counts the points, of which there are fewer at the ends.
    return np.convolve(x, kernel, "same") / np.convolve(np.ones(len(x)), kernel, "same")


def logarithmic(axis: Any, ratio: float = 30) -> None:
    """Give the y axis of positive lines a log scale where their largest value is more than ``ratio`` times the smallest."""
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axis.lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > ratio * values.min():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axis.set_yscale("log")
        few = values.max() > 1000 * values.min()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())


# To the right if there is room, as one reads; then left, above and below.
_SIDES = (
    ((8, 0), "left", "center"),
    ((-8, 0), "right", "center"),
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
)


def name_points(axis: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the name of each point beside it, where it covers no other point nor name and stays inside the axes."""
    figure = axis.figure
    figure.draw_without_rendering()
    places = axis.transData.transform(list(points.values()))
    size = 5 * figure.dpi / 72
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size) for x, y in places]
    for name, point in points.items():
        texts = []
        for offset, ha, va in _SIDES:
            text = axis.annotate(
                name, point, xytext=offset, textcoords="offset points", ha=ha, va=va, color=INK, fontsize=8.5
            )
            box = text.get_window_extent()
            # What lies outside the axes counts as much as what lies under another.
            covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
            outside = _area(box) - _area(Bbox.intersection(box, axis.bbox))
            texts.append((covered + outside, text, box))
        best = min(range(len(texts)), key=lambda i: texts[i][0])
        taken.append(texts[best][2])
        for i, (_, text, _) in enumerate(texts):
            if i != best:
                text.remove()


def _area(box: Any) -> float:
    return 0.0 if box is None else float(box.width * box.height)


def legend(figure: Any, axis: Any, count: int, handles: Sequence[Any] = (), title: str | None = None) -> None:
    """One legend above the figure for the lines of ``axis`` (or ``handles``), in ``count`` columns or what fits.

    None for a single line. title: that of the figure.
    """
    handles = handles or axis.get_legend_handles_labels()[0]
    labels = [handle.get_label() for handle in handles]
    if len(labels) > 1:
        inches = 0.6 + 0.08 * max(map(len, labels))  # of a column: the line, and its longest label
        fit = max(1, int(figure.get_figwidth() / inches))
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=min(count, fit),
            title=title,
            alignment="left",
            title_fontproperties={"weight": "bold", "size": 11},
        )


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
