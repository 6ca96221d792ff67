"""Figures: what is in which panel, smoothed lines, equal lines, names of points, and tables that fit their page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.transforms import Bbox

from jft.analysis import drawing, plots, report

MUTATIONS = [
    ("jft/analysis/drawing.py", "span = len(x) // 20", "span = 0"),
    ("jft/analysis/drawing.py", '"linestyle": (1.1 * number, DASHES)', '"linestyle": "solid"'),
    ("jft/analysis/drawing.py", "width = 1.7 - 0.1 * number", "width = 1.7"),
    ("jft/analysis/drawing.py", "axis.tick_params(labelbottom=True)", "axis.tick_params(labelbottom=False)"),
    ("jft/analysis/drawing.py", "values.max() > ratio * values.min()", "values.max() > ratio + values.min()"),
    ("jft/analysis/drawing.py", "best = min(range(len(texts))", "best = max(range(len(texts))"),
    ("jft/analysis/plots.py", 'dashed=split == "eval"', "dashed=False"),
]
STEPS = list(range(10, 2010, 10))
EVALUATED = STEPS[19::20]


def series():
    rng = np.random.default_rng(0)
    losses = list(2 * np.exp(-np.array(STEPS) / 400) + 0.5 + 0.1 * rng.standard_normal(len(STEPS)))
    scores = list(2 * np.exp(-np.array(EVALUATED) / 400) + 0.6)
    return {
        "train/loss": {"a": (STEPS, losses), "b": (STEPS, losses)},
        "eval/loss": {"a": (EVALUATED, scores), "b": (EVALUATED, scores)},
        "train/far": {"a": (STEPS, list(np.linspace(100, 140, len(STEPS))))},
        "train/grad_norm": {"a": (STEPS, list(np.exp(3 * rng.standard_normal(len(STEPS)))))},
    }


def test_training_and_evaluation_in_one_panel():
    given = series()
    figure = plots.metric_curves(given, "sweep")
    loss, far, norm = figure.axes
    assert far.get_yscale() == "linear"
    assert (loss.get_title(loc="left"), norm.get_title(loc="left")) == ("loss", "grad norm")
    assert loss.get_yscale() == "linear" and norm.get_yscale() == "log"
    raw, smoothed, _, _, evaluation, _ = loss.lines
    losses = np.array(given["train/loss"]["a"][1])
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    assert raw.get_alpha() < 0.5 and raw.get_zorder() <= smoothed.get_zorder()
    # Ten points are a twentieth of 200; inside, an even window reaches one further back.
    np.testing.assert_allclose(smoothed.get_ydata()[100], losses[95:105].mean())
    np.testing.assert_array_equal(evaluation.get_ydata(), given["eval/loss"]["a"][1])
    assert evaluation.is_dashed() and not smoothed.is_dashed() and evaluation.get_markerfacecolor() == "white"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "training", "evaluation"]
    assert legend.get_title().get_text() == "sweep"


def test_equal_lines_all_show():
    lines = plots.metric_curves(series()).axes[0].lines
    for first, second in ((lines[1], lines[3]), (lines[4], lines[5])):
        np.testing.assert_array_equal(first.get_ydata(), second.get_ydata())
        assert first.get_linewidth() > second.get_linewidth() and first.get_markersize() > second.get_markersize()
        assert first.get_markevery()[0] != second.get_markevery()[0] and first.get_color() != second.get_color()


def test_panels_above_a_spare_one_have_numbers():
    _, axes = drawing.panels(5, 3, 2.0, sharex=True, sharey=True)
    shown = [axis.xaxis.get_tick_params()["labelbottom"] for axis in axes]
    assert shown == [False, False, True, True, True]
    assert drawing.lowest(axes) == axes[2:]


@pytest.mark.parametrize("apart", [1.6, 1.05])
def test_names_of_points_do_not_overlap(apart):
    names = ["bitfit", "masking", "full"]
    places = [(1e4, 81.5), (1e4 * apart, 81.52), (1e6, 88.0)]
    rows = [{"name": n, "bytes": x, "score": y, "error": None} for n, (x, y) in zip(names, places, strict=True)]
    figure = plots.size_against_score(rows, "accuracy")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts]
    assert sorted(text.get_text() for text in axis.texts) == sorted(names)
    for i, box in enumerate(boxes):
        assert all(Bbox.intersection(box, other) is None for other in boxes[:i])
        assert box.x0 >= axis.bbox.x0 and box.x1 <= axis.bbox.x1
    if apart == 1.6:
        points = axis.transData.transform([(row["bytes"], row["score"]) for row in rows])
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_the_table_of_negation_fits_its_page():
    """A column for each method, and two for the task and the base."""
    results = json.loads((Path(__file__).parent / "results.json").read_text())
    study = next(study for study in results["studies"] if study["negation"])
    page = report.render(results, {s["name"]: {} for s in results["studies"]} | {study["name"]: report.figures(study)})
    table = re.search(r"<h3>Negation.*?<thead>(.*?)</thead>.*?<tbody>(.*?)</tbody>", page, re.S)
    assert table[1].count("<th>") == len(study["methods"]) + 2
    row = study["negation"][0]
    text = re.search(rf"<tr><td>{row['task']}</td>.*?</tr>", table[2], re.S)[0]
    assert f"<b>{100 * row['target']:.1f}</b>" in text and f"<small>{100 * row['control']:.1f}</small>" in text
    assert f"<small>λ {row['coefficient']:.2f}</small>" in text
