"""The quickstart's own config, scaled down, from the command to the report; and again, with nothing left to run."""

import csv
import json

import pytest

import jft
from jft.cli import main

SMALL = [
    "--config.studies.digits.base.train.steps=6",
    "--config.studies.digits.common.steps=3",
    "--config.studies.digits.common.batch_size=16",
    "--config.studies.digits.common.log.every=1",
    "--config.studies.digits.base.train.model.options.layers=1",
    "--config.studies.digits.arithmetic.points=3",
    "--config.studies.library.base.train.steps=6",
    "--config.studies.library.common.steps=3",
    "--config.studies.library.common.log.every=1",
    "--config.studies.library.base.train.model.options.layers=1",
    "--config.studies.library.seeds=(1,2)",
    "--config.studies.library.tasks.docstrings.test_data.limit=5",
    "--config.studies.library.tasks.docstrings.eval_data.limit=5",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "quickstart"
    assert main.call(["quickstart", f"--workdir={folder}", *SMALL]) == 0
    return folder


@pytest.mark.slow
def test_everything_is_written(workdir):
    results = json.loads((workdir / "results.json").read_text())
    digits, library = results["studies"]
    assert [task["name"] for task in digits["tasks"]] == [
        "upright",
        "rotated",
        "inverted",
        "mirrored",
        "parity",
        "loops",
    ]
    assert [method["name"] for method in digits["methods"]] == ["full", "lora", "bitfit", "blocks", "lift", "masking"]
    assert len(digits["runs"]) == 36
    assert len(digits["addition"]) == 6
    assert len(digits["negation"]) == 30, "the control itself is not negated"
    assert results["config"]["studies"]["digits"]["common"]["steps"] == 3, "what ran, not what the file says"
    assert library["metric"] == "bits_per_byte"
    assert library["tasks"][0]["base"] == pytest.approx(8, abs=2), "a model of bytes that has learnt next to nothing"
    with (workdir / "digits_scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 36
    assert "data:image/svg+xml" in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_a_run_for_each_seed(workdir):
    library = json.loads((workdir / "results.json").read_text())["studies"][1]
    assert [(run["method"], run["seed"]) for run in library["runs"]] == [
        ("full", 1),
        ("full", 2),
        ("lora", 1),
        ("lora", 2),
    ]
    one, other = (
        jft.TaskVector.load(workdir / "library" / "docstrings" / "full" / f"seed_{seed}" / "task_vector.safetensors")
        for seed in (1, 2)
    )
    assert one.cosine(other) < 0.999, "other data"
    assert all(method["error"] > 0 for method in library["methods"])


@pytest.mark.slow
def test_task_vectors_live_in_one_space(workdir):
    parity, loops = (
        jft.TaskVector.load(workdir / "digits" / t / "full" / "task_vector.safetensors") for t in ("parity", "loops")
    )
    assert not any(path.startswith("classifier") for path in (parity + loops).paths)
    bias = jft.TaskVector.load(workdir / "digits" / "parity" / "bitfit" / "task_vector.safetensors")
    assert all(path.endswith(("/b", "/bias")) for path in bias.paths)


@pytest.mark.slow
def test_a_second_start_runs_nothing(workdir, capsys):
    written = {path: path.stat().st_mtime_ns for path in workdir.rglob("task_vector.safetensors")}
    before = json.loads((workdir / "results.json").read_text())["studies"]
    assert main.call(["quickstart", f"--workdir={workdir}", *SMALL]) == 0
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("task_vector.safetensors")} == written
    assert json.loads((workdir / "results.json").read_text())["studies"] == before


@pytest.mark.slow
def test_another_config_in_the_same_place_is_refused(workdir, capsys):
    changed = [*SMALL, "--config.studies.digits.common.optimizer.b2=0.9"]
    assert main.call(["quickstart", f"--workdir={workdir}", *changed]) == 1
    assert "holds a finished run of another config (they differ in: optimizer)" in capsys.readouterr().err
