"""Configs: what they refuse, and runs from a config alone."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import jft
from jft.train import config as configs
from jft.train import experiment

VISION = {"image": 8, "patch": 4, "channels": 1, "width": 16, "layers": 2, "heads": 2, "hidden": 32}
DECODER = {"width": 16, "layers": 2, "heads": 2, "hidden": 32}


def digits():
    config = configs.default()
    config.steps, config.batch_size = 4, 16
    config.model.arch, config.model.options, config.model.classes = "vision", VISION, -1
    config.data = {"source": "digits", "task": "parity", "split": "train"}
    config.eval_data = {"source": "digits", "task": "parity", "split": "test"}
    config.log.progress = False
    return config


def test_defaults_are_locked_and_documented():
    config = configs.default()
    with pytest.raises((AttributeError, KeyError)):
        config.step = 3
    config.method.rank = 4
    assert configs.check(config).method == {"name": "full", "rank": 4}
    keys = {key: (value, doc) for key, value, doc in configs.documentation()}
    assert keys["optimizer.lr"][0] == 1e-4
    assert all(doc for _, doc in keys.values())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"stepss": 1}, r"no key stepss; did you mean steps\?"),
        ({"optimizer": {"learning_rate": 1}}, "no key optimizer.learning_rate"),
        ({"optimizer": {"weigth_decay": 1}}, r"did you mean optimizer.weight_decay\?"),
        ({"steps": "10"}, r"config.steps is '10' \(str\); it takes an integer"),
        ({"steps": True}, r"config.steps is True \(bool\)"),
        ({"optimizer": 3}, "config.optimizer is 3; it is a section with keys name, lr"),
        ({"log": {"progress": "no"}}, r"config.log.progress is 'no' \(str\); it takes True or False"),
        ({"data": []}, r"config.data is \[\] \(list\); it takes a section"),
    ],
)
def test_config_errors(said, message):
    with pytest.raises(ValueError, match=message):
        configs.check(said)


def test_types_that_fit():
    said = configs.check(ConfigDict({"optimizer": {"lr": 1, "decay": ["w$"]}}))
    assert said.optimizer.lr == 1.0
    assert isinstance(said.optimizer.lr, float)
    assert said.optimizer.decay == ("w$",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.arch": "vison"}, r"arch 'vison' is unknown \(did you mean 'vision'"),
        ({"model.arch": ""}, "needs one of source .* and arch"),
        ({"model.dtype": "fp16"}, "model.dtype is 'fp16'; choose one of float32"),
        ({"model.options": {**VISION, "widht": 3}}, "no option 'widht'; did you mean 'width'"),
        ({"method": {"name": "lorra"}}, r"'lorra' is unknown \(did you mean 'lora'"),
        ({"method": {"name": "lora", "rnk": 2}}, "no option 'rnk'"),
        ({"data": {}}, "config.data is empty"),
        ({"eval_data": {"source": "digits", "task": "identity", "split": "test"}}, "they must be the same, in order"),
        ({"mesh.fsdp": 3}, "mesh data=1, fsdp=3, tensor=1 needs 3 devices"),
    ],
)
def test_job_errors_leave_nothing_behind(tmp_path, change, message):
    config = digits().to_dict()
    for key, value in change.items():
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[last] = value
    with pytest.raises(ValueError, match=message):
        experiment.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_from_a_config_on_eight_devices(tmp_path):
    """The default mesh takes all devices; the same config resumes for more steps."""
    config = digits()
    config.method = {"name": "lora", "rank": 2, "also": "^classifier/"}
    config.checkpoint.every = 4
    first = experiment.run(config, tmp_path)
    assert len(first.state.step.sharding.device_set) == 8
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["data"]["task"] == "parity"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "task_vector.safetensors",
    ]
    config.steps = 6
    second = experiment.run(config, tmp_path)
    assert int(second.state.step) == 6
    assert second.task_vector.manifest["config"]["steps"] == 6
    assert set(second.evaluation) == {"loss", "accuracy", "f1", "matthews"}


def test_a_saved_result_is_a_source_again(tmp_path):
    """From scratch, saved as a Hugging Face directory, and fine-tuned from there with its own tokenizer."""
    config = configs.default()
    config.steps, config.batch_size, config.log.progress = 2, 8, False
    config.model.arch, config.model.options = "decoder", DECODER
    config.data = {
        "source": "stdlib",
        "kind": "docstrings",
        "task": "lm",
        "tokenizer": "bytes",
        "max_length": 32,
        "pack": "concat",
    }
    run = experiment.run(config, tmp_path / "one")
    assert run.params["embed"]["table"].shape[0] == 264, "the tokenizer gives the vocabulary"
    model, _ = experiment.build_model(
        configs.check(config).model, tokenizer=jft.data.build(config.data, batch_size=8).tokenizer
    )
    jft.save(model, run.params, tmp_path / "model")
    config.model.arch, config.model.options, config.model.source = "", {}, str(tmp_path / "model")
    config.model.dtype = "bfloat16"
    again = experiment.run(config, tmp_path / "two")
    base = jax.tree.map(np.asarray, jft.load(tmp_path / "model", dtype="float32")[1])
    jax.tree.map(np.testing.assert_array_equal, base, jax.tree.map(np.asarray, run.params))
    assert again.task_vector.manifest["source"] == str(tmp_path / "model")


@pytest.mark.parametrize("every", [0, 2])
def test_a_refused_start_leaves_the_run_that_is_there(tmp_path, every):
    """A start that is refused changes nothing: neither checkpoints, config, metrics nor the task vector are lost."""
    config = digits()
    config.steps, config.checkpoint.every = 2, every
    experiment.run(config, tmp_path)
    names = ("config.json", "metrics.jsonl", "task_vector.safetensors")
    before = [(tmp_path / name).read_bytes() for name in names]
    config.method = {"name": "lora", "rank": 2}
    with pytest.raises(ValueError, match=r"of another run(.|\n)*method.name: 'full' -> 'lora'"):
        experiment.run(config, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_rows_longer_than_the_models_positions_are_refused(tmp_path):
    """Positions beyond the table would all read its last row."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "word " * 40, "label": 0}) + "\n")
    data = {"source": "jsonl", "files": str(file), "task": "classification", "text": "text", "label": "label"}
    config = digits()
    config.model.arch, config.model.options = "encoder", {**DECODER, "vocab": 300, "positions": 16}
    config.data = data | {"classes": 2, "tokenizer": "bytes", "max_length": 16}
    config.eval_data = {k: v for k, v in config.data.items() if k != "tokenizer"} | {"max_length": 17}
    with pytest.raises(ValueError, match=r"rows of 17 tokens, but the model has 16 positions; set data.max_length"):
        experiment.run(config, tmp_path / "run")
    config.data.max_length, config.eval_data.max_length = 17, 16
    with pytest.raises(ValueError, match="rows of 17 tokens"):
        experiment.run(config, tmp_path / "run")


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    config = digits()
    config.batch_size = 12
    with pytest.raises(ValueError, match=r"a batch of 12 does not divide over the 8 devices .* multiple of 8"):
        experiment.run(config, tmp_path)


def test_a_bad_record_ends_the_run_with_its_state_saved(tmp_path):
    """The file is repaired and the same run goes on."""
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"{i}", "label": i % 2}) for i in range(32)]
    file.write_text("\n".join([*lines, json.dumps({"text": "x", "label": 7}), *lines]) + "\n")
    config = digits()
    config.model.arch, config.model.options = "encoder", {**DECODER, "vocab": 300, "positions": 16}
    config.data = {"source": "jsonl", "files": str(file), "task": "classification", "text": "text", "label": "label"}
    config.data = config.data.to_dict() | {"classes": 2, "tokenizer": "bytes", "max_length": 16}
    config.eval_data, config.steps, config.batch_size = {}, 20, 8
    # As where neither the pass over the data nor the choice of buckets came so far.
    config.check_data, config.data.buckets = 0.0, False
    with pytest.raises(ValueError, match=r"data.jsonl:33: .*is 7.*; the state after step \d+ is saved in") as caught:
        experiment.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / str(caught.value).split("after step ")[1].split()[0]).is_dir()
    file.write_text("\n".join([*lines, json.dumps({"text": "x", "label": 1}), *lines]) + "\n")
    with pytest.raises(ValueError, match="\n  the data's content or order has changed\nundo"):
        experiment.run(config, tmp_path / "run")
    config.checkpoint.accept = True
    assert int(experiment.run(config, tmp_path / "run").state.step) == 20


LONG = {"text": "a text of more than sixteen tokens", "label": 0}


@pytest.mark.parametrize("mend", ["drop", "remove"])
def test_what_an_error_proposes_of_data_works_from_where_the_run_stands(mend, tmp_path, capsys):
    """A row that is too long is dropped by ``too_long``, as the error says, or by hand: positions then are of other data."""
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"{i}", "label": i % 2}) for i in range(32)]
    file.write_text("\n".join([*lines, json.dumps(LONG), *lines]) + "\n")
    config = digits()
    config.model.arch, config.model.options = "encoder", {**DECODER, "vocab": 300, "positions": 16}
    config.data = {"source": "jsonl", "files": str(file), "task": "classification", "text": "text", "label": "label"}
    config.data = config.data.to_dict() | {"classes": 2, "tokenizer": "bytes", "max_length": 16, "buckets": False}
    config.data.too_long = "error"
    config.eval_data, config.steps, config.batch_size, config.check_data = {}, 20, 8, 0.0
    config.log.progress = True
    with pytest.raises(ValueError, match=r"data.jsonl:33: .*too_long.*the state after step \d+ is saved in"):
        experiment.run(config, tmp_path / "run")
    if mend == "drop":
        config.data.too_long = "drop"
        with pytest.raises(ValueError, match=r"data.too_long: 'error' -> 'drop'.*\nundo.*set checkpoint.accept=True"):
            experiment.run(config, tmp_path / "run")
    else:
        file.write_text("\n".join([*lines, *lines]) + "\n")
    config.checkpoint.accept = True
    capsys.readouterr()
    assert int(experiment.run(config, tmp_path / "run").state.step) == 20
    where = "from its beginning" if mend == "drop" else "after as many examples"
    assert f"the data is another one; it goes on {where}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_never_loads_heavy_libraries(tmp_path):
    script = (
        "import sys; from tests.train.test_job import digits; from jft.train import experiment\n"
        f"experiment.run(digits(), {str(tmp_path)!r})\n"
        "print(sorted({'torch', 'transformers', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("[]")
