"""`jft delta`: tables, JSON and refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jft.cli import delta as command
from jft.cli.errors import UsageError
from jft.delta import BitMask, Blocks, Dense, Entries, LowRank, Rows, TaskVector, describe


def base():
    return {"a": {"w": jnp.ones((4, 6), jnp.bfloat16)}, "b": jnp.zeros(3, jnp.bfloat16)}


@pytest.fixture
def files(tmp_path):
    options = {"rank": 2, "alpha": 0.5, "include": []}
    manifest = describe(base(), method={"name": "full", "options": options}, seed=3, config={"lr": 1})
    rows = Rows(jnp.array([1]), jnp.array([[3.0, 4, 0, 0, 0, 0]]), (4, 6))
    names = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    TaskVector({"a/w": rows}, manifest).save(names[0])
    TaskVector({"a/w": LowRank(jnp.ones((4, 1)), jnp.ones((1, 6))), "b": Dense(jnp.ones(3))}, manifest).save(names[1])
    return names


def run(capsys, *argv):
    assert command.main(argv) == 0
    return capsys.readouterr().out


def test_info(files, capsys):
    report = json.loads(run(capsys, "info", files[0], "--json"))
    assert report["manifest"]["seed"] == 3
    row = {"path": "a/w", "encoding": "rows", "shape": [4, 6], "dtype": "F32", "nnz": 2, "density": 2 / 24}
    assert report["paths"] == [row | {"norm": 5.0, "nbytes": 28}]
    assert report["total"] == {"paths": 1, "nbytes": 28, "nnz": 2, "parameters": 27, "density": 2 / 27, "norm": 5.0}
    text = run(capsys, "info", files[0])
    assert "27 parameters" in text
    assert "4x6" in text
    # No JSON above the table, and no config.
    assert "method       name=full, options=(rank=2, alpha=0.5)\n" in text and "{" not in text and "lr" not in text


def test_info_of_sparse_deltas_and_masks(tmp_path, capsys):
    shape = (4, 6)
    mask = BitMask.of(jnp.ones(shape).at[0, 1].set(0))
    entries = Entries(jnp.array([0, 3]), jnp.array([1, 5]), jnp.array([3.0, 4]), shape)
    names = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    TaskVector({"a/w": mask, "b/w": entries}).save(names[0])
    TaskVector({"b/w": Blocks(jnp.array([[0, 0, 0]]), jnp.ones((1, 2, 2)), shape)}).save(names[1])
    report = json.loads(run(capsys, "info", names[0], "--json"))
    shown = [(r["encoding"], r["dtype"], r["nnz"], r["norm"], r["nbytes"]) for r in report["paths"]]
    assert shown == [("bit_mask", "U8", 1, None, 4 + 4), ("entries", "F32", 2, 5.0, 2 * 4 + 3 + 1)]
    assert report["total"]["norm"] is None
    assert "bit_mask" in run(capsys, "info", names[0])
    TaskVector({"b/w": entries}).save(names[0])
    report = json.loads(run(capsys, "diff", *names, "--json"))["paths"][0]
    assert (report["dot"], report["both"], report["either"]) == (3, 1, 5)


def test_quick_info_reads_no_values(files, capsys, monkeypatch):
    from jft.delta import file

    monkeypatch.setattr(file, "read", None)
    report = json.loads(run(capsys, "info", files[1], "--json", "--quick"))
    assert [(r["path"], r["encoding"], r["nbytes"]) for r in report["paths"]] == [
        ("a/w", "low_rank", 40),
        ("b", "dense", 12),
    ]
    assert "norm" not in run(capsys, "info", files[1], "--quick")


def test_diff(files, capsys):
    report = json.loads(run(capsys, "diff", *files, "--json"))
    first, second = report["paths"]
    assert (first["dot"], first["both"], first["either"]) == (7.0, 2, 24)
    assert first["cosine"] == pytest.approx(7 / (5 * 24**0.5))
    assert (second["norm_first"], second["cosine"], second["either"]) == (0.0, 0.0, 3)
    assert report["total"]["cosine"] == pytest.approx(7 / (5 * 27**0.5))
    assert report["total"]["overlap"] == pytest.approx(2 / 27)
    assert report["bases"][0] == report["bases"][1]
    assert "same base" in run(capsys, "diff", *files)


def test_diff_of_different_bases_says_so(files, tmp_path, capsys):
    other = str(tmp_path / "c.safetensors")
    TaskVector({"b": Dense(jnp.ones(3))}, describe({"b": jnp.ones(3)})).save(other)
    assert "different bases" in run(capsys, "diff", files[1], other)
    TaskVector({"b": Dense(jnp.ones(4))}).save(other)
    with pytest.raises(ValueError, match=r"'b': .*different shapes"):
        command.main(["diff", files[1], other])


@pytest.fixture
def models(monkeypatch):
    """`jft.load` and `jft.save` of a model that is its parameters."""
    calls = {}

    def load(name, dtype):
        calls["dtype"] = dtype
        return name, calls.get("base", base())

    monkeypatch.setattr("jft.models.load", load)
    save = lambda model, params, out, like: calls.update(params=params, like=like)
    monkeypatch.setattr("jft.models.save", save)
    return calls


def test_apply(files, models, tmp_path, capsys):
    out = str(tmp_path / "out")
    text = run(capsys, "apply", "model", files[0], out, "--scale", "0.5")
    assert "0.5 *" in text
    assert models["dtype"] == "bfloat16"
    assert models["like"] == "model"
    np.testing.assert_array_equal(models["params"]["a"]["w"][1], jnp.array([2.5, 3, 1, 1, 1, 1], jnp.bfloat16))
    report = json.loads(run(capsys, "apply", "model", files[1], out, "--scale=-1", "--exclude", "^b$", "--json"))
    assert (report["paths"], report["scale"]) == (1, -1.0)
    np.testing.assert_array_equal(models["params"]["b"], np.zeros(3))
    np.testing.assert_array_equal(models["params"]["a"]["w"], np.zeros((4, 6)))


def test_apply_refuses_another_base_and_a_full_directory(files, models, tmp_path):
    models["base"] = base() | {"b": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match="differ in b"):
        command.main(["apply", "model", files[0], str(tmp_path / "out")])
    assert "params" not in models
    assert command.main(["apply", "model", files[0], str(tmp_path / "out"), "--no-check"]) == 0
    with pytest.raises(UsageError, match="not an empty directory"):
        command.main(["apply", "model", files[0], str(tmp_path)])


def test_compress(tmp_path, capsys):
    names = [str(tmp_path / f"{name}.safetensors") for name in ("tau", "signs", "large")]
    value = jnp.array([[3.0, -4, 0, 0], [0, 0, 0, 12]])
    TaskVector({"a/w": Dense(value), "b": Dense(jnp.ones(3))}, describe(base())).save(names[0])
    report = json.loads(run(capsys, "compress", *names[:2], "--method", "bitdelta", "--zero", "plus", "--json"))
    row = {"encoding_before": "dense", "bytes_before": 32, "norm_before": 13.0, "encoding_after": "signs"}
    cosine = 19 / (13 * 8**0.5)
    row |= {"bytes_after": 2 + 4, "norm_after": pytest.approx(19 / 8**0.5), "cosine": pytest.approx(cosine)}
    assert report["paths"][0] == {"path": "a/w", **row}
    assert report["total"]["bytes_after"] == 6 + 12
    assert report["options"] == {"zero": "plus"}
    assert TaskVector.load(names[1]).manifest["base"] == TaskVector.load(names[0]).manifest["base"]
    argv = ("--method", "magnitude", "--density", "0.25", "--include", "^a")
    text = run(capsys, "compress", names[0], names[2], *argv)
    assert "entries" in text
    np.testing.assert_array_equal(TaskVector.load(names[2])["a/w"].dense()[0], [0, -4, 0, 0])
    assert "--ranks" in command.COMPRESS


def test_compress_refuses_before_it_writes(files, tmp_path):
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match="exists; nothing was written"):
        command.main(["compress", files[0], files[1], "--method", "bitdelta"])
    for argv, message in (
        (["--method", "bitdelt"], "did you mean 'bitdelta'"),
        (["--method", "compeft", "--rank", "2"], "compeft has no option 'rank'"),
        (["--method", "delta_come", "--ranks", "2", "--bits", "8,2", "--ratio", "7"], "ratio must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            command.main(["compress", files[0], out, *argv])
    assert not (tmp_path / "out.safetensors").exists()


def test_extract_lora(tmp_path, capsys, monkeypatch):
    from jft.models import DecoderConfig, Model, load_adapter

    shape = {"vocab": 20, "width": 8, "layers": 2, "heads": 2, "hidden": 16, "max_positions": 32}
    model = Model(DecoderConfig(family="llama", **shape))
    monkeypatch.setattr("jft.models.load", lambda name: (model, None))
    name, out = str(tmp_path / "tau.safetensors"), str(tmp_path / "out")
    q = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    TaskVector({"layers/attn/q/w": Dense(jnp.asarray(q)), "final_norm/scale": Dense(jnp.ones(8))}).save(name)
    with pytest.raises(ValueError, match="'final_norm/scale' is dense"):
        command.main(["extract-lora", "base", name, out, "--rank", "2"])
    argv = ("extract-lora", "base", name, out, "--rank", "2", "--select", "/w$")
    report = json.loads(run(capsys, *argv, "--json"))
    u, s, vt = np.linalg.svd(q)
    want = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    cosine = np.linalg.norm(want) / np.linalg.norm(q)
    assert report["paths"] == [{"path": "layers/attn/q/w", "rank": 2, "cosine": pytest.approx(cosine)}]
    np.testing.assert_allclose(load_adapter(model, out)["layers/attn/q/w"].dense(), want, atol=1e-5)
    with pytest.raises(UsageError, match="nothing was written"):
        command.main(list(argv))
    assert "rank" in run(capsys, *argv[:3], str(tmp_path / "second"), *argv[4:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inof"], "invalid choice: 'inof'"),
        ([], "ACTION"),
        (["apply", "a", "b", "c", "--scael=1"], "unknown option '--scael' .did you mean '--scale'"),
        (["info"], "file"),
    ],
)
def test_wrong_usage(argv, message):
    with pytest.raises(UsageError, match=message):
        command.main(argv)


def test_missing_file_is_one_clear_error():
    with pytest.raises(ValueError, match=r"nowhere\.safetensors: no such file"):
        command.main(["info", "nowhere.safetensors"])


@pytest.mark.parametrize(
    "argv", [["--help"], ["info", "--help"], ["diff", "--help"], ["apply", "--help"], ["compress", "--help"]]
)
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 0
    assert "usage: jft delta" in capsys.readouterr().out
