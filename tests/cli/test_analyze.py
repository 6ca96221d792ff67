"""`jft analyze` on two small runs: numbers, pictures, and what it refuses."""

import json

import numpy as np
import pytest

from jft.cli import main
from tests.cli.test_runs import CONFIG


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyze")
    (folder / "config.py").write_text(CONFIG)
    common = [f"--config={folder / 'config.py'}", "--config.eval_data.limit=40", "--config.optimizer.lr=1e-2"]
    for name, more in (("upright", []), ("turned", ["--config.data.rotate=90", "--config.eval_data.rotate=90"])):
        assert main.call(["train", *common, *more, f"--workdir={folder / name}"]) == 0
    return [str(folder / "upright"), str(folder / "turned")]


def told(capsys, *argv):
    capsys.readouterr()
    assert main.call(["analyze", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_disentangle(runs, capsys, tmp_path):
    found = told(capsys, "disentangle", *runs, "--points=3", "--lowest=0", "--largest=1", f"--out={tmp_path}")
    xi = np.array(found["xi"])
    assert found["grid"] == [0, 0.5, 1]
    assert found["pair"] == ["upright", "turned"]
    assert xi[0, 0] == 0
    assert np.all((xi >= 0) & (xi <= 2))
    np.testing.assert_allclose(sum(np.array(x) for x in found["each"].values()), xi)
    assert json.loads((tmp_path / "disentangle.json").read_text()) == found
    assert (tmp_path / "disentangle.png").read_bytes().startswith(b"\x89PNG")
    linear = told(capsys, "disentangle", *runs, "--points=3", "--lowest=0", "--largest=1", "--forward=linearized")
    assert linear["method"] == "linearized"


def test_ntk(runs, capsys, tmp_path):
    found = told(capsys, "ntk", *runs, "--examples=6", "--until=features", f"--out={tmp_path}")
    assert len(found["values"]) == 12
    assert found["values"] == sorted(found["values"], reverse=True)
    assert 1 <= found["effective_rank"] <= 12
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found["located"].values())
    assert (tmp_path / "ntk_spectrum.png").exists()
    assert (tmp_path / "ntk_located.png").exists()


def test_linearity(runs, capsys, tmp_path):
    found = told(capsys, "linearity", runs[0], "--points=3", f"--out={tmp_path}")
    rows = found["upright"]
    assert [row["coefficient"] for row in rows] == [0, 0.5, 1]
    assert rows[0]["error"] is None
    assert 0 < rows[1]["error"] < rows[2]["error"]
    assert main.call(["eval", f"--workdir={runs[0]}", "--json"]) == 0
    assert rows[2]["standard"] == pytest.approx(json.loads(capsys.readouterr().out), rel=1e-5)
    assert main.call(["eval", f"--workdir={runs[0]}", "--forward=linearized", "--json"]) == 0
    assert rows[2]["linearized"] == pytest.approx(json.loads(capsys.readouterr().out), rel=1e-5)
    assert main.call(["analyze", "linearity", runs[0], "--points=2", f"--out={tmp_path}"]) == 0
    assert "coefficient" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["disentangle", "{0}"], "RUN"),
        (["disentangle", "{0}", "{0}"], "a run is given twice"),
        (["ntk", "nowhere"], "'nowhere' does not exist"),
        (["linearity", "{0}", "--points=1"], "--points must be at least 2, not 1"),
        (["disentangle", "{0}", "{1}", "--until=features"], "until='features' is of linearized forward passes"),
        (["linearity", "{0}", "--nothing"], "--nothing"),
    ],
)
def test_wrong_use_is_one_line(runs, capsys, argv, said):
    assert main.call(["analyze", *(a.format(*runs) for a in argv)]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_runs_of_different_bases_are_refused(runs, tmp_path, capsys):
    other = tmp_path / "other"
    argv = ["train", f"--config={runs[0]}/config.json", f"--workdir={other}", "--config.seed=5"]
    assert main.call(argv) == 0
    assert main.call(["analyze", "disentangle", runs[0], str(other), "--points=2"]) == 1
    assert "base" in capsys.readouterr().err
