"""A fleet is its members' own runs, made by one program over one base."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import jft
from jft.methods import InPlace, Method, Select
from jft.select import budget, granularity, scores
from jft.train import NonFiniteError, Preempted, experiment, preemption, stacked
from jft.train.checkpoints import Changed
from tests.methods import toy
from tests.train import tools

QUIET = {"every": 1, "progress": False}
RATES = (1e-2, 3e-3, 2e-2)


def sparse(seed, unit, density=0.2):
    return Method(
        Select(("w$",), score=scores.Random(seed), granularity=unit, budget=budget.Globally(density=density)),
        InPlace(),
        name="parts",
    )


METHODS = {
    "lora": lambda i: {"name": "lora", "rank": 2},
    "bitfit": lambda i: "bitfit",
    "full": lambda i: "full",
    "entries": lambda i: sparse(i, granularity.Entry()),
    "blocks": lambda i: sparse(i, granularity.Block(4, 1), 0.3),
    "linearized": lambda i: "linearized",
    "linearized blocks": lambda i: dataclasses.replace(sparse(i, granularity.Block(4, 1), 0.3), forward="linearized"),
    "l_lora": lambda i: {"name": "l_lora", "rank": 2, "include": ""},
}


def listed(name, count=3, shared=False):
    data = tools.batches()
    return [
        {
            "name": f"run{i}",
            "data": data if shared else tools.batches(seed=i),
            "seed": i,
            "lr": RATES[i],
            "method": METHODS[name](i),
        }
        for i in range(count)
    ]


def train(fleet, workdir=None, steps=6, data=None, params=None, **options):
    options = {"log": QUIET, "optimizer": {"lr": 1e-3, "weight_decay": 0.1}} | options
    return jft.finetune(
        tools.apply, params or tools.parameters(), data, steps=steps, fleet=fleet, workdir=workdir, **options
    )


def alone(member, steps=6, params=None, **options):
    optimizer = {"lr": member["lr"], "weight_decay": 0.1}
    data, method = member["data"], member["method"]
    options = {"log": QUIET, "optimizer": optimizer, "seed": member["seed"]} | options
    return jft.finetune(tools.apply, params or tools.parameters(), data, steps=steps, method=method, **options)


def assert_same(fleet_run, run, tolerance=2e-6):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance)
    jax.tree.map(close, jax.device_get(fleet_run.params), jax.device_get(run.params))
    assert set(fleet_run.task_vector.paths) == set(run.task_vector.paths)
    for path in run.task_vector.paths:
        ours, theirs = fleet_run.task_vector[path], run.task_vector[path]
        assert type(ours) is type(theirs) and ours.nnz == theirs.nnz
        close(ours.dense(), theirs.dense())
    keys = ("loss", "accuracy", "grad_norm", "param_norm", "update_norm", "lr", "weight")
    for a, b in zip(fleet_run.metrics, run.metrics, strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        close([a[k] for k in keys if k in b], [b[k] for k in keys if k in b])


@functools.cache
def own_run(name, index):
    return alone(listed(name)[index], eval_data=tools.batches(seed=9), accumulate=2)


@pytest.mark.parametrize(
    ("name", "together"), [(name, 3) for name in METHODS] + [("lora", 1), ("entries", 1), ("lora", 2)]
)
def test_each_member_is_its_own_run(name, together, monkeypatch):
    """Different data, seeds, rates and selections; microbatches, decay and evaluation."""
    monkeypatch.setitem(stacked.TOGETHER, "cpu", together)
    runs = train(listed(name), eval_data=tools.batches(seed=9), accumulate=2)
    for i, run in enumerate(runs):
        assert_same(run, own_run(name, i))
        np.testing.assert_allclose(run.evaluation["loss"], own_run(name, i).evaluation["loss"], rtol=1e-4)


UNITS = {"entries": granularity.Entry(), "blocks": granularity.Block(4, 2), "rows": granularity.Row()}


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_selections_of_unequal_size_in_a_stacked_model(unit, monkeypatch):
    """Structured weights under the scan over layers; smaller selections are padded to the largest."""
    monkeypatch.setitem(stacked.TOGETHER, "cpu", 8)
    model = toy.model(layers=2)
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    data = [
        {"x": rng.normal(size=(4, 8)).astype(np.float32), "labels": rng.integers(0, 5, 4).astype(np.int32)}
        for _ in range(3)
    ]
    methods = [
        Method(
            Select(linear_only=True, score=scores.Random(i), granularity=unit, budget=budget.Globally(density=d)),
            InPlace(),
        )
        for i, d in enumerate((0.1, 0.3))
    ]
    options = {"steps": 3, "optimizer": {"lr": 1e-2}, "log": QUIET}
    members = [{"data": data, "method": m, "seed": i} for i, m in enumerate(methods)]
    runs = jft.finetune(model, params, None, fleet=members, **options)
    for i, run in enumerate(runs):
        assert_same(run, jft.finetune(model, params, data, method=methods[i], seed=i, **options))


@pytest.mark.parametrize("count", [2, 3], ids=["members over data", "members whole"])
@pytest.mark.parametrize("name", ["lora", "blocks"])
def test_on_a_mesh(name, count):
    mesh = jft.parallel.make_mesh({"data": 2, "fsdp": 4})
    runs = train(listed(name)[:count], mesh=mesh, steps=3)
    for run, other in zip(runs, train(listed(name)[:count], steps=3), strict=True):
        assert_same(run, other)


@pytest.mark.optimized
def test_going_on_is_bit_for_bit_and_files_are_those_of_runs(tmp_path):
    members = listed("entries")
    whole = train(members, steps=6)
    train(members, tmp_path, steps=4, checkpoint=2)
    again = train(members, tmp_path, steps=6, checkpoint=2)
    for member, run, other in zip(members, again, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state), jax.device_get(other.state))
        assert [m["loss"] for m in run.metrics] == [m["loss"] for m in other.metrics]
        folder = tmp_path / member["name"]
        assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "task_vector.safetensors"]
        loaded = jft.TaskVector.load(folder / "task_vector.safetensors")
        assert loaded.manifest["seed"] == member["seed"] and loaded.manifest["optimizer"]["lr"] == member["lr"]
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, jft.apply(tools.parameters(), loaded), run.params)
    members[1]["lr"] = 0.5
    with pytest.raises(Changed, match=r"fleet.run1.optimizer.lr: 0.003 -> 0.5"):
        train(members, tmp_path, steps=7)


@pytest.mark.parametrize("name", ["full", "lora", "entries", "linearized blocks"])
def test_a_fleet_of_one_is_the_run_by_itself(name, tmp_path):
    """The loop is one: the same result to rounding, the same rows and the same files, but for the step's own axis."""
    member = listed(name, 1)[0]
    options = {"eval_data": tools.batches(seed=9), "eval_every": 2, "steps": 5, "checkpoint": 2}
    (run,) = train([member], tmp_path / "fleet", **options)
    single = alone(member, workdir=tmp_path / "single", **options)
    assert_same(run, single)
    assert run.error is None and single.error is None
    assert [list(row) for row in run.metrics] == [list(row) for row in single.metrics]
    assert [row.get("lr") for row in run.metrics] == [row.get("lr") for row in single.metrics]
    ours, theirs = ({**r.task_vector.manifest, "evaluation": None, "created": None} for r in (run, single))
    assert ours == theirs
    folders = (tmp_path / "fleet" / "run0", tmp_path / "single")
    files = [{p.name for p in folder.iterdir()} - {"checkpoints"} for folder in folders]
    assert files[0] == files[1] == {"metrics.jsonl", "task_vector.safetensors"}


def start(several, data=None, **options):
    """A fleet of two, or its first member by itself; a list of runs."""
    members = [m | ({} if data is None else {"data": data}) for m in listed("lora", 2)]
    return train(members, **options) if several else [alone(members[0], **options)]


@pytest.mark.parametrize("several", [False, True], ids=["run", "fleet"])
def test_stopping_and_going_on_is_one_for_both(several, tmp_path, monkeypatch):
    """Being asked to stop, and data that ends, leave a state that the same call goes on from."""
    whole = start(several, steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(preemption.Watch, "reached", lambda self, step: step == 2)
        with pytest.raises(Preempted, match="stopped after step 2, saved"):
            start(several, steps=6, workdir=tmp_path)
    with pytest.raises(ValueError, match=r"step 4: the data ended.*; the state after step 4 is saved in"):
        start(several, iter(tools.batches(4)), steps=6, workdir=tmp_path / "data")
    for run, other in zip(start(several, steps=6, workdir=tmp_path), whole, strict=True):
        assert_same(run, other, 0)
        assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6]


def test_a_member_that_is_not_finite_stops_alone(tmp_path):
    members = listed("lora")
    broken = tools.batches(seed=1)
    broken[2]["images"][0, 0] = np.inf
    good = train(members, steps=5)
    members[1]["data"] = broken
    runs = train(members, tmp_path, steps=5, checkpoint=4)
    assert isinstance(runs[1].error, NonFiniteError) and runs[1].error.step == 2
    assert int(runs[1].state.step) == 2 and runs[1].metrics[-1]["step"] == 2
    assert "stopped" in runs[1].task_vector.manifest
    for i in (0, 2):
        assert runs[i].error is None
        assert_same(runs[i], good[i], 0)
    after = train(members, tmp_path, steps=6)
    assert [int(r.state.step) for r in after] == [6, 2, 6]
    np.testing.assert_array_equal(after[1].params["one"]["w"], runs[1].params["one"]["w"])
    with pytest.raises(NonFiniteError, match="no member of the fleet is left"):
        train([{"data": broken}, {"data": broken, "seed": 1}], steps=5, method={"name": "lora", "rank": 2})


def test_data_in_common_is_read_once():
    """An iterator can be the data of all; each member sees every batch."""
    members = [{k: m[k] for k in ("name", "lr", "seed", "method")} for m in listed("lora")]
    runs = train(members, data=iter(tools.batches(6)))
    for member, run in zip(members, runs, strict=True):
        assert_same(run, alone({**member, "data": tools.batches(6)}))


def test_weights_of_a_members_own():
    """Heads differ, the rest is one base."""
    members = listed("lora", 2)
    heads = [tools.parameters(i)["two"] for i in (5, 6)]
    runs = train([{**m, "params": {"two": h}, "method": LOWER} for m, h in zip(members, heads, strict=True)])
    for member, head, run in zip(members, heads, runs, strict=True):
        params = {**tools.parameters(), "two": head}
        assert_same(run, alone({**member, "method": LOWER}, params=params))
        np.testing.assert_array_equal(run.params["two"]["w"], head["w"])


VIT = {"image": 8, "patch": 4, "channels": 1, "width": 8, "layers": 1, "heads": 2, "hidden": 8}
LOWER = {"name": "lora", "rank": 2, "include": "one/w"}


@pytest.mark.parametrize(
    ("members", "shown"),
    [
        ([], "fleet is empty"),
        ([{"rate": 1.0}], "has no key 'rate'"),
        ([{"name": "a"}, {"name": "a"}], "two members of the fleet are called 'a'"),
        ([{"name": "a/b"}], "cannot be the name of its folder"),
        ([{}, {"optimizer": {"b1": 0.5}}], "'0' and '1' differ in optimizer.b1"),
        ([{}, {"method": {"name": "lora", "rank": 3}}], r"train in other ways \(one/w, two/w\)"),
        ([{}, {"data": tools.batches(size=4)}], r"differ in images: \(8, 8\) float32 and \(4, 8\) float32"),
        ([{"params": {"two": {"w": np.zeros((2, 2))}}}], "member '0' of the fleet has two/w of"),
        ([{"method": {"name": "spiel_ag", "density": 0.1}}], "selects anew during the run"),
    ],
)
def test_what_is_refused(members, shown):
    with pytest.raises(ValueError, match=shown):
        train(members, data=tools.batches(), method={"name": "lora", "rank": 2})


def test_from_a_config(tmp_path):
    config = {
        "steps": 2,
        "batch_size": 8,
        "model": {"arch": "vision", "classes": -1, "options": VIT},
        "data": {"source": "digits", "split": "train", "threads": 0, "prefetch": 0},
        "method": {"name": "lora", "rank": 2},
        "log": {"progress": False},
        "fleet": [{"name": "a", "optimizer": {"lr": 1e-2}}, {"name": "b", "seed": 3, "data": {"rotate": 90}}],
    }  # fmt: skip
    runs = experiment.run(config, tmp_path)
    assert len(runs) == 2
    first, second = (jft.TaskVector.load(tmp_path / n / "task_vector.safetensors").manifest for n in "ab")
    assert (first["optimizer"]["lr"], second["seed"], second["data"]["rotate"]) == (1e-2, 3, 90)
    with pytest.raises(ValueError, match=r"config.fleet\[0\] has no key 'sed'"):
        experiment.run({**config, "fleet": [{"sed": 1}]}, tmp_path / "other")
