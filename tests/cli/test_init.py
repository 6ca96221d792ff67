"""`jft init`, `--dry-run`, `--print-config`: from nothing to a run, and configs whose keys follow overrides."""

import json

import pytest

from jft.cli import init, main, options, train
from jft.train.config import check, default
from tests.cli.test_configs import spec

ROWS = [{"prompt": f"{i} + 1 = ", "response": str(i + 1), "text": f"number {i}", "label": str(i % 2),
         "messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "yes"}]}
        for i in range(40)]  # fmt: skip
TINY = {"width": 16, "layers": 1, "heads": 2, "hidden": 32}
ARCH = {
    "classification": ("encoder", TINY | {"positions": 64}),
    "regression": ("encoder", TINY | {"positions": 64}),
    "seq2seq": ("t5", TINY),
    "images": ("vision", TINY | {"image": 16, "patch": 8}),
}


def rows(tmp_path, kind="jsonl"):
    path = tmp_path / f"mine.{kind}"
    if kind == "csv":
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def written(tmp_path, kind, data):
    """The arguments of `jft train` for the config of a kind, with a model small enough to train here."""
    out = tmp_path / f"{kind}.py"
    assert main.call(["init", kind, f"--data={data}", f"--out={out}"]) == 0
    arch, fields = ARCH.get(kind, ("decoder", TINY))
    changes = {"model.arch": arch, "model.options": fields, "epochs": 0.2, "batch_size": 8, "model.dtype": "float32",
               "model.param_dtype": "float32", "model.remat": "none"}  # fmt: skip
    if kind == "images":
        changes["data.image"] = {"size": 16}
    else:
        changes |= {"data.tokenizer": "bytes", "data.max_length": 64}
    return [f"--config={out}", *(f"--config.{k}={v}" for k, v in changes.items())]


def images(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (i, 9, 200)).save(tmp_path / "images" / name / f"{i}.png")
    return str(tmp_path / "images")


@pytest.mark.parametrize("kind", init.KINDS)
def test_what_init_writes_is_a_run(tmp_path, kind, capsys):
    data = (
        images(tmp_path)
        if kind == "images"
        else rows(tmp_path, "csv" if ARCH.get(kind, "")[:1] == ("encoder",) else "jsonl")
    )
    argv = written(tmp_path, kind, data)
    # One of each is trained; of the others it is enough that they would be.
    if kind == "classification":
        assert main.call(["train", *argv, f"--workdir={tmp_path / 'run'}"]) == 0
        assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["split"] == "eval"
        return
    assert main.call(["train", *argv, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "dry run: nothing was trained, and nothing written" in said
    assert "step takes" in said and "epochs of" in said and "data: 38 records" in said and "weights," in said
    assert ("first example" in said) == (kind != "images")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"{kind}.py", data.rpartition("/")[2]])


@pytest.mark.parametrize("kind", init.KINDS)
def test_every_key_stands_there_at_its_default_or_set(tmp_path, kind):
    text = init.text(kind)
    bare = check(default())
    namespace = {}
    exec(text, namespace)
    config = namespace["get_config"]()
    found = check(config)
    assert found.model.source == init.KINDS[kind].model and found.eval_data == {"held_out": 0.05}
    # With all that is commented out put in: the same config.
    exec(text.replace("    # config.", "    config."), namespace)
    assert check(namespace["get_config"]()) == found != bare
    for key, _, doc in __import__("jft.train.config", fromlist=["documentation"]).documentation():
        assert f"config.{key} = " in text and doc in text


def test_init_takes_the_files_one_has(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.call(["init", "sft", "--data=a/b.parquet", "--model=my/model"]) == 0
    config = options.load("sft.py")
    assert (config.data.source, config.data.files, config.model.source) == ("parquet", "a/b.parquet", "my/model")
    for argv, message in (
        (["sft"], "'sft.py' exists"),
        (["stf"], "unknown kind 'stf' (did you mean 'sft'"),
        (["sft", "--data=x.txt", "--out=y.py"], "--data=x.txt: one of .jsonl, .json, .csv"),
    ):
        capsys.readouterr()
        assert main.call(["init", *argv]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "y.py").exists()


def test_print_config_is_a_config(tmp_path, capsys):
    argv = [f"--config={spec('decoder_sft')}", "--config.data.files=mine.jsonl", "--print-config"]
    assert main.call(["train", *argv]) == 0
    text = capsys.readouterr().out
    (tmp_path / "config.json").write_text(text)
    found = check(options.load(str(tmp_path / "config.json")))
    assert found.eval_data == {**{k: v for k, v in found.data.items() if k != "holdout"}, "held_out": 0.02}
    assert found.data["files"] == "mine.jsonl"
    assert json.loads(train.resolved(options.load(str(tmp_path / "config.json")))) == json.loads(text)


def overridden(name, *changes):
    _, config = options.parse(
        options.Parser(prog="jft train"), [f"--config={spec(name)}", *changes], may_add=train.may_add
    )
    return json.loads(train.resolved(config))


def test_overrides_are_followed_by_what_is_derived():
    """What each config's own words say can be overridden."""
    config = overridden("decoder_sft", "--config.data.files=mine.jsonl", "--config.data.prompt=question")
    assert config["eval_data"]["files"] == "mine.jsonl" and config["eval_data"]["prompt"] == "question"
    config = overridden(
        "decoder_sft", "--config.data.name=ORG/NAME", "--config.data.source=hf", "--config.data.split=train"
    )
    for part in ("data", "eval_data"):
        assert config[part]["source"] == "hf" and config[part]["name"] == "ORG/NAME" and config[part]["task"] == "sft"
        assert "files" not in config[part]
    config = overridden("decoder_sft", "--config.eval_data.files=test.jsonl", "--config.eval_data.held_out=None",
                        "--config.data.holdout=None")  # fmt: skip
    assert config["eval_data"]["files"] == "test.jsonl" and config["data"]["files"] == "train.jsonl"
    config = overridden("encoder_classification", "--config.data.files=a.csv", "--config.eval_data.files=b.csv",
                        "--config.data.text=body", "--config.data.max_length=64")  # fmt: skip
    assert (config["data"]["files"], config["eval_data"]["files"]) == ("a.csv", "b.csv")
    assert config["eval_data"]["text"] == "body" and config["eval_data"]["max_length"] == 64


def test_another_name_leaves_options_of_the_old_one_behind():
    config = overridden("decoder_sft", "--config.method.also=^x", "--config.method.name=bitfit")
    assert config["method"] == {"name": "bitfit", "also": "^x"}
    assert overridden("decoder_sft", "--config.method.name=lora")["method"]["rank"] == 16
    config = overridden("decoder_sft", "--config.epochs=2")
    assert (config["steps"], config["epochs"]) == (0, 2.0)
    assert overridden("encoder_classification", "--config.steps=7")["epochs"] == 0
    both = overridden("encoder_classification", "--config.steps=7", "--config.epochs=1")
    assert (both["steps"], both["epochs"]) == (7, 1.0), "refused later: both were asked for"
    assert overridden("decoder_sft", "--config.model.arch=decoder")["model"]["source"] == ""


def test_parts_of_a_study_follow_its_data():
    from jft.analysis import settings

    config = options.load(spec("clip_eight"))
    options.override(config, "studies.clip.tasks.DTD.data.image.size", "128", lambda *_: True)
    options.override(config, "studies.clip.common.batch_size", "64", lambda *_: True)
    parts = settings.data_parts(config.studies.clip.to_dict(), "DTD")
    assert [part["image"]["size"] for part in parts.values()] == [128] * 3
    assert [part["split"] for part in parts.values()] == ["train+validation", "train+validation", "test"]
    assert (
        "holdout" not in parts["eval_data"]
        and parts["eval_data"]["held_out"] == 0.1
        and parts["data"]["holdout"] == 0.1
    )
    found = settings.of_run(config.studies.clip.to_dict(), "DTD", "full")
    assert (found.epochs, found.steps, found.batch_size) == (76.0, 0, 64)
