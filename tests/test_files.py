"""Files are whole or not there; hints name what was meant."""

import os

import pytest

from jft import files
from jft.names import nearest

MUTATIONS = [
    ("jft/files.py", '("", ".", "..") and not', '("", ".") and not'),
    ("jft/files.py", "    if not stat.S_ISREG(status.st_mode):", "    if stat.S_ISFIFO(status.st_mode):"),
]


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


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "../x", "/x", "a\0b", "\x1b[31m", "x" * 201, None, 3])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match=r"the task is .*, which cannot be the name of its folder"):
        files.check_name(name, "the task")


@pytest.mark.parametrize("name", ["a", "a b", "ß.é", "...", "x" * 200, "a..b", "-"])
def test_other_names_are_kept(name):
    assert files.check_name(name, "the task") == name


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("é")
    (tmp_path / "link").symlink_to("file")
    for name, what in ((".", "is a directory"), ("pipe", "pipe is a pipe, socket or device"), ("/dev/zero", "device")):
        with pytest.raises(ValueError, match=f"{what}, not a file"):
            files.read_bytes(tmp_path / name, 10)
    assert files.read_text(tmp_path / "link", 2) == "é"
    with pytest.raises(ValueError, match="file: 2 bytes, where 1 at most are read; mend it"):
        files.read_bytes(tmp_path / "file", 1, hint="mend it")
    (tmp_path / "file").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"file: not UTF-8 text \(byte 1\); convert the file"):
        files.read_text(tmp_path / "file", 9)
