"""Wrong uses, each with the one error it must give: it names the thing, the value and the way out."""

import dataclasses
import json
import re
import resource
import shutil
import struct
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.train import metrics
from tests.models.checkpoints import LLAMA, llama_tensors, write

W = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
PARAMS = {"w": jnp.asarray(W)}
BATCHES = [{"x": np.ones((8, 4), np.float32), "labels": np.arange(8) % 3}]
TEXT = [{"tokens": np.ones((4, 6), np.int32), "loss_mask": np.zeros((4, 6), np.float32)}]
CONFIG = {
    "steps": 2,
    "batch_size": 8,
    "model": {
        "arch": "vision",
        "options": {"image": 8, "patch": 4, "channels": 1, "width": 8, "layers": 1, "heads": 2, "hidden": 8},
        "classes": 10,
    },
    "data": {"source": "digits", "split": "train"},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "log": {"progress": False},
}


def model(params, batch):
    return batch["x"] @ params["w"]


def job(tmp_path, **changes):
    """Run the small config with some of its keys changed; ``section__key=value`` reaches into a section."""
    from jft.train import experiment

    config = json.loads(json.dumps(CONFIG))
    for name, value in changes.items():
        *sections, key = name.split("__")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return experiment.run(config, f"{tmp_path}/run")


def finetune(**options):
    return jft.finetune(model, PARAMS, BATCHES, **({"steps": 1, "log": {"progress": False}} | options))


def checkpoint(tmp_path, change=None, **description):
    """Load a small checkpoint after ``change(directory)``."""
    directory = write(tmp_path, llama_tensors(), LLAMA | description)
    if change:
        change(directory)
    return jft.load(directory)


def weights(directory):
    return directory / "model.safetensors"


def truncate(directory):
    data = weights(directory).read_bytes()
    weights(directory).write_bytes(data[: len(data) // 2])


def garbage(directory):
    weights(directory).write_bytes(struct.pack("<Q", 1 << 40) + b"x" * 64)


def rewrite(**tensors):
    """A change that adds tensors, or with None removes them."""

    def change(directory):
        from safetensors.numpy import load_file, save_file

        held = load_file(weights(directory)) | {k.replace("__", "."): v for k, v in tensors.items()}
        save_file({k: v for k, v in held.items() if v is not None}, weights(directory))

    return change


def lines(tmp_path, text, **options):
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    config = {"source": "jsonl", "files": str(file), "task": "sft", "tokenizer": "bytes", "max_length": 64, **options}
    loader = jft.data.build({"prompt": "q", "response": "a"} | config, batch_size=1)
    read = iter(loader)
    return [next(read) for _ in range(max(2, text.count("\n")))]


def resume(tmp_path, **changes):
    common = {"checkpoint__every": 1}
    job(tmp_path, **common)
    job(tmp_path, **common, **({"steps": 3} | changes))


def vector(params=PARAMS):
    return jft.TaskVector.between(params, jax.tree.map(lambda x: x + 1, params))


def cut_file(tmp_path):
    vector().save(tmp_path / "tau.safetensors")
    data = (tmp_path / "tau.safetensors").read_bytes()
    (tmp_path / "tau.safetensors").write_bytes(data[:-5])
    jft.TaskVector.load(tmp_path / "tau.safetensors")


USES = {
    # config
    "an unknown key": (lambda t: job(t, optimizer__lrr=1), "no key optimizer.lrr; did you mean optimizer.lr?"),
    "a value of the wrong type": (lambda t: job(t, steps="many"), "config.steps is 'many'.*takes an integer"),
    "an unknown method": (lambda t: job(t, method__name="lorra"), "'lorra' is unknown.*did you mean 'lora'"),
    "an unknown option of a method": (lambda t: job(t, method={"name": "lora", "rnk": 2}), "no option 'rnk'.*'rank'"),
    "one number for a block's two extents": (
        lambda t: jft.method("block_sparse", block=64), r"block is 64; give rows and columns, as in block=\(64, 64\)"),
    "a pattern that matches nothing": (
        lambda t: job(t, method={"name": "pattern", "include": "atn"}), "'atn' matches no weight.*nearest.*attn"),
    "a layer that is not there": (
        lambda t: job(t, method={"name": "last_k_layers", "k": 3}), "layer -3 does not exist: the model has 1 layer"),
    "an unknown optimizer": (lambda t: job(t, optimizer__name="adamm"), "adamm.*adamw"),
    "a decay of moments out of range": (lambda t: job(t, optimizer__b1=2.0), "optimizer.b1 is 2.0; it must be .*below 1"),
    "a momentum of 1": (
        lambda t: job(t, optimizer={"name": "sgd", "lr": 0.1, "momentum": 1.0}), "optimizer.momentum is 1.0"),
    "an end of the rate below zero": (lambda t: job(t, optimizer__end=-1.0), "optimizer.end -1.0"),
    "an unknown architecture": (lambda t: job(t, model__arch="visio"), "'visio' is unknown.*'vision'"),
    "an unknown field of an architecture": (
        lambda t: job(t, model__options__widht=8), "no option 'widht'; did you mean 'width'"),
    "sizes that do not fit": (lambda t: job(t, model__options__patch=3), "8.*3|3.*8"),
    "both a source and an architecture": (lambda t: job(t, model__source="x"), "one of source.*and arch"),
    "an unknown dtype": (lambda t: job(t, model__dtype="float8"), "model.dtype is 'float8'; choose one of"),
    "a mesh for other devices": (lambda t: job(t, mesh__fsdp=3), "3.*8"),
    "an accumulation that does not divide": (lambda t: job(t, accumulate=3), "batch of 8 does not divide into accumulate=3"),
    "a workdir that is a URL": (lambda t: job("gs://bucket"), "gs://bucket/run is a URL"),
    "no data": (lambda t: job(t, data={}), "config.data is empty"),
    # data
    "an unknown source": (lambda t: job(t, data__source="digit"), "'digit'.*'digits'"),
    "an unknown key of a source": (lambda t: job(t, data__rotat=90), "rotat.*rotate"),
    "an unknown split": (lambda t: job(t, data__split="trian"), "trian.*train"),
    "other classes than the model's": (lambda t: job(t, data__task="parity", model__classes=1), "classes|labels"),
    "a missing file": (
        lambda t: jft.data.build({"source": "jsonl", "files": "no/such.jsonl", "task": "lm"}, batch_size=1), "no/such.jsonl"),
    "a line that is not JSON": (lambda t: lines(t, '{"q": "1", "a": "2"}\n{"q": \n'), "data.jsonl.*line 2|data.jsonl:2"),
    "a record without the field": (lambda t: lines(t, '{"q": "1"}\n'), "'a'"),
    "an empty file": (lambda t: lines(t, ""), "data.jsonl.*empty|empty.*data.jsonl|no records"),
    "a response with nothing to learn": (lambda t: lines(t, '{"q": "1", "a": 5}\n'), "data.jsonl"),
    "a loss mask without a target": (
        lambda t: jft.finetune(
            lambda p, b: jnp.zeros((*b["tokens"].shape, 3)) + p["w"].sum(), PARAMS, TEXT, steps=1, objective="lm"),
        "weight 0|no target|loss_mask"),
    # training
    "a loss that is not finite": (
        lambda t: jft.finetune(
            lambda p, b: model(p, b) * jnp.nan, PARAMS, BATCHES, steps=1, log={"progress": False}), "not finite"),
    "no steps": (lambda t: finetune(steps=0), "steps is 0; it must be at least 1"),
    "an unknown objective": (lambda t: finetune(objective="lmm"), "'lmm'.*lm"),
    "a checkpoint of another method": (
        lambda t: resume(t, method={"name": "lora", "rank": 1}), "method"),
    "a checkpoint of another batch size": (lambda t: resume(t, batch_size=16), "8.*16|batch"),
    "a checkpoint of another base": (lambda t: resume(t, seed=1), "base|seed"),
    "a model too large for the device": (
        lambda t: job(t, batch_size=512), "the step needs .* but a device has .*accumulate=4"),
    # weights
    "a directory that is not there": (lambda t: jft.load(t / "nothing"), "nothing"),
    "a directory without config.json": (lambda t: checkpoint(t, lambda d: (d / "config.json").unlink()), "config.json"),
    "an unknown model type": (lambda t: checkpoint(t, model_type="lama"), "'lama'.*llama"),
    "an unsupported feature": (
        lambda t: checkpoint(t, rope_scaling={"rope_type": "spiral", "factor": 2.0}), "spiral"),
    "a truncated file": (lambda t: checkpoint(t, truncate), "model.safetensors.*truncated|bytes"),
    "a corrupt header": (lambda t: checkpoint(t, garbage), "model.safetensors"),
    "a missing tensor": (
        lambda t: checkpoint(t, rewrite(model__norm__weight=None)), "model.norm.weight"),
    "a tensor of another shape": (
        lambda t: checkpoint(t, rewrite(model__norm__weight=np.ones(5, np.float32))), "model.norm.weight.*5"),
    "a tensor that belongs nowhere": (
        lambda t: checkpoint(t, rewrite(model__extra__weight=np.ones(5, np.float32))), "model.extra.weight"),
    # task vectors
    "a task vector on another base": (
        lambda t: jft.apply({"w": PARAMS["w"] + 1}, vector()), "fingerprint"),
    "task vectors of two bases": (
        lambda t: vector() + vector({"w": PARAMS["w"] * 2}), "base|fingerprint"),
    "checkpoints of two structures": (
        lambda t: jft.TaskVector.between(PARAMS, {"v": PARAMS["w"]}), "w"),
    "a truncated task vector": (cut_file, "tau.safetensors"),
    "weights of another number": (
        lambda t: jft.merge.task_arithmetic([vector(), vector()], weights=[1.0]), "1.*2|2.*1"),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_wrong_use(name, tmp_path, monkeypatch):
    use, message = USES[name]
    if "too large" in name:
        monkeypatch.setenv("JFT_DEVICE_MEMORY", "200000")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        use(tmp_path)
    text = str(caught.value)
    assert len(text) < 2000
    left = [p.name for p in Path(tmp_path).rglob(".*")]
    assert not left, f"half-written files were left: {left}"


def test_the_list_is_long_enough():
    assert len(USES) >= 25


def test_a_warmup_longer_than_the_run_is_said(tmp_path, capsys):
    finetune(optimizer={"lr": 0.5, "warmup": 5}, log={"progress": True}, steps=2)
    assert "optimizer.warmup is 5 steps, more than the run has: at step 2 the learning rate is 0.2, not 0.5" in (
        capsys.readouterr().out
    )


def test_a_base_from_scratch_is_the_same_on_one_device_and_on_eight():
    from jft.train.config import ModelConfig
    from jft.train.experiment import build_model

    options = {"vocab": 67, "width": 24, "layers": 1, "heads": 2, "hidden": 40}
    config = ModelConfig(arch="decoder", options=options)
    one = build_model(config)[1]
    eight = build_model(config, mesh=jft.parallel.make_mesh({"fsdp": 8}))[1]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_task_vector_is_as_readable_as_other_new_files(tmp_path):
    vector().save(tmp_path / "tau.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "tau.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_config_that_the_launcher_names_exists():
    root = Path(__file__).parents[1]
    named = re.search(r"--config=(\S+)", (root / "launch/local.py").read_text())
    assert named and (root / named[1]).is_file()


def test_rates_count_steps_that_are_done():
    """Each step takes at least 20 ms, also those before and at an evaluation: dispatches would give rates of 0 and more."""
    import time

    def wait(x):
        time.sleep(0.02)
        return x

    def slow(params, batch):
        out = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), batch["x"][0, 0])
        return model(params, batch) + 0 * jax.lax.stop_gradient(out)

    run = jft.finetune(
        slow, PARAMS, BATCHES, steps=6, eval_data=BATCHES, eval_every=2, log={"every": 1, "progress": False}
    )
    rates = [row["steps_per_s"] for row in run.metrics if row["split"] == "train"]
    assert len(rates) == 6 and min(rates) > 0 and max(rates) <= 50


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    """Without checkpoints: neither the same run again, nor one of fewer or more steps over its result."""
    from jft.cli import main

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    argv = ["train", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}"]
    assert main.call(argv) == 0
    before = (tmp_path / "run/task_vector.safetensors").read_bytes(), (tmp_path / "run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main.call(argv) == 0
    assert "done before: the run in" in capsys.readouterr().out
    for steps in (1, 3):
        assert main.call([*argv, f"--config.steps={steps}"]) == 1
        assert "has ended after step 2, and has no checkpoint to go on from there; load its" in capsys.readouterr().err
    # What is proposed of another run there must work as well: nothing could go on.
    assert main.call([*argv, "--config.optimizer.lr=2e-3"]) == 1
    text = capsys.readouterr().err
    assert "is of another run" in text and "give another workdir, or remove that file" in text and "accept" not in text
    after = (tmp_path / "run/task_vector.safetensors").read_bytes(), (tmp_path / "run/metrics.jsonl").read_bytes()
    assert after == before
    (tmp_path / "run/task_vector.safetensors").unlink()
    assert main.call([*argv, "--config.steps=1"]) == 0


FULL = OSError(28, "No space left on device")


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch, capsys):
    """The result goes to another disk; where that is full too, the last checkpoint is named, of which long runs have one."""
    save, allowed = jft.TaskVector.save, [str(tmp_path / "rescue")]

    def full(self, path, *rest):
        if not str(path).startswith(tuple(allowed)):
            raise FULL
        save(self, path, *rest)

    monkeypatch.setattr(jft.TaskVector, "save", full)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(tmp_path / "rescue"))
    with pytest.raises(
        OSError, match=r"cannot be written to .*run: No space left on device; it is in (\S+): make"
    ) as caught:
        finetune(workdir=tmp_path / "run")
    saved = re.search(r"it is in (\S+):", str(caught.value))[1]
    assert np.any(np.asarray(jft.TaskVector.load(saved)["w"].value))
    allowed.clear()
    often = {"minutes": 1e-9}
    with pytest.raises(OSError, match=r"the last checkpoint is that of step 1\. Make room, and run the same again"):
        finetune(workdir=tmp_path / "run", checkpoint=often)
    allowed.append(str(tmp_path / "run"))
    assert int(finetune(workdir=tmp_path / "run", checkpoint=often).state.step) == 1
    # A short run has none.
    finetune(workdir=tmp_path / "run/quick")
    assert not list((tmp_path / "run/quick/checkpoints").glob("*"))


def test_a_finished_run_with_an_earlier_checkpoint_is_not_trained_again(tmp_path):
    finetune(steps=3, workdir=tmp_path, checkpoint={"minutes": 1e-9})
    shutil.rmtree(tmp_path / "checkpoints/3")
    with pytest.raises(jft.train.FinishedError, match="has ended after step 3") as caught:
        finetune(steps=3, workdir=tmp_path)
    assert caught.value.whole
    assert int(finetune(steps=4, workdir=tmp_path).state.step) == 4


def test_rows_wait_for_room_on_a_full_disk(tmp_path):
    lines = metrics.JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1, "split": "train"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Within the second row, which is cut.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        lines.write({"step": 2, "split": "train"})
        lines.write({"step": 3, "split": "train"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines.error.startswith(f"{tmp_path / 'metrics.jsonl'} cannot be written: ")
    lines.write({"step": 4, "split": "train"})
    lines.close()
    assert not lines.error
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_too_little_room_is_said_before_the_first_step(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40))
    finetune(workdir=tmp_path, log={"progress": True})
    assert "has 40 B of room, and the task vector may take 48 B and 3 checkpoints" in capsys.readouterr().out


def test_the_small_config_is_right_in_itself(tmp_path):
    run = job(tmp_path)
    assert dataclasses.is_dataclass(run) and run.state.step == 2
