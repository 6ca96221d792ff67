"""The merging study, scaled down to scikit-learn's digits and a few steps, and what its parts compute."""

import csv
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import jft
from jft import merge
from jft.analysis import merging, merging_inputs, merging_plots, merging_rules, run_store, study
from jft.cli import main
from tests.analysis import devices
from tests.merge.test_registry import OTHERS

CONFIG = Path(__file__).parents[2] / "configs" / "merging.py"
RULES = ("task_arithmetic", "fisher", "emr", "wise_ft", "adamerging_task")
SHORT = f"""
import runpy

def get_config():
    config = runpy.run_path({str(CONFIG)!r})["get_config"]("digits")
    vision = config.studies.vision
    for method in ("lora", "linear"):
        del vision.methods[method]
    with config.unlocked():
        vision.base.train.steps, vision.base.train.batch_size = 30, 32
        vision.base.train.model.options.update(image=8, patch=4, width=16, layers=1, heads=2, hidden=32)
        for data in [vision.base.train.data] + [t[p] for t in vision.tasks.values() for p in t]:
            data.image.size = 8
        for task in vision.tasks.values():
            task.eval_data.limit = task.test_data.limit = 64
        vision.common.update(steps=8, batch_size=32)
        # Far enough from the base that tasks and their vectors differ in what they predict.
        vision.methods.full.optimizer.lr = 0.03
        for method in vision.methods.values():
            method.seeds = (3,)
        vision.merging.methods = {{"full": {RULES}}}
        vision.merging.update(examples=16, batch_size=8, steps=5, grid=(0.0, 0.5, 1.0))
        vision.grafting.update(densities=(0.1,), steps=2)
        vision.other_tasks.update(examples=16, batch_size=8, draws=1)
        vision.arithmetic.update(points=3, negation=False)
    return config
"""
MUTATIONS = [
    ("jft/analysis/merging.py", "taus = [by_task[task]]", "taus = [by_task[next(iter(by_task))]]"),
    ("jft/analysis/merging.py", 'x / single["test"][task]', 'x / single["validation"][task]'),
    ("jft/analysis/merging.py", 'options["pair"][:1]', 'options["pair"][1:]'),
    ("jft/analysis/merging_inputs.py", '+ b[batch["task"]]', "+ b[0]"),
    ("jft/analysis/other_tasks.py", 'if key != "labels"', 'if key != "images"'),
    ("jft/analysis/task_runs.py", "if other.name != task.name]", "if other.name == task.name]"),
]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with devices.first(1):
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one_device):
    folder = tmp_path_factory.mktemp("merging") / "study"
    folder.parent.joinpath("short.py").write_text(SHORT)
    assert main.call(command(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def results(workdir):
    return json.loads((workdir / "results.json").read_text())["studies"][0]


def command(workdir):
    return ["quickstart", f"--config={workdir.parent / 'short.py'}", f"--workdir={workdir}"]


# What is no merge of several tasks into one model by itself: other bases, safety, compression, parts and searches.
LEFT_OUT = {
    *("transfer", "recycle", "shadow_ft", "re_adapt", "pre_post", "irr", "half_reset", "compress"),
    *("localize", "graft", "align", "learn", "layerwise", "with_lines"),
    *("tune", "coordinate_search", "evaluate_points", "load_statistics", "save_statistics"),
    *OTHERS,
}


def test_every_rule_has_a_row():
    known = merging_rules.entries()
    for name in set(merge.__all__) - LEFT_OUT:
        assert any(row == name or row.startswith(f"{name}_") for row in known), name
    registered = {name for name, rule in merge.RULES.items() if rule.build().statistics}
    assert registered == set(merging_rules.STATISTICS), "what these read is named"


def test_the_table_of_rules(workdir, results):
    rows = {row["rule"]: row for row in results["merging"]}
    assert list(rows) == list(RULES)
    runs = {run["task"]: run for run in results["runs"] if run["method"] == "full"}
    for row in rows.values():
        assert set(row["tasks"]) == {"scans", "primes"}
        values = [(row["tasks"][t]["absolute"], runs[t]["score"]) for t in runs]
        assert row["absolute"] == pytest.approx(np.mean([a for a, _ in values]))
        assert row["normalised"] == pytest.approx(np.mean([a / s for a, s in values]))
    assert rows["emr"]["each"] and not rows["fisher"]["each"]
    assert rows["wise_ft"]["models"] == 1 and rows["fisher"]["models"] is None
    learned = rows["adamerging_task"]
    assert learned["last"] < learned["first"] and rows["fisher"]["first"] is None
    with (workdir / "vision_merging.csv").open() as file:
        assert [row["rule"] for row in csv.DictReader(file)] == list(RULES)
    page = (workdir / "report.html").read_text()
    assert "Merging rules" in page and "Grafting" in page and (workdir / "plots" / "vision_merging.png").exists()


def test_scores_are_those_of_the_merged_model(workdir, results):
    """The sum of both task vectors, and the vector of the first task, measured once more by hand."""
    rows = {row["rule"]: row for row in results["merging"]}
    config = run_store.plain(runpy.run_path(str(workdir.parent / "short.py"))["get_config"]())["studies"]["vision"]
    base = study.prepare(config["base"], config["common"], workdir / "vision" / "base")
    tasks = study.prepare_all(config, base, workdir / "vision")
    vectors = [
        jft.TaskVector.load(workdir / "vision" / t / "full" / "seed_3" / "task_vector.safetensors") for t in tasks
    ]
    single = {run["task"]: run["score"] for run in results["runs"] if run["method"] == "full"}
    score = lambda tau: {t: task.score("test", jft.apply(base.params, tau)) for t, task in tasks.items()}
    both = score(vectors[0] + vectors[1])
    assert rows["task_arithmetic"]["plain"] == pytest.approx(np.mean(list(both.values())), abs=1e-6)
    assert rows["task_arithmetic"]["plain_normalised"] == pytest.approx(np.mean([both[t] / single[t] for t in tasks]))
    half = score(0.5 * vectors[0])
    assert rows["wise_ft"]["plain"] == pytest.approx(np.mean(list(half.values())), abs=1e-6)
    emr = merge.emr(vectors)
    own = [tasks[t].score("test", jft.apply(base.params, tau)) for t, tau in zip(tasks, emr, strict=True)]
    assert rows["emr"]["plain"] == pytest.approx(np.mean(own), abs=1e-6)
    first = [task.score("test", jft.apply(base.params, emr[0])) for task in tasks.values()]
    assert first != own, "or the vector of one task would do for both"
    # What learns reads each example by the head of its own task.
    inputs = merging_inputs.Inputs.of(config, base, tasks, results["runs"], "full", 3, workdir / "vision")
    logits = jax.jit(inputs.logits)(base.params, inputs.together[0])
    apart = [
        jax.jit(task.model.apply)(task.params(base.params), batches[0])
        for task, batches in zip(tasks.values(), inputs.batches.values(), strict=True)
    ]
    np.testing.assert_allclose(logits, np.concatenate(apart), rtol=1e-4, atol=1e-4)
    # And a second start merges nothing.
    before = {path: path.stat().st_mtime_ns for path in (workdir / "vision" / "merging").rglob("*.json")}
    again = merging.rows(config, base, tasks, results["runs"], workdir / "vision", print)
    assert again == results["merging"] and len(before) == len(RULES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_tasks_are_read(workdir, results):
    """TAK and tau-Jp train with a file of the other task, and end elsewhere than each other."""
    folder = workdir / "vision"
    with np.load(folder / "primes" / "inputs.npz") as file:
        assert file.files == ["images"] and file["images"].shape == (2, 8, 8, 8, 1)
    vectors = {
        m: jft.TaskVector.load(folder / "scans" / m / "seed_3" / "task_vector.safetensors") for m in ("tak", "tau_jp")
    }
    assert vectors["tak"].manifest["method"]["forward"] == "linearized"
    assert vectors["tak"].cosine(vectors["tau_jp"]) < 0.9999
    assert {row["method"] for row in results["addition"]} == {"full", "tak", "tau_jp"}
    own = jft.tangent.Curvature.load(folder / "primes" / "curvature.safetensors")
    read = jft.tangent.Curvature.load(folder / "scans" / "tak" / "seed_3" / "other_tasks.safetensors")
    for path, factors in own.factors.items():
        np.testing.assert_allclose(read.factors[path]["inputs"], factors["inputs"], rtol=1e-6)


def test_grafts(results):
    rows = results["grafting"]
    assert [(row["task"], row["density"]) for row in rows] == [("scans", 0.1), ("primes", 0.1)]
    assert all(row["last"] <= row["first"] + 1e-6 or row["learned"] >= row["largest"] for row in rows)
    (mean,) = merging_plots.mean_grafts(rows)
    tuned, base = (np.mean([row[key] for row in rows]) for key in ("tuned", "base"))
    assert mean["largest_gain"] == pytest.approx((np.mean([r["largest"] for r in rows]) - base) / (tuned - base))
    assert mean["learned_kept"] == pytest.approx(np.mean([row["learned"] / row["tuned"] for row in rows]))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"merging": {"methods": {"other": ()}}}, "'other' is not one of full"),
        ({"merging": {"methods": {"full": ("tiess",)}}}, "merging.methods.full: 'tiess' is no rule"),
        ({"merging": {"methods": {"full": ()}, "pair": ("t", "u")}}, "merging.pair is"),
        ({"merging": {"methods": {"full": ()}, "pair": ("t", "t")}, "metric": "loss"}, "merging compares accuracies"),
        ({"grafting": {"method": "ful"}}, "grafting.method 'ful' is not one of full"),
        ({"grafting": {"densities": (0.0,)}}, r"densities are \[0.0\]"),
    ],
)
def test_wrong_names_are_refused(parts, said):
    config = study.study(
        base={"source": "x"}, tasks={"t": {"data": {"source": "digits"}}}, methods={"full": {}}, **parts
    )
    with pytest.raises(ValueError, match=said):
        study.check(run_store.plain(study.collection("t", one=config)))


def test_a_data_set_that_is_no_name_is_refused():
    with pytest.raises(ValueError, match="'cifar' is not one of fashion_mnist"):
        runpy.run_path(str(CONFIG))["get_config"]("cifar")
