"""Start the same command on every host of a TPU pod slice.

    python launch/tpu_pod.py --name my-slice --zone us-central2-b -- \\
        jft train --config=configs/llm.py:llama-3.1-8b,lora --workdir=/mnt/shared/run

Copies the tracked files of this clone to every worker, makes one virtual environment there (only again when
pyproject.toml has changed), and runs the command on all workers at once with JFT_MULTIHOST=1, so that the processes find
each other through the TPU's own metadata. Needs the gcloud command and ssh access to the slice. Every step is a gcloud
call that --dry-run prints instead. The workdir must be a directory that all hosts share: NFS, or a bucket
mounted with gcsfuse.

--retries N starts the command again when it fails, after a preemption or a maintenance event: jft resumes from its last
whole checkpoint.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

REMOTE = "jft-run"
SETUP = (
    "mkdir -p {remote} && tar -xzf {archive} -C {remote} && cd {remote} && "
    "(cmp -s pyproject.toml .venv/installed 2>/dev/null || "
    "(python3 -m venv .venv && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q -e '.[tpu{extras}]' && "
    "cp pyproject.toml .venv/installed))"
)


def gcloud(verb: str, args: argparse.Namespace, *rest: str) -> list[str]:
    """A gcloud call on all workers of the slice."""
    where = ["--zone", args.zone, "--worker=all"] + (["--project", args.project] if args.project else [])
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *rest, *where]


def steps(args: argparse.Namespace, archive: str) -> list[list[str]]:
    """Copy, set up, run: the calls in order."""
    remote_archive = f"{REMOTE}.tar.gz"
    extras = "".join(f",{e}" for e in args.extras)
    setup = SETUP.format(remote=REMOTE, archive=remote_archive, extras=extras)
    variables = ["JFT_MULTIHOST=1", *args.env]
    command = f"cd {REMOTE} && env {shlex.join(variables)} PATH=$PWD/.venv/bin:$PATH {shlex.join(args.command)}"
    return [
        gcloud("scp", args, archive, f"{args.name}:{remote_archive}"),
        gcloud("ssh", args, args.name, f"--command={setup}"),
        gcloud("ssh", args, args.name, f"--command={command}"),
    ]


def pack(destination: pathlib.Path) -> None:
    """The tracked files of this clone, as they are in the working tree."""
    root = pathlib.Path(__file__).resolve().parent.parent
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True).stdout
    names = [n for n in listed.decode().split("\0") if n and (root / n).exists()]
    subprocess.run(["tar", "-czf", str(destination), *names], cwd=root, check=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the TPU slice")
    parser.add_argument("--zone", required=True, help="its zone, such as us-central2-b")
    parser.add_argument("--project", default="", help="its project; gcloud's default otherwise")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable; repeatable")
    parser.add_argument("--extras", nargs="*", default=["hf"], help="extras of jft to install beside tpu")
    parser.add_argument("--retries", type=int, default=0, help="start again this many times after a failure")
    parser.add_argument("--dry-run", action="store_true", help="print the calls and do nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command given: put it after --")
    for pair in args.env:
        if "=" not in pair:
            parser.error(f"--env {pair!r} is not NAME=VALUE")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not args.dry_run and shutil.which("gcloud") is None:
        print("tpu_pod: there is no gcloud command; install the Google Cloud CLI and log in", file=sys.stderr)
        return 127
    if args.dry_run:
        for call in steps(args, f"{REMOTE}.tar.gz"):
            print(shlex.join(call))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        archive = pathlib.Path(folder) / f"{REMOTE}.tar.gz"
        pack(archive)
        *prepare, run = steps(args, str(archive))
        for call in prepare:
            # gcloud has said why, on the last lines that are shown.
            if code := subprocess.run(call).returncode:
                return code
        for attempt in range(args.retries + 1):
            code = subprocess.run(run).returncode
            if code == 0:
                return 0
            print(f"attempt {attempt + 1} of {args.retries + 1} ended with exit code {code}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
