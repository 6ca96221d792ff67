"""Files are whole or not there; hints name what was meant."""

import pytest

from jft import files
from jft.names import nearest


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    files.write_text(path, "old")

    def fill():
        with files.whole(path) as beside:
            beside.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_nothing_is_seen_before_the_end(tmp_path):
    with files.whole(tmp_path / "x") as beside:
        beside.write_text("new")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "new"


def test_nearest():
    assert nearest("lorra", ["full", "lora"]) == " (did you mean 'lora'?)"
    assert nearest("zzz", ["full", "lora"]) == ""
    assert nearest("zzz", ["full", "lora"], otherwise="; known: full, lora") == "; known: full, lora"
    assert nearest("stpes", ["steps", "step", "seed"], n=2, hint=": {}") == ": steps, step"
    assert nearest("zzz", ["full"], cutoff=0.0, hint="; nearest: {}") == "; nearest: full"
    assert nearest(1, [1, 2]) == " (did you mean '1'?)"
    assert nearest("x", [], cutoff=0.0) == ""
