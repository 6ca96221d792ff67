"""Runs that differ in their seed: means, standard errors, and how the report and the tables tell of them."""

import copy
import csv
import html
import json
from pathlib import Path

import numpy as np
import pytest

from jft.analysis import report, seeds, tables

STORED = Path(__file__).parent / "results.json"


@pytest.fixture
def repeated():
    """The stored results as if each run of the first study had been made with three seeds."""
    results = json.loads(STORED.read_text())
    study = results["studies"][0]
    study["seeds"] = [3, 4, 5]
    study["runs"] = [
        {**copy.deepcopy(run), "seed": seed, "score": run["score"] + shift}
        for run in study["runs"]
        for seed, shift in zip(study["seeds"], (-0.03, 0.0, 0.03), strict=True)
    ]
    for method in study["methods"]:
        method["error"] = seeds.error_of_mean([run for run in study["runs"] if run["method"] == method["name"]])
    return results


def test_standard_error():
    values = [0.2, 0.5, 0.8, 0.9]
    by_hand = (sum((v - 0.6) ** 2 for v in values) / 3 / 4) ** 0.5
    assert seeds.standard_error(values) == pytest.approx(by_hand, rel=1e-12)
    assert seeds.standard_error([0.4]) is None, "one run says nothing of others"


def test_error_of_the_mean_over_tasks_is_over_seeds():
    """What seeds do to two tasks together, not how far the tasks lie apart."""
    scores = {("a", 0): 0.9, ("a", 1): 0.7, ("b", 0): 0.1, ("b", 1): 0.3}
    runs = [{"task": t, "seed": s, "score": x} for (t, s), x in scores.items()]
    assert seeds.error_of_mean(runs) == pytest.approx(0, abs=1e-12)


def test_cells(repeated):
    study = repeated["studies"][0]
    cells = seeds.cells(study["runs"])
    assert len(cells) == len(study["tasks"]) * len(study["methods"])
    first = [run for run in study["runs"] if (run["task"], run["method"]) == (cells[0]["task"], cells[0]["method"])]
    assert cells[0]["seeds"] == 3
    assert cells[0]["score"] == pytest.approx(np.mean([run["score"] for run in first]))
    assert cells[0]["error"] == pytest.approx(0.03 / 3**0.5)
    assert cells[0]["curve"] == [pytest.approx(point) for point in first[0]["curve"]], "three times the same"


def test_report_says_mean_and_error(repeated, tmp_path):
    page = html.unescape(report.write(repeated, tmp_path).read_text())
    assert "<small>±\u20091.7</small>" in page
    assert "Means over 3 seeds, below them ± their standard error" in page
    assert "seed_N/task_vector.safetensors" in page


def test_means_have_a_table_of_their_own(repeated, tmp_path):
    study = repeated["studies"][0]
    tables.write(study, tmp_path)
    with (tmp_path / f"{study['name']}_means.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(study["tasks"]) * len(study["methods"])
    assert {row["seeds"] for row in rows} == {"3"}
    assert float(rows[0]["error"]) == pytest.approx(0.03 / 3**0.5)
    assert "means" not in tables.rows(repeated["studies"][1]), "one run each has no mean"


@pytest.mark.parametrize("wrong", [(0, 0), (0.5,), (-1,), (True,)])
def test_wrong_seeds_are_refused(wrong):
    with pytest.raises(ValueError, match=r"seeds are .*; give different whole numbers"):
        seeds.check(wrong)


def test_rows_of_seeds_become_means():
    rows = [
        {"method": m, "seed": s, "absolute": x, "tasks": {"a": {"absolute": x}}, "curve": [{"c": 0.5, "mean": x}]}
        for m, s, x in (("lora", 0, 0.2), ("full", 0, 0.4), ("full", 1, 0.8))
    ]
    lora, full = seeds.averaged(rows, ("method",))
    assert (lora["method"], lora["seeds"], lora["errors"]["absolute"]) == ("lora", 1, None)
    assert full["absolute"] == full["tasks"]["a"]["absolute"] == full["curve"][0]["mean"] == pytest.approx(0.6)
    assert full["errors"] == {"absolute": pytest.approx(0.2)}
    assert "seed" not in full
