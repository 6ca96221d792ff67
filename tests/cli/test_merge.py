"""`jft merge`: recipes, rules by option, dry runs, lists and refusals; `jft bench merge` on a small shape."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jft.bench import merge as benchmark
from jft.cli import bench, main
from jft.cli import merge as command
from jft.cli.errors import UsageError
from tests.models import checkpoints

MUTATIONS = [
    ("jft/cli/merge.py", 'entry["parameters"]["weight"] = weight', 'entry["parameters"]["weight"] = 1.0'),
    ("jft/cli/merge.py", "weights * len(each) if len(weights) == 1", "weights if len(weights) == 1"),
    ("jft/cli/merge.py", "recipe.parse({**found.text, **_overrides(options)})", "recipe.parse({**found.text})"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(checkpoints.write(folder / f"m{i}", checkpoints.llama_tensors(seed=i))) for i in range(3)]


def run(capsys, *argv):
    assert command.main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def test_a_recipe_and_the_same_by_options(models, tmp_path, capsys):
    each = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models[1:], [0.5, -0.25], strict=True)]
    recipe = {"merge_method": "task_arithmetic", "base_model": models[0], "models": each}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    assert "3 inputs" in run(capsys, tmp_path / "r.yml", tmp_path / "a", "--dtype", "float32")
    argv = [
        "--method",
        "task_arithmetic",
        "--base",
        models[0],
        *models[1:],
        "--out",
        tmp_path / "b",
        "--dtype",
        "float32",
    ]
    report = json.loads(run(capsys, *argv, "--weights", 1, -0.5, "--scale", 0.5, "--json"))
    assert report["rule"] == "task_arithmetic"
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    held = [checkpoints.llama_tensors(seed=i) for i in range(3)]
    for name, x in a.items():
        base, first, second = (h[name].astype(np.float64) for h in held)
        np.testing.assert_allclose(x, base + 0.5 * (first - base) - 0.25 * (second - base), atol=1e-5)
        np.testing.assert_allclose(b[name], x, atol=1e-6)
    run(capsys, *argv[:-4], "--out", tmp_path / "c", "--weights", 0.5, "--dtype", "float32")
    c = load_file(tmp_path / "c" / "model.safetensors")
    np.testing.assert_allclose(c[name], base + 0.5 * (first - base) + 0.5 * (second - base), atol=1e-5)


def test_dry_run(models, tmp_path, capsys):
    argv = [
        "--method",
        "ties",
        "--base",
        models[0],
        *models[1:],
        "--out",
        tmp_path / "out",
        "--option",
        "density=[0.2,0.4]",
    ]
    report = json.loads(run(capsys, *argv, "--dry-run", "--json"))
    assert report["preset"] == "paper"
    assert report["tensors"][0]["density"] == [0.2, 0.4]
    size = sum(x.nbytes for x in checkpoints.llama_tensors().values())
    assert report["read"] == 3 * size
    assert report["written"] == {"model.safetensors": size}
    assert "0.2, 0.4" in run(capsys, *argv, "--dry-run")
    assert not (tmp_path / "out").exists()


def test_list(capsys):
    rows = {row["rule"]: row for row in json.loads(run(capsys, "--list", "--json"))}
    assert rows["ties"]["presets"][:2] == ["paper", "mergekit"]
    assert "2306.01708" in run(capsys, "--list")


def test_refusals(models, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    base = ["--method", "ties", "--base", models[0]]
    for argv, message in [
        ([tmp_path / "r.yml"], "a recipe and a directory"),
        ([tmp_path / "r.yml", tmp_path / "o", "--weights", 1], "--weights belongs to --method"),
        ([*base, "--out", tmp_path / "o"], "needs models"),
        ([*base, *models[1:], "--out", tmp_path / "o", "--weights", 1, 2, 3], "one per model"),
        ([*base, *models[1:], "--out", tmp_path / "o", "--option", "density"], "NAME=VALUE"),
        ([*base, *models[1:], "--out", tmp_path / "full"], "not an empty directory"),
        ([*base, *models[1:], "--outt", tmp_path / "full"], "--out'"),
    ]:
        with pytest.raises(UsageError, match=message):
            command.main([str(a) for a in argv])
    (tmp_path / "r.yml").write_text("merge_method: ties\nmodels: [{model: x, wieght: 1}]\n")
    assert main.call(["merge", str(tmp_path / "r.yml"), str(tmp_path / "o")]) == 1
    error = capsys.readouterr().err
    assert "r.yml" in error
    assert "'wieght'" in error


def test_bench(capsys, monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", (16, 32, 1, 2, 1, 32))
    assert bench.main(["merge", "--params", "tiny", "--methods", "task_arithmetic", "--tools", "jft", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(r["method"], r["tool"]) for r in report["runs"]] == [("task_arithmetic", "jft")]
    assert report["runs"][0]["peak"] > 1e7
