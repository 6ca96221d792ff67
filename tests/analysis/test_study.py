"""The quickstart's config, scaled down, from the command to the report; and again, with nothing left to run."""

import csv
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import jft
from jft.analysis import run_store, settings, study, task_runs
from jft.cli import main
from tests.analysis import devices

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
TASKS, METHODS = ["upright", "rotated", "inverted", "parity"], ["full", "bitfit", "masking", "linear", "posthoc"]


def shortened(tasks, methods):
    """The text of a config: the quickstart's, with some of the tasks, methods and scans of its first study."""
    return f"""
import runpy

def get_config():
    config = runpy.run_path({str(QUICKSTART)!r})["get_config"]()
    for part, kept in (("tasks", {tasks}), ("methods", {methods})):
        for name in set(config.studies.digits[part]) - set(kept):
            del config.studies.digits[part][name]
    with config.unlocked():
        for task in config.studies.digits.tasks.values():
            task.data.limit = 100  # of each split: two batches, the second filled up
    return config
"""


SMALL = [
    "--config.studies.digits.base.train.steps=6",
    "--config.studies.digits.common.steps=3",
    "--config.studies.digits.common.batch_size=64",
    "--config.studies.digits.common.log.every=1",
    "--config.studies.digits.base.train.model.options.layers=1",
    "--config.studies.digits.base.train.model.options.width=16",
    "--config.studies.digits.base.train.model.options.hidden=32",
    "--config.studies.digits.arithmetic.points=3",
    "--config.studies.digits.disentangle.points=3",
    "--config.studies.library.base.train.steps=6",
    "--config.studies.library.common.steps=3",
    "--config.studies.library.common.log.every=1",
    "--config.studies.library.base.train.model.options.layers=1",
    "--config.studies.library.base.train.model.options.width=16",
    "--config.studies.library.seeds=(1,2)",
    "--config.studies.library.tasks.docstrings.test_data.limit=5",
    "--config.studies.library.tasks.docstrings.eval_data.limit=5",
]


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    with devices.first(2):
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, two_devices):
    folder = tmp_path_factory.mktemp("study") / "quickstart"
    folder.parent.joinpath("small.py").write_text(shortened(TASKS, METHODS))
    assert main.call(again(folder)) == 0
    return folder


def again(workdir, *more):
    return ["quickstart", f"--config={workdir.parent / 'small.py'}", f"--workdir={workdir}", *SMALL, *more]


@pytest.mark.slow
def test_everything_is_written(workdir):
    results = json.loads((workdir / "results.json").read_text())
    digits, library = results["studies"]
    assert [task["name"] for task in digits["tasks"]] == TASKS
    assert [method["name"] for method in digits["methods"]] == METHODS
    assert len(digits["runs"]) == 4 * 5
    assert len(digits["addition"]) == 5
    assert len(digits["negation"]) == 3 * 5, "the control itself is not negated"
    assert results["config"]["studies"]["digits"]["common"]["steps"] == 3, "what ran, not what the file says"
    assert library["metric"] == "bits_per_byte"
    assert library["tasks"][0]["base"] == pytest.approx(8, abs=2), "a model of bytes that has learnt next to nothing"
    with (workdir / "digits_scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * 5
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
    parity, upright = (
        jft.TaskVector.load(workdir / "digits" / t / "full" / "task_vector.safetensors") for t in ("parity", "upright")
    )
    assert not any(path.startswith("classifier") for path in (parity + upright).paths)
    bias = jft.TaskVector.load(workdir / "digits" / "parity" / "bitfit" / "task_vector.safetensors")
    assert all(path.endswith(("/b", "/bias")) for path in bias.paths)


@pytest.mark.slow
def test_a_second_start_runs_nothing(workdir, capsys):
    results = [*workdir.rglob("task_vector.safetensors"), *workdir.rglob("arithmetic_*.json")]
    written = {path: path.stat().st_mtime_ns for path in results}
    assert {path.name for path in results} >= {"task_vector.safetensors", "arithmetic_posthoc.json"}
    before = json.loads((workdir / "results.json").read_text())["studies"]
    assert main.call(again(workdir)) == 0
    assert {path: path.stat().st_mtime_ns for path in results} == written
    assert json.loads((workdir / "results.json").read_text())["studies"] == before


@pytest.mark.slow
def test_a_fleet_gives_each_task_what_a_run_by_itself_would(workdir, tmp_path):
    """The task vectors of the fleet of all tasks, from a study that trains them one by one; and of one that is missing."""
    some = ["upright", "rotated", "inverted"]
    alone, once_more = tmp_path / "alone" / "quickstart", tmp_path / "quickstart"
    alone.parent.mkdir()
    alone.parent.joinpath("small.py").write_text(shortened(some, ["full"]))
    assert main.call(again(alone, "--config.studies.digits.fleet=False", "--config.studies.library.seeds=(1,)")) == 0
    assert not (alone / "digits" / "fleets").exists()
    shutil.copytree(workdir, once_more)
    shutil.copy(workdir.parent / "small.py", tmp_path)
    (once_more / "digits" / "rotated" / "full" / "outcome.json").unlink()
    assert main.call(again(once_more)) == 0
    assert [path.name[:12] for path in (workdir / "digits" / "fleets").glob("full*")] == ["full_seed_0_"]
    for folder, names in ((alone, some), (once_more, ["rotated"])):
        for task in names:
            path = Path("digits", task, "full", "task_vector.safetensors")
            fleet, run = jft.TaskVector.load(workdir / path), jft.TaskVector.load(folder / path)
            assert fleet.manifest["base"] == run.manifest["base"]
            # The gradient of a key's bias is zero but for rounding, which Adam brings to the size of a step.
            apart = (fleet - run).exclude("attn/k/b")
            assert apart.norm() < 1e-2 * run.norm(), (task, float(apart.norm() / run.norm()))


def test_fleets_are_of_runs_that_differ_in_their_data_alone():
    """Not of methods that select anew, nor of a task with another number of steps."""
    digits = run_store.plain(runpy.run_path(str(QUICKSTART))["get_config"]())["studies"]["digits"]
    digits["tasks"]["loops"]["steps"] = 7
    digits["methods"]["anew"] = {"method": {"name": "spiel_ag", "density": 0.1}}

    def groups(method, together=True):
        tasks = [SimpleNamespace(name=name, model="model", objective="classification") for name in digits["tasks"]]
        runs = [
            task_runs.Training(task, method, settings.of_run(digits, task.name, method), Path(), {}) for task in tasks
        ]
        return [[run.task.name for run in fleet] for fleet in task_runs._fleets(runs, together)]

    single = [[name] for name in digits["tasks"]]
    assert groups("full") == [["upright", "rotated", "inverted", "mirrored", "parity"], ["loops"]]
    assert groups("full", together=False) == groups("anew") == single


@pytest.mark.slow
def test_another_config_in_the_same_place_is_refused(workdir, capsys):
    assert main.call(again(workdir, "--config.studies.digits.common.optimizer.b2=0.9")) == 1
    assert "holds a finished run of another config (they differ in: optimizer)" in capsys.readouterr().err


@pytest.mark.slow
def test_linearized_methods_are_evaluated_linearized(workdir):
    """`posthoc` has the task vectors of `full`, and the scores of the model linearized at the base."""
    digits = json.loads((workdir / "results.json").read_text())["studies"][0]
    forwards = {method["name"]: method["forward"] for method in digits["methods"]}
    assert {name for name, forward in forwards.items() if forward == "linearized"} == {"linear", "posthoc"}
    runs = {(run["task"], run["method"]): run for run in digits["runs"]}
    assert runs["rotated", "posthoc"]["norm"] == runs["rotated", "full"]["norm"]
    assert not (workdir / "digits" / "rotated" / "posthoc").exists(), "it trains nothing"
    assert {(row["method"], row["task"]) for row in digits["advantage"]} == {
        (method, task["name"]) for method in ("linear", "posthoc") for task in digits["tasks"]
    }
    maps = digits["disentanglement"]
    assert [row["method"] for row in maps] == [method["name"] for method in digits["methods"]]
    assert all(row["pair"] == ["rotated", "inverted"] for row in maps)
    for row in maps:
        zero = row["grid"].index(0)
        assert row["xi"][zero][zero] == 0
    with (workdir / "digits_disentanglement.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(maps) * len(maps[0]["grid"]) ** 2


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"a": {"of": "b"}, "b": {"of": "c"}}, "of='b' is not one that trains"),
        ({"full": {}, "a": {"of": "full", "forward": "linear"}}, "forward 'linear' is unknown"),
        ({"full": {"forward": "linearized"}}, "method 'full' trains; forward belong"),
        ({"full": {}, "a": {"of": "full", "optimizer": {}}}, "it has no 'optimizer'"),
    ],
)
def test_wrong_uses_of_others_vectors_are_refused(methods, said):
    config = study.collection(
        "t",
        one=study.study(
            base={"source": "x"}, common={"steps": 1}, tasks={"t": {"data": {"source": "digits"}}}, methods=methods
        ),
    )
    with pytest.raises(ValueError, match=said):
        study.check(config)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"disentangle": {"pairs": (("t", "u"),)}}, r"\('t', 'u'\) is no pair of the tasks t"),
        ({"disentangle": {"pairs": (("t", "t"),), "lowest": 2.0, "largest": 3.0, "points": 2}}, "none lies in .0, 1."),
        ({"nonlinear": "other"}, "nonlinear 'other' is not one of full"),
    ],
)
def test_wrong_names_are_refused(parts, said):
    config = study.study(
        base={"source": "x"}, tasks={"t": {"data": {"source": "digits"}}}, methods={"full": {}}, **parts
    )
    with pytest.raises(ValueError, match=said):
        study.check(study.collection("t", one=config))
