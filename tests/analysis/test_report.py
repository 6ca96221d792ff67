"""The report renders from stored results, whole and by itself; numbers are written alike everywhere."""

import html
import json
import re
from pathlib import Path

import pytest

from jft.analysis import report, tables

STORED = Path(__file__).parent / "results.json"


@pytest.fixture(scope="module")
def results():
    return json.loads(STORED.read_text())


def test_report_is_one_file_with_every_table(results, tmp_path):
    page = html.unescape(report.write(results, tmp_path).read_text())
    for heading in ("Fine-tuning", "Addition: one model for all tasks", "Negation: forgetting one task", "Reproduce"):
        assert heading in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page), "nothing is fetched"
    assert "<script" not in page
    for study in results["studies"]:
        assert study["title"] in page
        for run in study["runs"]:
            assert report.score(run["score"], study["metric"]) in page
    assert len(list((tmp_path / "plots").glob("*.png"))) >= 6


def test_same_results_same_page(results):
    assert report.render(results) == report.render(results)


def test_names_are_escaped(results):
    changed = {**results, "title": "<b>bold</b>"}
    assert "<b>bold</b>" not in report.render(changed)


def test_tables(results, tmp_path):
    study = results["studies"][0]
    found = tables.rows(study)
    assert len(found["scores"]) == len(study["tasks"]) * len(study["methods"])
    assert {row["task"] for row in found["addition"]} == {task["name"] for task in study["tasks"]} | {"mean"}
    for path in tables.write(study, tmp_path):
        assert path.read_text().count("\n") == len(found[path.stem.removeprefix(study["name"] + "_")]) + 1


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (report.percent(0.93449), "93.4"),
        (report.percent(None), "–"),
        (report.density(1.0), "100 %"),
        (report.density(0.01234), "1.23 %"),
        (report.density(0.00012), "0.012 %"),
        (report.count(1234567), "1\u2009234\u2009567"),
        (report.size(999), "999 B"),
        (report.size(689123), "689 kB"),
        (report.size(1.5e9), "1.50 GB"),
        (report.duration(0.0123), "12.3 ms"),
        (report.duration(4.5678), "4.57 s"),
        (report.duration(151), "2 min 31 s"),
        (report.duration(7300), "2 h 1 min"),
        (report.score(2.34567, "bits_per_byte"), "2.346"),
    ],
)
def test_formats(made, text):
    assert made == text
