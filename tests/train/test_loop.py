"""The loop: what it refuses, what it saves, and that going on is the same as never having stopped."""

import json
import os
import re

import jax
import numpy as np
import pytest

import jft
from jft.parallel import MemoryBudgetError
from jft.train import NonFiniteError
from jft.train.checkpoints import Changed
from jft.train.metrics import JsonLines, read
from tests.train import tools

QUIET = {"every": 1, "progress": False}


def train(workdir=None, steps=12, model=tools.apply, params=None, data=None, **options):
    options = {"log": QUIET, "optimizer": {"lr": 1e-2}} | options
    params = tools.parameters() if params is None else params
    return jft.finetune(model, params, data or tools.batches(), steps=steps, workdir=workdir, **options)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.optimized
@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 2}])
def test_resuming_is_bit_for_bit(tmp_path, method):
    whole = train(steps=12, method=method)
    first = train(tmp_path, steps=7, method=method, checkpoint=3)
    assert int(first.state.step) == 7
    second = train(tmp_path, steps=12, method=method, checkpoint=5, log={"every": 1, "progress": False})
    assert_equal(second.state, whole.state)
    assert_equal(second.params, whole.params)
    assert [(m["step"], m["loss"]) for m in second.metrics] == [(m["step"], m["loss"]) for m in whole.metrics]
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "metrics.jsonl", "task_vector.safetensors"]
    again = train(tmp_path, steps=12, method=method, checkpoint=5)
    assert_equal(again.params, whole.params)
    with pytest.raises(ValueError, match="stands at step 12, beyond steps=7"):
        train(tmp_path, steps=7, method=method)


def test_the_result_and_its_manifest(tmp_path):
    params = tools.parameters()
    run = train(tmp_path, params=params, method="bitfit", eval_data=tools.batches(), seed=4)
    assert set(run.task_vector.paths) == {"one/b", "two/b"}
    np.testing.assert_allclose(run.params["one"]["b"], params["one"]["b"] + run.task_vector["one/b"].value, rtol=1e-6)
    assert run.params["one"]["w"] is not None
    loaded = jft.TaskVector.load(tmp_path / "task_vector.safetensors")
    manifest = loaded.manifest
    assert manifest["method"] == {"name": "bitfit", "options": {}}
    assert (manifest["seed"], manifest["steps"]) == (4, 12)
    assert manifest["optimizer"]["lr"] == 1e-2
    assert {"versions", "base", "evaluation"} <= set(manifest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jft.apply(params, loaded), run.params)
    rows = read(tmp_path / "metrics.jsonl")
    assert rows[-1] == {"step": 12, "split": "eval", **run.evaluation}
    assert re.fullmatch(r"Run\(step 12: accuracy [^;]*; TaskVector\(2 paths, [^\n]*\)\)", repr(run))


def test_checkpoints_hold_only_what_trains(tmp_path):
    """The base is by reference: a checkpoint of two biases stays small beside a large frozen weight."""
    params = tools.parameters()
    params["one"]["unused"] = jax.random.normal(jax.random.key(0), (512, 1024))
    train(tmp_path, params=params, method="bitfit", steps=2, checkpoint=2)
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    assert size < 100_000


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"optimizer": {"lr": 2e-2}}, "optimizer.lr: 0.01 -> 0.02"),
        ({"method": "bitfit"}, "method.name: 'full' -> 'bitfit'"),
        ({"params": tools.parameters(9)}, "base: '"),
        ({"data": tools.batches(size=4)}, r"batch.images: \[\[8, 8\], 'float32'\] -> \[\[4, 8\], 'float32'\]"),
        ({"manifest": {"data": {"source": "b"}}}, "data.source: 'a' -> 'b'"),
        ({"objective": {"name": "classification", "label_smoothing": 0.1}}, "objective.label_smoothing: 0.0 -> 0.1"),
        ({"seed": 1}, "seed: 0 -> 1"),
    ],
)
def test_another_run_is_refused(tmp_path, change, shown):
    options = {"manifest": {"data": {"source": "a"}}}
    train(tmp_path, steps=2, checkpoint=2, **options)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(Changed, match=shown):
        train(tmp_path, steps=4, **(options | change))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before, "nothing is lost"


def test_a_non_finite_loss_stops_the_run(tmp_path):
    data = tools.batches(6)
    data[4]["images"][0, 0] = np.inf
    with pytest.raises(
        NonFiniteError, match=r"loss of step 4 is not finite.*data position 4.*after step 4 is saved"
    ) as error:
        train(tmp_path, data=data, checkpoint=100)
    assert (error.value.step, error.value.position) == (4, 4)
    repaired = [*data[:4], data[0], data[5]]
    resumed = train(tmp_path, data=repaired, steps=6)
    assert_equal(resumed.state, train(data=repaired, steps=6).state)
    with pytest.raises(NonFiniteError, match="no workdir"):
        train(data=data)


def test_an_empty_mask_is_refused_before_the_step():
    data = tools.token_batches(3)
    data[2]["loss_mask"][:] = 0
    with pytest.raises(ValueError, match="batch for step 2 has total weight 0"):
        train(model=tools.bigram, params=tools.bigram_parameters(), data=data)
    with pytest.raises(ValueError, match="holds no batch"):
        jft.finetune(tools.apply, tools.parameters(), (), steps=1)
    with pytest.raises(ValueError, match="step 5: the data ended"):
        train(data=iter(tools.batches(5)))


def test_a_plain_iterator_is_drawn_forward_on_resume(tmp_path):
    def endless():
        while True:
            yield from tools.batches()

    train(tmp_path, steps=4, data=endless(), checkpoint=4)
    resumed = train(tmp_path, steps=9, data=endless())
    assert_equal(resumed.state, train(steps=9).state)


def test_the_best_checkpoint_is_kept_and_returned(tmp_path):
    """A learning rate that diverges: an early state is the best, stays, and is what the run ends with."""
    options = {
        "optimizer": {"name": "sgd", "lr": 3.0, "clip": 0.0},
        "eval_data": tools.batches(seed=5),
        "eval_every": 2,
    }
    run = train(tmp_path, steps=20, checkpoint={"every": 2, "keep": 1, "best": "loss"}, **options)
    evaluations = {r["step"]: r["loss"] for r in run.metrics if r["split"] == "eval"}
    best = min(evaluations, key=evaluations.get)
    assert best < 20, "the test needs a run that gets worse"
    assert int(run.state.step) == best
    assert run.evaluation["loss"] == evaluations[best]
    assert sorted(os.listdir(tmp_path / "checkpoints"), key=int) == [str(best), "20"]
    with pytest.raises(ValueError, match="needs eval data"):
        train(tmp_path / "b", checkpoint={"every": 2, "best": "loss"})
    with pytest.raises(ValueError, match=r"checkpoint.every \(0\) to be a positive multiple"):
        train(tmp_path / "b", checkpoint={"best": "loss"}, **options)
    with pytest.raises(ValueError, match=r"checkpoint.best is 'acc'; evaluation gives accuracy, loss"):
        train(tmp_path / "b", checkpoint={"every": 2, "best": "acc"}, **options)


def test_a_run_that_does_not_fit_names_remedies(monkeypatch):
    from jft.models import DecoderConfig, Model

    model = Model(DecoderConfig(vocab=64, width=64, layers=4, heads=4, hidden=256))
    params = model.init(jax.random.key(0))
    data = [{"tokens": np.zeros((16, 64), np.int32)}]
    for budget, advice in (("9MB", "nothing tried fits by itself, nearest: "), ("40MB", "any of these fits: ")):
        monkeypatch.setenv("JFT_DEVICE_MEMORY", budget)
        with pytest.raises(MemoryBudgetError, match=r"the step needs .* but a device has") as error:
            train(model=model, params=params, data=data, steps=1)
        remedies = str(error.value).split(advice)[1]
        assert re.search(r"model.remat='full' \(\d+\.\d MiB\)", remedies), remedies
        assert re.search(r"accumulate=\d \(\d+\.\d MiB\)", remedies), remedies
        assert remedies.count("MiB)") == 3
    monkeypatch.setenv("JFT_DEVICE_MEMORY", "1GB")
    train(model=model, params=params, data=data, steps=1)


def test_blockwise_attention_is_a_remedy_for_long_rows(monkeypatch):
    from jft.models import DecoderConfig, Execution, Model

    model = Model(DecoderConfig(vocab=64, width=16, layers=1, heads=2, hidden=32), Execution(attention_block=64))
    params = model.init(jax.random.key(0))
    monkeypatch.setenv("JFT_DEVICE_MEMORY", "6MB")
    data = [{"tokens": np.zeros((1, 1024), np.int32)}]
    with pytest.raises(MemoryBudgetError, match=r"any of these fits: .*model.attention='blockwise'"):
        train(model=model, params=params, data=data, steps=1)


def test_a_model_without_matrices_that_does_not_fit_says_so(monkeypatch):
    """LoRA is no remedy for it, which must not hide that the memory does not suffice."""
    monkeypatch.setenv("JFT_DEVICE_MEMORY", "10")
    with pytest.raises(MemoryBudgetError, match="the step needs"):
        train(model=lambda p, batch: batch["images"] * p["scale"], params={"scale": np.ones(8, np.float32)})


def test_frozen_weights_are_counted_once_whatever_their_names():
    from jft.train import step
    from jft.train.objectives import Classification
    from jft.train.optimizers import Optimizer

    params = {"layers": [{"w": np.zeros((64, 64), np.float32)}, {"w": np.zeros((64, 64), np.float32)}]}
    plan = jft.method("lora", rank=1).plan(params)
    update = step.compile_step(step.Recipe(tools.apply, plan, Classification(), Optimizer()), params, {}, None)
    assert update._apart(params, donated=False) == 0


def test_what_the_task_vector_cannot_hold_is_refused_before_training():
    drawn = []
    data = (drawn.append(batch) or batch for batch in tools.batches())
    for manifest, shown in (({"where": os}, "'where' cannot be written as JSON"), ({"base": "x"}, "'base'")):
        with pytest.raises(ValueError, match=shown):
            train(data=data, manifest=manifest)
    assert not drawn


def test_evaluation_data_that_ends_is_refused_before_training():
    once = iter(tools.batches(1))
    with pytest.raises(ValueError, match="eval_data is an iterator"):
        train(eval_data=once, eval_every=4)
    assert train(eval_data=once).evaluation["loss"] > 0


def test_an_objective_need_not_be_a_dataclass():
    class Energy:
        splits = True

        def weight(self, batch, xp=np):
            return xp.sum(xp.ones(batch["images"].shape[0], "float32"))

        def loss(self, outputs, batch):
            return (outputs**2).sum(), self.weight(batch), {}

        def report(self, means):
            return means

    run = train(objective=Energy(), steps=8, data=tools.batches(1))
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    assert run.task_vector.manifest["objective"] == {"name": "Energy"}


def test_resuming_on_another_mesh(tmp_path):
    params = tools.parameters()
    params["one"]["w"] = jax.random.normal(jax.random.key(0), (8, 4096)) * 0.1
    params["one"]["b"] = params["one"]["b"][:1]
    params["two"]["w"] = jax.random.normal(jax.random.key(1), (4096, 3)) * 0.01
    train(tmp_path, params=params, steps=3, checkpoint=3, mesh=jft.parallel.make_mesh({"fsdp": 8}))
    resumed = train(tmp_path, params=params, steps=6, mesh=jft.parallel.make_mesh({"data": 2, "fsdp": 4}))
    whole = train(params=params, steps=6)
    np.testing.assert_allclose(
        [m["loss"] for m in resumed.metrics], [m["loss"] for m in whole.metrics], rtol=1e-5, atol=1e-6
    )
    assert "fsdp" in str(resumed.state.trained["one/w"].sharding.spec)


def test_metrics_survive_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "split": "train", "loss": 1.0 / n} for n in (1, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "spl')
    sink = JsonLines(path, 1)
    sink.write(rows[1] | {"loss": float("nan")})
    sink.close()
    assert read(path) == [rows[0], rows[1] | {"loss": "nan"}]
    for line, message in (
        ('{"step"', "line 1: bad JSON"),
        ('{"split": "train"}', "line 1: lacks 'step'; remove that line"),
    ):
        path.write_text(f"{line}\n{json.dumps(rows[1])}\n")
        with pytest.raises(ValueError, match=message):
            read(path)


def test_tensorboard_and_wandb(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path, steps=2, log={**QUIET, "tensorboard": True})
    assert any((tmp_path / "tensorboard").iterdir())
    with pytest.raises(ValueError, match="wandb needs wandb: pip install"):
        train(tmp_path / "b", steps=2, log={**QUIET, "wandb": "project"})
    with pytest.raises(ValueError, match="need a workdir"):
        train(steps=2, log={**QUIET, "tensorboard": True})


def test_what_is_printed(tmp_path, capsys):
    train(steps=2, method="bitfit", log=1)
    out = capsys.readouterr().out
    assert "one/w    8x16  float32" in out
    assert "4 weights, 195 values; 19 train (9.74%)" in out
    assert "step takes" in out
    assert "train 2/2  loss" in out
    train(steps=2, log=QUIET)
    assert capsys.readouterr().out == ""


def test_option_errors(tmp_path):
    with pytest.raises(ValueError, match="Checkpointing has no option 'evry'; it has: every, keep, best"):
        train(tmp_path, checkpoint={"evry": 1})
    with pytest.raises(ValueError, match="checkpoint is given, but no workdir"):
        train(checkpoint=1)
    with pytest.raises(ValueError, match=r"log.every is 0"):
        train(log={"every": 0})


def test_task_vector_manifest_is_json(tmp_path):
    run = train(tmp_path, manifest={"config": {"a": 1}})
    assert json.loads(json.dumps(run.task_vector.manifest))["config"] == {"a": 1}


def test_a_signal_in_the_last_step_stops_the_run_saved_and_the_next_start_writes_the_result(tmp_path, monkeypatch):
    import signal

    from jft.train import preemption

    monkeypatch.setattr(preemption.Watch, "reached", lambda self, step: self._note(signal.SIGINT, None) or True)
    # A shell starts what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(jft.train.Preempted, match="stopped after step 1, saved"):
            train(tmp_path, steps=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "task_vector.safetensors").exists()
    monkeypatch.undo()
    train(tmp_path, steps=1)
    assert (tmp_path / "task_vector.safetensors").is_file()
