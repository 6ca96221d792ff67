"""`jft generate`: deltas side by side, runs, input from a pipe, JSON, and what is refused."""

import io
import json

import jax
import pytest

import jft
from jft.cli import main
from jft.data.tokenizer import byte_tokenizer
from jft.models.decoder import DecoderConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, and two deltas of it, of which the second makes it another one."""
    folder = tmp_path_factory.mktemp("generate")
    model = jft.Model(DecoderConfig(264, 16, 1, 2, hidden=16, init_std=0.5))
    params = model.init(jax.random.key(0))
    jft.save(model, params, folder / "model")
    byte_tokenizer().save(folder / "model")
    for name, seed in (("a", 1), ("b", 2)):
        other = jax.tree.map(lambda x, y: x + y, params, model.init(jax.random.key(seed)))
        (folder / name).mkdir()
        jft.TaskVector.between(params, other).save(folder / name / "task_vector.safetensors")
    return folder


def run(argv, capsys, code=0):
    assert main.call(["generate", *map(str, argv)]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_side_by_side(folder, capsys):
    deltas = [f"--delta={folder}/{name}/task_vector.safetensors" for name in "ab"]
    common = [f"--model={folder}/model", "--max-tokens=6", "--base", *deltas]
    rows = json.loads(run([*common, "--json", "hello", "two words"], capsys))
    assert [row["prompt"] for row in rows] == ["hello", "two words"]
    # Equal names, so that paths tell them apart.
    assert list(rows[0]["answers"]) == ["base", *(d.partition("=")[2] for d in deltas)]
    assert len(set(rows[0]["answers"].values())) == 3
    model, params = jft.load(folder / "model", dtype="float32")
    tau = jft.TaskVector.load(folder / "a" / "task_vector.safetensors")
    options = {"tokenizer": folder / "model", "chat": True, "max_tokens": 6}
    ours = jft.generate(model, jft.apply(params, tau), ["hello", "two words"], **options)
    assert [list(row["answers"].values())[1] for row in rows] == ours
    # One prompt is shown as its answers are made, with labels.
    shown = run([*common, "hello"], capsys)
    assert shown == "".join(f"[{label}] {text}\n" for label, text in rows[0]["answers"].items())


def test_lines_of_a_pipe(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    out = run([f"--model={folder}/model", "--raw", "--max-tokens=3", "--temperature=1", "--top-k=5"], capsys)
    assert out.startswith("> one\n") and "> two\n" in out


def test_a_run(folder, tmp_path, capsys):
    """A finished run, and its evaluations with samples and exact match."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "response": "yes"}) + "\n" for i in range(10)))
    pairs = {"source": "jsonl", "files": str(data), "task": "sft", "chat": True, "max_length": 24}
    config = {
        "steps": 2,
        "batch_size": 8,
        "model": {"source": str(folder / "model")},
        "data": pairs,
        "eval_data": pairs,
        "eval": {"every": 1, "batches": 1, "samples": ["3?"], "exact_match": 3, "max_tokens": 4},
        "method": {"name": "lora", "rank": 2},
        "log": {"progress": False},
    }
    from jft.train import experiment

    run_ = experiment.run(config, tmp_path / "run")
    assert 0 <= run_.evaluation["exact_match"] <= 1
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(1, "3?"), (2, "3?")]
    out = json.loads(run([f"--workdir={tmp_path}/run", "--base", "--json", "--max-tokens=4", "3?"], capsys))
    assert out[0]["answers"]["run"] == samples[-1]["text"]
    assert list(out[0]["answers"]) == ["base", "run"]
    # A run on plain texts gets plain texts, although its tokenizer has a template.
    argv = [f"--workdir={tmp_path}/run", "--json", "--max-tokens=4", "3?"]
    raw, plain = (json.loads(run([*argv, more], capsys)) for more in ("--raw", "--config.data.chat=False"))
    assert raw == plain != [{"prompt": "3?", "answers": {"run": samples[-1]["text"]}}]
    assert (
        json.loads(run([*argv, "--config.data.chat=False", "--chat"], capsys))[0]["answers"]["run"]
        == samples[-1]["text"]
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --model=SOURCE or --workdir=RUN"),
        (["--model=m", "--workdir=w"], "one of them"),
        (["--model=m", "--base"], "there is no --delta"),
        (["--model=m", "--delta=none.safetensors"], "task vector 'none.safetensors' does not exist"),
        (["--model=m", "--raw", "--system=x"], "--system goes through the chat template; leave out --raw"),
        (["--model=m", "--raw", "--chat"], "--chat goes through"),
        (["--model=m", "--temprature=1"], "did you mean '--temperature'"),
        (["--workdir=nowhere"], "workdir 'nowhere' does not exist"),
    ],
)
def test_wrong_usage(argv, message, capsys):
    assert message in run(argv, capsys, code=2)
