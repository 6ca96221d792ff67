"""A run from the command line to a directory that jft loads again."""

import json

import jax
import numpy as np
import pytest

import jft
from jft.cli import main

CONFIG = """
from jft.train.config import default

def get_config():
    config = default()
    config.model.arch, config.model.classes = "vision", -1
    config.model.options = dict(image=8, patch=4, channels=1, width=16, layers=1, heads=2, hidden=32)
    config.data = dict(source="digits", split="train")
    config.eval_data = dict(source="digits", split="test")
    config.steps, config.batch_size, config.log.progress = 4, 16, False
    config.log.every = 1
    return config
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.py").write_text(CONFIG)
    run = folder / "run"
    argv = ["train", f"--config={folder / 'config.py'}", f"--workdir={run}", "--config.method.name=lora"]
    assert main.call([*argv, "--config.method.rank=2", "--config.optimizer.lr", "1e-2"]) == 0
    return run


def test_train_writes_a_task_vector(workdir):
    vector = jft.TaskVector.load(workdir / "task_vector.safetensors")
    assert all(path.startswith("layers/") for path in vector.paths)
    assert json.loads((workdir / "config.json").read_text())["method"] == {"name": "lora", "rank": 2}


def test_eval_of_run_and_base(workdir, capsys):
    assert main.call(["eval", f"--workdir={workdir}", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert main.call(["eval", f"--workdir={workdir}", "--base", "--json"]) == 0
    base = json.loads(capsys.readouterr().out)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert tuned["loss"] == pytest.approx(logged[-1]["loss"], rel=1e-5)
    assert tuned["loss"] != base["loss"]


def test_eval_of_a_linearized_run_is_linearized(workdir, tmp_path, capsys):
    argv = ["train", f"--config={workdir / 'config.json'}", f"--workdir={tmp_path}", "--config.method.name=l_lora"]
    assert main.call([*argv, "--config.optimizer.lr", "1e-1"]) == 0
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for forward in ("", "--forward=linearized", "--forward=standard"):
        capsys.readouterr()
        assert main.call([a for a in ("eval", f"--workdir={tmp_path}", forward, "--json") if a]) == 0
        found[forward] = json.loads(capsys.readouterr().out)["loss"]
    assert found[""] == found["--forward=linearized"] == pytest.approx(logged[-1]["loss"], rel=1e-5)
    assert found["--forward=standard"] != pytest.approx(found[""], rel=1e-5)

    # No directory of weights gives the function that was trained.
    export = ["export", f"--workdir={tmp_path}", f"--out={tmp_path / 'hf'}"]
    assert main.call(export) == 2 and not (tmp_path / "hf").exists()
    assert "was trained linearized at its base (method l_lora)" in (text := capsys.readouterr().err)
    assert "--forward=standard writes" in text
    assert main.call([*export, "--forward=standard"]) == 0
    capsys.readouterr()
    # The way out that the refusal names: what is exported is what `--forward=standard` measures.
    model, params = jft.load(tmp_path / "hf", dtype="float32")
    test = jft.data.build({"source": "digits", "split": "test"}, batch_size=16, train=False)
    assert jft.train.evaluate(model, params, test, "classification")["loss"] == pytest.approx(
        found["--forward=standard"], rel=1e-5
    )
    vector = str(tmp_path / "task_vector.safetensors")
    assert main.call(["delta", "apply", str(tmp_path / "hf"), vector, str(tmp_path / "again"), "--no-check"]) == 0
    assert "was trained linearized" in capsys.readouterr().err


def test_export_is_base_plus_task_vector(workdir, tmp_path, capsys):
    out = tmp_path / "hf"
    assert main.call(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
    model, params = jft.load(out, dtype="float32")
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    logits = model.apply(params, {"images": images})
    assert logits.shape == (4, 10)
    assert bool(jax.numpy.isfinite(logits).all())
    assert main.call(["export", f"--workdir={workdir}", f"--out={out}"]) == 2
    assert "not an empty directory" in capsys.readouterr().err


def test_a_new_head_trains_and_keeps_the_names_of_its_classes(tmp_path, capsys):
    """LoRA on a checkpoint without a head: trained beside the factors, said so, and exported with the data's names."""
    model = jft.models.Model(jft.models.EncoderConfig(vocab=300, width=8, layers=1, heads=2, hidden=8, positions=8))
    jft.save(model, model.init(jax.random.key(0)), tmp_path / "base")
    rows = [{"text": f"{i}", "mood": ("good", "bad")[i % 2]} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "jsonl", "files": str(tmp_path / "data.jsonl"), "task": "classification", "text": "text"}
    config = {
        "steps": 1,
        "batch_size": 8,
        "model": {"source": str(tmp_path / "base"), "classes": -1},
        "data": data | {"label": "mood", "tokenizer": "bytes", "max_length": 8},
        "method": {"name": "lora", "rank": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main.call(["train", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}"]) == 0
    text = "no head of this task: classifier/b, classifier/w are new and train too (freeze: '^classifier/')"
    assert text in capsys.readouterr().out
    vector = jft.TaskVector.load(tmp_path / "run/task_vector.safetensors")
    assert float(vector["classifier/w"].norm()) > 0
    assert main.call(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}"]) == 0
    description = json.loads((tmp_path / "hf/config.json").read_text())
    assert description["id2label"] == {"0": "bad", "1": "good"}
    assert description["label2id"] == {"bad": 0, "good": 1}


def test_plot(workdir, capsys):
    assert main.call(["plot", f"--workdir={workdir}"]) == 0
    assert (workdir / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert main.call(["plot", f"--workdir={workdir}", "--metrics=train/lss"]) == 1
    assert "train/loss" in capsys.readouterr().err
