"""Wrong uses, each with the one error it must give: it names the thing, the value and the way out."""

import concurrent.futures
import dataclasses
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import tempfile
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import linen

import jft
from jft.train import Preempted, metrics, training
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
    # Once for all that go on from it.
    first = tmp_path.parent / "first"
    if not first.exists():
        job(first, **common)
    shutil.copytree(first / "run", tmp_path / "run")
    job(tmp_path, **common, **({"steps": 3} | changes))


def vector(params=PARAMS):
    return jft.TaskVector.between(params, jax.tree.map(lambda x: x + 1, params))


def cut_file(tmp_path):
    vector().save(tmp_path / "tau.safetensors")
    data = (tmp_path / "tau.safetensors").read_bytes()
    (tmp_path / "tau.safetensors").write_bytes(data[:-5])
    jft.TaskVector.load(tmp_path / "tau.safetensors")


def command(tmp_path, *overrides, text=""):
    """``jft train`` of the small config, or of a file of this text."""
    from jft.cli import main

    config = tmp_path / ("config.py" if text else "config.json")
    config.write_text(text or json.dumps(CONFIG))
    main.dispatch(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *overrides])


def touched(path):
    path.touch()
    return path


def labelled(data, **options):
    return jft.finetune(model, PARAMS, data, **({"steps": 1, "log": {"progress": False}} | options))


def study(**more):
    """The check of the quickstart's studies with one more method."""
    from jft.analysis import run_store
    from jft.analysis import study as studies

    config = run_store.plain(runpy.run_path(str(ROOT / "configs/quickstart.py"))["get_config"]())
    config["studies"]["digits"]["methods"] |= {
        k: {**config["studies"]["digits"]["methods"]["lora"], **v} for k, v in more.items()
    }
    studies.check(config)


def beside(tmp_path):
    """A run in a directory where another thread's has begun."""
    from jft.train import lock

    with lock.held(tmp_path), concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(finetune, workdir=tmp_path).result()


def full_disk(tmp_path, owner, name, **options):
    def full(*_):
        raise FULL

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, full)
        finetune(workdir=tmp_path / "run", **options)


FULL = OSError(28, "No space left on device")
ROOT = Path(__file__).parents[1]


class Norm(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.BatchNorm(use_running_average=False)(x))


NORM_PARAMS = jax.tree.map(np.asarray, Norm().init(jax.random.key(0), BATCHES[0]["x"]))


def batch_norm(params, batch):
    return Norm().apply(params, batch["x"])


USES = {
    # config
    "misspelt: an unknown key": (lambda t: job(t, optimizer__lrr=1), "no key optimizer.lrr; did you mean optimizer.lr?"),
    "wrong type: a value of the wrong type": (lambda t: job(t, steps="many"), "config.steps is 'many'.*takes an integer"),
    "misspelt: an unknown method": (lambda t: job(t, method__name="lorra"), "'lorra' is unknown.*did you mean 'lora'"),
    "misspelt: an unknown option of a method": (lambda t: job(t, method={"name": "lora", "rnk": 2}), "no option 'rnk'.*'rank'"),
    "wrong type: one number for a block's two extents": (
        lambda t: jft.method("block_sparse", block=64), r"block is 64; give rows and columns, as in block=\(64, 64\)"),
    "misspelt: a pattern that matches nothing": (
        lambda t: job(t, method={"name": "pattern", "include": "atn"}), "'atn' matches no weight.*nearest.*attn"),
    "out of range: a layer that is not there": (
        lambda t: job(t, method={"name": "last_k_layers", "k": 3}), "layer -3 does not exist: the model has 1 layer"),
    "misspelt: an unknown optimizer": (lambda t: job(t, optimizer__name="adamm"), "adamm.*adamw"),
    "out of range: a decay of moments out of range": (
        lambda t: job(t, optimizer__b1=2.0), "optimizer.b1 is 2.0; it must be .*below 1"),
    "out of range: a momentum of 1": (
        lambda t: job(t, optimizer={"name": "sgd", "lr": 0.1, "momentum": 1.0}), "optimizer.momentum is 1.0"),
    "out of range: an end of the rate below zero": (lambda t: job(t, optimizer__end=-1.0), "optimizer.end -1.0"),
    "misspelt: an unknown architecture": (lambda t: job(t, model__arch="visio"), "'visio' is unknown.*'vision'"),
    "misspelt: an unknown field of an architecture": (
        lambda t: job(t, model__options__widht=8), "no option 'widht'; did you mean 'width'"),
    "out of range: sizes that do not fit": (lambda t: job(t, model__options__patch=3), "8.*3|3.*8"),
    "wrong place: both a source and an architecture": (lambda t: job(t, model__source="x"), "one of source.*and arch"),
    "misspelt: an unknown dtype": (lambda t: job(t, model__dtype="float8"), "model.dtype is 'float8'; choose one of"),
    "wrong devices: a mesh for other devices": (lambda t: job(t, mesh__fsdp=3), "3.*8"),
    "out of range: an accumulation that does not divide": (
        lambda t: job(t, accumulate=3), "batch of 8 does not divide into accumulate=3"),
    "wrong place: a workdir that is a URL": (lambda t: job("gs://bucket"), "gs://bucket/run is a URL"),
    "missing: no data": (lambda t: job(t, data={}), "config.data is empty"),
    # data
    "misspelt: an unknown source": (lambda t: job(t, data__source="digit"), "'digit'.*'digits'"),
    "misspelt: an unknown key of a source": (lambda t: job(t, data__rotat=90), "rotat.*rotate"),
    "misspelt: an unknown split": (lambda t: job(t, data__split="trian"), "trian.*train"),
    "out of range: other classes than the model's": (lambda t: job(t, data__task="parity", model__classes=1), "classes|labels"),
    "missing: a missing file": (
        lambda t: jft.data.build({"source": "jsonl", "files": "no/such.jsonl", "task": "lm"}, batch_size=1), "no/such.jsonl"),
    "corrupt: a line that is not JSON": (
        lambda t: lines(t, '{"q": "1", "a": "2"}\n{"q": \n'), "data.jsonl.*line 2|data.jsonl:2"),
    "missing: a record without the field": (lambda t: lines(t, '{"q": "1"}\n'), "'a'"),
    "empty: an empty file": (lambda t: lines(t, ""), "data.jsonl.*empty|empty.*data.jsonl|no records"),
    "wrong type: a response with nothing to learn": (lambda t: lines(t, '{"q": "1", "a": 5}\n'), "data.jsonl"),
    "empty: a loss mask without a target": (
        lambda t: jft.finetune(
            lambda p, b: jnp.zeros((*b["tokens"].shape, 3)) + p["w"].sum(), PARAMS, TEXT, steps=1, objective="lm"),
        "weight 0|no target|loss_mask"),
    # training
    "out of range: a loss that is not finite": (
        lambda t: jft.finetune(
            lambda p, b: model(p, b) * jnp.nan, PARAMS, BATCHES, steps=1, log={"progress": False}), "not finite"),
    "out of range: no steps": (lambda t: finetune(steps=0), "steps is 0; it must be at least 1"),
    "misspelt: an unknown objective": (lambda t: finetune(objective="lmm"), "'lmm'.*lm"),
    "wrong place: a checkpoint of another method": (
        lambda t: resume(t, method={"name": "lora", "rank": 1}), "method"),
    "wrong place: a checkpoint of another batch size": (lambda t: resume(t, batch_size=16), "8.*16|batch"),
    "wrong place: a checkpoint of another base": (lambda t: resume(t, seed=1), "base|seed"),
    "wrong devices: a model too large for the device": (
        lambda t: job(t, batch_size=512), "the step needs .* but a device has .*accumulate=4"),
    # weights
    "missing: a directory that is not there": (lambda t: jft.load(t / "nothing"), "nothing"),
    "missing: a directory without config.json": (
        lambda t: checkpoint(t, lambda d: (d / "config.json").unlink()), "config.json"),
    "misspelt: an unknown model type": (lambda t: checkpoint(t, model_type="lama"), "'lama'.*llama"),
    "out of range: an unsupported feature": (
        lambda t: checkpoint(t, rope_scaling={"rope_type": "spiral", "factor": 2.0}), "spiral"),
    "corrupt: a truncated file": (lambda t: checkpoint(t, truncate), "model.safetensors.*truncated|bytes"),
    "corrupt: a corrupt header": (lambda t: checkpoint(t, garbage), "model.safetensors"),
    "missing: a missing tensor": (
        lambda t: checkpoint(t, rewrite(model__norm__weight=None)), "model.norm.weight"),
    "corrupt: a tensor of another shape": (
        lambda t: checkpoint(t, rewrite(model__norm__weight=np.ones(5, np.float32))), "model.norm.weight.*5"),
    "wrong place: a tensor that belongs nowhere": (
        lambda t: checkpoint(t, rewrite(model__extra__weight=np.ones(5, np.float32))), "model.extra.weight"),
    # task vectors
    "wrong place: a task vector on another base": (
        lambda t: jft.apply({"w": PARAMS["w"] + 1}, vector()), "fingerprint"),
    "wrong place: task vectors of two bases": (
        lambda t: vector() + vector({"w": PARAMS["w"] * 2}), "base|fingerprint"),
    "wrong place: checkpoints of two structures": (
        lambda t: jft.TaskVector.between(PARAMS, {"v": PARAMS["w"]}), "w"),
    "corrupt: a truncated task vector": (cut_file, "tau.safetensors"),
    "wrong type: weights of another number": (
        lambda t: jft.merge.task_arithmetic([vector(), vector()], weights=[1.0]), "1.*2|2.*1"),
    # from the command line
    "misspelt: a key as other trainers call it": (
        lambda t: command(t, "--config.learning_rate=1"), "unknown config key 'learning_rate'.*did you mean 'optimizer.lr'"),
    "misspelt: a key without its section": (
        lambda t: command(t, "--config.weight_decay=1"), "'weight_decay'.*did you mean 'optimizer.weight_decay'"),
    "missing: a module that a config imports": (
        lambda t: command(t, text="import numpy\nimport no_such_module\n"),
        r"config.py', line 2: ModuleNotFoundError: No module named 'no_such_module'"),
    "corrupt: a config that is no Python": (
        lambda t: command(t, text="def get_config(:\n"), r"config.py', line 1: SyntaxError"),
    "wrong type: a config that fails": (
        lambda t: command(t, text="def get_config():\n    return 1 / 0\n"), r"config.py', line 2: ZeroDivisionError"),
    "wrong place: a workdir that is a file": (
        lambda t: finetune(workdir=touched(t / "file")), "workdir .*file cannot be used: it is a file; give a directory"),
    "wrong place: a workdir inside a file": (
        lambda t: finetune(workdir=touched(t / "file") / "run"), "workdir .*run cannot be used: Not a directory; give"),
    "misspelt: a metric that evaluation does not give": (
        lambda t: finetune(
            workdir=t, eval_data=BATCHES, eval_every=1, checkpoint={"every": 1, "best": "acuracy"}),
        r"checkpoint.best is 'acuracy' \(did you mean 'accuracy'\?\); evaluation gives loss, accuracy|evaluation gives"),
    "misspelt: the last method of a study": (
        lambda t: study(typo={"method": {"name": "lora", "rnk": 2}}), "method 'lora' has no option 'rnk'.*'rank'"),
    # from Python
    "wrong order: model and params": (
        lambda t: jft.finetune(PARAMS, model, BATCHES, steps=1), r"in each other's place; it is jft.finetune\(model, params"),
    "wrong type: a module in place of its apply": (
        lambda t: jft.finetune(linen.Dense(3), PARAMS, BATCHES, steps=1),
        r"a module of flax.linen \(Dense\).*jft.models.from_linen\(module, variables\)"),
    "wrong type: an apply of something else than a batch": (
        lambda t: jft.finetune(lambda p, x: x @ p["w"], PARAMS, BATCHES, steps=1),
        r"model\(params, batch\) fails for a batch of labels int.*, x float32\[8, 4\]: TypeError"),
    "wrong type: a BatchNorm in training mode": (
        lambda t: jft.finetune(batch_norm, NORM_PARAMS, BATCHES, steps=1),
        "ModifyScopeVariableError.*use_running_average=True"),
    "wrong type: a model that gives two outputs": (
        lambda t: jft.finetune(lambda p, b: (model(p, b), 1), PARAMS, BATCHES, steps=1),
        "the model gives a tuple; .*return that alone"),
    "wrong type: a model that is none": (
        lambda t: jft.finetune((model, PARAMS), PARAMS, BATCHES, steps=1),
        "the model is a tuple; give a jft model, or a function"),
    "wrong type: a weight that is no array": (
        lambda t: jft.finetune(model, {"w": W, "name": "x"}, BATCHES, steps=1), "params hold a str at 'name'"),
    "wrong type: one batch in place of several": (
        lambda t: labelled(BATCHES[0]), r"data is one batch .*list of batches: \[batch\]"),
    "wrong type: one-hot labels": (
        lambda t: labelled([{"x": BATCHES[0]["x"], "labels": np.eye(3, dtype=np.int32)[np.arange(8) % 3]}]),
        r"not int32\[8, 3\]; of one-hot rows take labels.argmax\(-1\)"),
    "wrong type: labels of a classification that are floats": (
        lambda t: labelled([{"x": BATCHES[0]["x"], "labels": np.zeros(8, np.float32)}], objective="classification"),
        r"are integers, one for each example, not float32\[8\]"),
    "wrong type: floats as labels of several classes": (
        lambda t: labelled([{"x": BATCHES[0]["x"], "labels": np.zeros(8, np.float32)}]),
        r"a regression takes outputs \[B, 1\].*integer labels for a classification"),
    "out of range: a label beyond the classes": (
        lambda t: labelled([{"x": BATCHES[0]["x"], "labels": np.arange(8) % 4}]),
        "label 3 is none of the model's 3 classes, 0 to 2"),
    "out of range: a later label beyond the classes": (
        lambda t: labelled([*BATCHES, {"x": BATCHES[0]["x"], "labels": np.arange(8)}], steps=2),
        r"the batch for step 1 \(data position 1\): label 7 is none of the model's 3 classes"),
    "out of range: weights that are not finite": (
        lambda t: jft.finetune(model, {"w": jnp.asarray(W * np.nan)}, BATCHES, steps=1, log={"progress": False}),
        "w of the base is not finite itself: load the base again"),
    "out of range: a loss that is infinite at once": (
        lambda t: jft.finetune(lambda p, b: model(p, b) * jnp.inf, PARAMS, BATCHES, steps=1, log={"progress": False}),
        "No update was made before it, so it is not the learning rate"),
    "out of range: a loss that is not finite later": (
        lambda t: finetune(optimizer={"name": "sgd", "lr": 1e38, "clip": 0.0}, steps=9, workdir=t),
        r"lower the learning rate, or clip, and go on from there with checkpoint.accept=True"),
    "misspelt: a dtype of training": (
        lambda t: finetune(dtype="float99"), "dtype 'float99' is unknown; choose float32, bfloat16"),
    "misspelt: a dtype of weights": (
        lambda t: jft.load(write(t, llama_tensors(), LLAMA), dtype="float99"), "dtype 'float99' is unknown; choose float32"),
    "wrong type: a batch to show that is none": (lambda t: jft.data.show([1, 2]), "show takes a batch, a dict of arrays"),
    "corrupt: a lone surrogate": (lambda t: lines(t, '{"q": "a\\ud800", "a": "x"}\n'), r"data.jsonl:1: a lone surrogate"),
    "wrong place: a base in another dtype": (
        lambda t: jft.apply(jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS), vector()),
        r"of another dtype than the base .*: bfloat16 and float32 in w; load the base in its dtype"),
    "wrong place: task vectors of two dtypes of a base": (
        lambda t: vector() + vector(jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)),
        "bases of different dtypes: float32 and bfloat16 in w"),
    "empty: data without a batch": (lambda t: labelled([]), "the data holds no batch"),
    # moments
    "interrupted: by SIGTERM": (
        lambda t: finetune(workdir=t, steps=3, log={"every": 1}, callbacks=[lambda _: os.kill(os.getpid(), signal.SIGTERM)]),
        r"stopped after step \d, saved; run the same again to go on"),
    "interrupted: a second start beside the first": (lambda t: beside(t), "is in use by another thread of this process; wait"),
    "full disk: at the result": (
        lambda t: full_disk(t, training, "save"), "task vector cannot be written to .*No space left.*"),
    "full disk: at a checkpoint": (
        lambda t: full_disk(t, jft.files, "write_text", checkpoint=1),
        "checkpoint of step 0 cannot be written to .*: No space left"),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_wrong_use(name, tmp_path, monkeypatch):
    use, message = USES[name]
    # What a full disk rescues must not go into the machine's temporary files.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if "too large" in name:
        monkeypatch.setenv("JFT_DEVICE_MEMORY", "200000")
    with pytest.raises((ValueError, OSError, Preempted), match=message) as caught:
        use(tmp_path)
    text = str(caught.value)
    assert len(text) < 2000
    left = [p.name for p in Path(tmp_path).rglob(".*")]
    assert not left, f"half-written files were left: {left}"


KINDS = (
    "misspelt", "missing", "empty", "out of range", "wrong type", "wrong place", "wrong order", "corrupt", "interrupted",
    "full disk", "wrong devices",
)  # fmt: skip


def test_every_kind_of_wrong_start_is_in_the_table():
    assert {name.split(": ")[0] for name in USES} == set(KINDS)


def test_a_warmup_longer_than_the_run_is_said(tmp_path, capsys):
    finetune(optimizer={"lr": 0.5, "warmup": 5}, log={"progress": True}, steps=2)
    assert "optimizer.warmup is 5 steps, more than the run has: at step 2 the learning rate is 0.2, not 0.5" in (
        capsys.readouterr().out
    )


def test_a_rank_above_the_matrix_is_said(capsys):
    finetune(method={"name": "lora", "rank": 50}, log={"progress": True})
    assert "warning: rank 50 is above the 3 that w can have" in capsys.readouterr().out


def test_a_selection_is_said_before_it_is_made(capsys):
    finetune(method={"name": "block_sparse", "block": (2, 3), "density": 0.5}, log={"progress": True})
    assert capsys.readouterr().out.startswith("selecting what trains in 1 weights by block_sparse\n")


def test_a_loader_is_shown_by_its_first_example():
    loader = jft.data.build({"source": "digits", "split": "train"}, batch_size=8)
    assert jft.data.show(loader) == "image: 8 x 8 x 1, values -1 to 1\nlabel: 2 (2)"


def test_a_narrow_terminal_shows_bar_and_time_left():
    bar, task = metrics._bar(1000, 0)
    bar.stop()
    bar.update(task, completed=10, metrics="train 10/1000  " + 20 * "loss 1.234  ")
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(bar.get_renderable())
    (line,) = console.export_text().splitlines()
    assert len(line) <= 80 and "-:--:-- train 10/1000  loss" in line and line.rstrip().endswith("…")


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
    named = re.search(r"--config=(\S+)", (ROOT / "launch/local.py").read_text())
    assert named and (ROOT / named[1]).is_file()


def test_an_editable_install_is_a_path():
    """Not a finder, before which a clone named jft in the current folder would come, as an empty namespace."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"": "."}


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
    for steps in (2, 3):
        with pytest.raises(jft.train.FinishedError, match="has ended after step 3") as caught:
            finetune(steps=steps, workdir=tmp_path)
        assert caught.value.whole == (steps == 3)
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
