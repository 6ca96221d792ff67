"""Faults of runs, the short form: every damage is told, and a few of each kind are gone through to the end."""

import shutil
import signal

import pytest

from jft.cli import main as cli
from jft.data.source import FINGERPRINT_ROWS, Source, fingerprint
from jft.train import checkpoints, digests
from tests.faults import runs

MUTATIONS = [
    ("jft/train/digests.py", "    if inside != step:", "    if False:"),
    ("jft/train/digests.py", "if now[name] != expected[name]]", "if False]"),
    ("jft/train/preemption.py", "        if not self._begun:", "        if self._begun:"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults") / "whole"
    runs.train(directory)
    return directory


@pytest.mark.parametrize("name", runs.DAMAGES)
def test_the_newest_whole_checkpoint_is_taken(name, whole, tmp_path):
    assert not runs.damaged(tmp_path / "run", whole, name, goes_on=name in ("data cut", "without digest"))


@pytest.mark.parametrize(
    ("moment", "number"),
    [("compile", signal.SIGTERM), ("evaluation", signal.SIGHUP), ("result", signal.SIGINT), ("digest", signal.SIGKILL)],
)
def test_a_signal_ends_with_a_status_and_nothing_is_lost(moment, number, whole, tmp_path):
    assert not runs.stopped(tmp_path / "run", whole, moment, number)


@pytest.mark.parametrize("name", ["disk/full at a save", "disk/no directory", "second start"])
def test_one_line_and_the_same_again(name, whole, tmp_path):
    assert not runs.cases()[name](tmp_path / "run", whole)


def test_checkpoints_are_listed_and_verified(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert cli.call(["checkpoints", str(tmp_path / "run")]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["6", "whole"], ["8", "whole"]]
    runs.DAMAGES["data cut"].act(tmp_path / "run")
    assert cli.call(["checkpoints", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["8", "damaged"]
    assert len(digests.steps(tmp_path / "run" / "checkpoints")) == 2, "nothing is moved"


class Rows(Source):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"text": self.rows[index]}


def test_a_fingerprint_is_of_content_order_and_length():
    rows = [f"row {i}" for i in range(50)]
    same = fingerprint(Rows(list(rows)))
    assert fingerprint(Rows(rows)) == same
    for changed in (rows[:-1], [*rows[:20], "other", *rows[21:]], [rows[1], rows[0], *rows[2:]]):
        assert fingerprint(Rows(changed)) != same
    read = []
    long = Rows(range(10 * FINGERPRINT_ROWS))
    long.__class__ = type("Counted", (Rows,), {"__getitem__": lambda s, i: read.append(i) or {"text": i}})
    fingerprint(long)
    assert len(read) == FINGERPRINT_ROWS + 1, "a large source is not read whole"
    assert read[-1] == len(long) - 1


def test_differences_are_said_in_the_configs_words():
    saved = {"base": "a", "batch": {"x": [8, 4]}, "optimizer": {"name": "adamw", "lr": 1.0}, "content": {"rows": ["a"]}}
    config = {"batch_size": 8, "steps": 4, "optimizer": {"lr": 1.0}}
    now, other = {**saved, "batch": {"x": [16, 4]}}, {**config, "batch_size": 16, "steps": 9}
    with pytest.raises(checkpoints.Changed) as error:
        checkpoints.compare(saved, now, "these are", (config, other), accept=True)
    lines = str(error.value).splitlines()
    assert lines[1:-1] == ["  batch_size: 8 -> 16"]
    assert "accept" not in lines[-1], "the state would not fit"
    rows = {**saved, "content": {"rows": ["b"]}}
    with pytest.raises(checkpoints.Changed, match=r"content or order has changed\n.*checkpoint.accept=True"):
        checkpoints.compare(saved, rows, "these are")
    checkpoints.compare(saved, rows, "these are", accept=True)
    # Saved before there were fingerprints.
    checkpoints.compare({k: v for k, v in saved.items() if k != "content"}, saved, "these are")
