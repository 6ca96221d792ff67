"""The pod launcher: what it would call, and what it calls (a recording gcloud stands in for the real one)."""

import pathlib
import shlex
import subprocess
import sys
import tarfile

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "tpu_pod.py"
BASE = [sys.executable, str(SCRIPT), "--name", "slice", "--zone", "us-z"]


def test_dry_run_prints_three_calls_with_the_command_quoted():
    out = subprocess.run([*BASE, "--env", "A=b c", "--dry-run", "--", "jft", "train", "--config=x y"],
                         capture_output=True, text=True, check=True).stdout  # fmt: skip
    copy, setup, run = (shlex.split(line) for line in out.splitlines())
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert all(call[-3:] == ["--zone", "us-z", "--worker=all"] for call in (copy, setup, run))
    remote = shlex.split(run[6].removeprefix("--command="))
    assert remote[-3:] == ["jft", "train", "--config=x y"]
    assert "JFT_MULTIHOST=1" in remote and "A=b c" in remote


def test_copies_the_tracked_files_and_retries(tmp_path):
    log, copied = tmp_path / "log", tmp_path / "copied.tar.gz"
    fake = tmp_path / "gcloud"
    fake.write_text(
        f'#!/bin/sh\necho "$4" >> {log}\nif [ "$4" = scp ]; then cp "$5" {copied}; fi\n'
        f'case "$6" in *JFT_MULTIHOST*) [ $(grep -c ssh {log}) -ge 3 ];; esac\n'
    )
    fake.chmod(0o755)
    command = [*BASE, "--retries", "2", "--", "jft", "train"]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert log.read_text().split() == ["scp", "ssh", "ssh", "ssh"]  # copy, set up, a failure, a success
    assert "attempt 1 of 3" in done.stderr
    with tarfile.open(copied) as archive:
        assert "pyproject.toml" in archive.getnames()


def test_ends_with_the_reason_of_gcloud(tmp_path):
    fake = tmp_path / "gcloud"
    fake.write_text("#!/bin/sh\necho 'ERROR: (gcloud) no such slice' >&2\nexit 3\n")
    fake.chmod(0o755)
    for path, code, last in (
        (f"{tmp_path}:/usr/bin:/bin", 3, "ERROR: (gcloud)"),
        (f"{tmp_path}/nothing", 127, "tpu_pod: there is no"),
    ):
        done = subprocess.run([*BASE, "--", "jft"], env={"PATH": path}, capture_output=True, text=True)
        assert done.returncode == code
        assert done.stderr.splitlines()[-1].startswith(last), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_wrong_use_is_refused():
    for extra, message in ([], "no command"), (["--env", "A", "--", "x"], "NAME=VALUE"):
        done = subprocess.run([*BASE, *extra], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
