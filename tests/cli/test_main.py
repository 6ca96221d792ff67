"""The dispatcher: what it lists, what it refuses, in one line and with the right exit code."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest

from jft.cli import main, methods


def test_help_lists_every_command_without_importing_any(capsys):
    assert main.call(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("train", "eval", "methods", "export", "quickstart", "plot", "delta"):
        assert f"\n  {command} " in text
    assert all(main.commands().values()), "every command says in one line what it does"


def test_help_is_fast_and_imports_no_jax():
    since = time.perf_counter()
    code = "import sys; from jft.cli.main import call; call(['--help']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - since < 5, "a loose bound: machines that run tests are busy"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["trian"], 2, "unknown command 'trian' (did you mean 'train'?)"),
        (["methods", "lorra"], 2, "unknown method 'lorra' (did you mean 'lora'?)"),
        (["methods", "--jsno"], 2, "unknown option '--jsno' (did you mean '--json'?)"),
        (["train"], 2, "--config=FILE.py is needed"),
        (["train", "--config=nowhere.py"], 2, "config file 'nowhere.py' does not exist"),
        (["eval", "--workdir=nowhere"], 2, "workdir 'nowhere' does not exist"),
        (["plot", "--workdir=nowhere"], 1, "no metrics.jsonl in 'nowhere' or below"),
        (["quickstart", "--config.studies.digits.commmon.steps=3"], 2, "did you mean 'studies.digits.common.steps'?"),
        (["quickstart", "--config.studies.digits.tasks.nine.data.source=digits"], 2, "unknown config key"),
    ],
)
def test_user_errors_are_one_line(argv, code, message, capsys):
    assert main.call(argv) == code
    written = capsys.readouterr()
    assert message in written.err
    assert written.err.startswith("jft: ")
    assert written.err.count("\n") == 1
    assert not written.out


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("JFT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command"):
        main.call(["trian"])


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(methods, "main", lambda argv: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main.call(["methods"])


@pytest.mark.parametrize(
    ("installed", "device", "expected"),
    [
        ({"libtpu"}, None, True),
        ({"libtpu"}, "accel0", False),
        ({"libtpu"}, "vfio", False),
        ({"libtpu", "jax_plugins"}, None, False),
        (set(), None, False),
    ],
)
def test_libtpu_is_left_alone_where_there_is_no_tpu(installed, device, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    if device:
        (tmp_path / device).touch()
    assert main.only_processor(tmp_path) == expected


def test_methods_as_json(capsys):
    assert main.call(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lora"]["paper"] == "Hu et al. 2021, arXiv:2106.09685"
    assert rows["lora"]["options"]["rank"] == 16
    assert rows["bitfit"]["trains"].startswith("all weights matching")
    assert main.call(["methods", "lora"]) == 0
    assert "option   rank = 16" in capsys.readouterr().out


def test_a_file_cannot_write_to_the_terminal(monkeypatch, capsys):
    def fail(argv):
        raise ValueError("in \x1b[31ma.json\x1b]0;title\x07:\nkey \u202e is bad")

    monkeypatch.setattr(methods, "main", fail)
    assert main.call(["methods"]) == 1
    assert capsys.readouterr().err == "jft: in \\x1b[31ma.json\\x1b]0;title\\x07: key \\u202e is bad\n"
