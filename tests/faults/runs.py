"""Faults of runs: kills and signals at named moments, disks that are full, damaged checkpoints, second starts.

Each case gives what was found, ``""`` where it holds. ``python -m tests.faults`` runs them all and prints a table.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import jft
from jft import presets
from jft.train import checkpoints, digests, lock, training
from jft.train.members import Members
from jft.train.metrics import read
from jft.train.preemption import EXIT_CODE
from tests.train import tools

STEPS, EVERY = 8, 2
# Where a fault strikes: the owner and name of a function, and the call of it that does not come back as it should.
MOMENTS = {
    "start": (importlib.import_module("jft.train.finetune"), "_train", 1),
    "compile": (Members, "compile_step", 1),
    "step": (training.Training, "step", 5),
    "save": (checkpoints.Checkpoints, "save", 2),
    "digest": (digests, "write", 2),
    "evaluation": (training.Training, "evaluate", 1),
    "result": (training, "save", 1),
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]


def train(workdir, steps=STEPS):
    """A run of a tiny model, which goes on where it stopped."""
    return jft.finetune(
        tools.apply, tools.parameters(), tools.batches(), steps=steps, workdir=workdir, seed=3, eval_data=tools.batches(1),
        optimizer={"lr": 1e-2}, checkpoint={"every": EVERY}, log={"every": 1, "progress": False},
    )  # fmt: skip


def strike(moment: str, act: Callable[[], object]) -> None:
    """Call ``act`` as the named moment begins."""
    owner, name, nth = MOMENTS[moment]
    function, calls = getattr(owner, name), []

    def struck(*arguments, **options):
        calls.append(None)
        if len(calls) == nth:
            act()
        return function(*arguments, **options)

    setattr(owner, name, struck)


def _child(workdir: str, moment: str, number: int, output: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    # Signals may be ignored here, as they are in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if number:
        strike(moment, lambda: os.kill(os.getpid(), number))
    else:  # no file may grow beyond this: what a full disk does
        strike(moment, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY)))
    try:
        train(workdir)
    except OSError as error:
        print(f"jft: {error}")
        sys.exit(1)


def child(workdir: Path, moment: str, number: int) -> tuple[int | None, str]:
    """The exit status and output of a run struck at ``moment`` by signal ``number``, or by a full disk for 0."""
    context = multiprocessing.get_context("forkserver")
    modules = [module.name for module in pkgutil.iter_modules(presets.__path__, "jft.presets.")]
    context.set_forkserver_preload([__name__, "jft.train.finetune", "jft.train.checkpoints", *modules])
    output = workdir.with_suffix(".txt")
    process = context.Process(target=_child, args=(str(workdir), moment, number, str(output)))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        return None, "hangs"
    return process.exitcode, output.read_text()


def values(workdir: Path) -> dict[str, np.ndarray]:
    return {p: np.asarray(d.value) for p, d in jft.TaskVector.load(workdir / "task_vector.safetensors").items()}


def differs(workdir: Path, whole: Path) -> str:
    """What is not as in the run that nothing struck."""
    expected, found = values(whole), values(workdir)
    if expected.keys() != found.keys() or any(not np.array_equal(x, found[p]) for p, x in expected.items()):
        return "another task vector"
    rows = [[(r["step"], r["split"], r["loss"]) for r in read(d / "metrics.jsonl")] for d in (whole, workdir)]
    return "" if rows[0] == rows[1] else f"rows {[r[:2] for r in rows[1]]}"


def stopped(workdir: Path, whole: Path, moment: str, number: int) -> str:
    """A run that a signal ends: its status says so, and the next start ends as if nothing was."""
    status, output = child(workdir, moment, number)
    expected = -number if number == signal.SIGKILL else EXIT_CODE
    if status != expected:
        return f"status {status} in place of {expected}: {output[-300:]}"
    if "Traceback" in output:
        return f"a traceback: {output[-300:]}"
    if moment in ("start", "compile") and digests.steps(workdir / "checkpoints"):
        return "steps after the signal, where there was nothing to save yet"
    train(workdir)
    return differs(workdir, whole)


def full(workdir: Path, whole: Path, moment: str) -> str:
    """A disk that is full from ``moment`` on: one line that names the last good checkpoint; with room it goes on."""
    status, output = child(workdir, moment, 0)
    lines = output.splitlines()
    if status != 1 or len(lines) != 1 or "cannot be written" not in output or "checkpoint" not in output:
        return f"status {status}, {len(lines)} lines: {output[-300:]}"
    train(workdir)
    left = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdecimal()]
    return f"left {left}" if left else differs(workdir, whole)


def _newest(workdir: Path) -> Path:
    return digests.steps(workdir / "checkpoints")[0]


def _largest(folder: Path, within: str) -> Path:
    return max((p for p in (folder / within).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, at: float) -> None:
    """One bit of a file, at a fraction of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 8
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@dataclasses.dataclass(frozen=True)
class Damage:
    """act: on a finished workdir. taken: the step of the checkpoint that is left to take. said: part of what is told."""

    act: Callable[[Path], object]
    taken: int
    said: str


OLDER = STEPS - EVERY
DAMAGES = {
    **{
        f"bit {i} of the state's data": Damage(
            lambda d, i=i: flip(_largest(_newest(d), "state"), i / 15), OLDER, "has changed"
        )
        for i in range(16)
    },
    "bit of the run's data": Damage(lambda d: flip(_largest(_newest(d), "run"), 0.5), OLDER, "has changed"),
    "bit of the metadata": Damage(lambda d: flip(_newest(d) / digests.ORBAX, 0.5), OLDER, "has changed"),
    "data cut": Damage(lambda d: _cut(_largest(_newest(d), "state")), OLDER, "bytes in place of"),
    "data emptied": Damage(lambda d: _largest(_newest(d), "state").write_bytes(b""), OLDER, "0 bytes in place of"),
    "data removed": Damage(lambda d: _largest(_newest(d), "state").unlink(), OLDER, "is missing"),
    "state removed": Damage(lambda d: shutil.rmtree(_newest(d) / "state"), OLDER, "is missing"),
    "run removed": Damage(lambda d: shutil.rmtree(_newest(d) / "run"), OLDER, "is missing"),
    "digest cut": Damage(lambda d: _cut(_newest(d) / digests.NAME), OLDER, "cannot be read"),
    "digest of a list": Damage(lambda d: (_newest(d) / digests.NAME).write_text("[]"), OLDER, "cannot be read"),
    "digest nested": Damage(lambda d: (_newest(d) / digests.NAME).write_text("[" * 10**5), OLDER, "cannot be read"),
    "renamed": Damage(
        lambda d: os.rename(_newest(d), d / "checkpoints" / "50"), OLDER, f"that of step {STEPS}, renamed"
    ),
    "empty folder": Damage(lambda d: (d / "checkpoints" / "99").mkdir(), STEPS, "it has no"),
    "stray folder": Damage(
        lambda d: shutil.copytree(_newest(d) / "state", d / "checkpoints" / "99"), STEPS, "it has no"
    ),
    "without digest": Damage(lambda d: (_newest(d) / digests.NAME).unlink(), STEPS, "has no digest"),
    "leftover": Damage(lambda d: (d / "checkpoints" / f"9{digests.TEMPORARY}").mkdir(), STEPS, ""),
}


def damaged(workdir: Path, whole: Path, name: str, goes_on: bool = True) -> str:
    """A damaged checkpoint: the newest whole one is taken, the reason told, and the run ends as if nothing was."""
    shutil.copytree(whole, workdir)
    damage = DAMAGES[name]
    damage.act(workdir)
    said = " ".join(digests.set_aside(workdir / "checkpoints"))
    taken = _newest(workdir).name
    if taken != str(damage.taken) or damage.said not in said:
        return f"step {taken} is taken: {said}"
    if goes_on:
        train(workdir)
        return differs(workdir, whole)
    return ""


def _hold(workdir: str, ready) -> None:
    with lock.held(Path(workdir)):
        ready.send(os.getpid())
        signal.pause()


def second(workdir: Path, whole: Path) -> str:
    """A second start is refused, names the holder, changes nothing, and may start once the first is killed."""
    shutil.copytree(whole, workdir)
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    context = multiprocessing.get_context("forkserver")
    ready, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_hold, args=(str(workdir), theirs))
    process.start()
    try:
        number = ready.recv()
        try:
            train(workdir)
            return "both run"
        except lock.Locked as error:
            if f"process {number} on" not in str(error):
                return str(error)
        after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != lock.NAME}
        if after != before:
            return "the second start wrote"
    finally:
        process.kill()
        process.join()
    train(workdir)
    return differs(workdir, whole)


def blocked(workdir: Path, whole: Path) -> str:
    """A place of checkpoints that cannot be written: one line at once, and what is there stays."""
    workdir.mkdir()
    (workdir / "checkpoints").write_text("a file")
    try:
        train(workdir)
    except OSError as error:
        return "" if "cannot be written" in str(error) and "\n" not in str(error) else str(error)
    return "it trains"


def cases() -> dict[str, Callable[[Path, Path], str]]:
    """All cases by name, each a function of an unused workdir and of that of the run that nothing struck."""
    out: dict[str, Callable[[Path, Path], str]] = {}
    for number in SIGNALS:
        for moment in MOMENTS:
            out[f"{number.name}/{moment}"] = lambda d, w, m=moment, n=number: stopped(d, w, m, n)
    for name in DAMAGES:
        out[f"damage/{name}"] = lambda d, w, n=name: damaged(d, w, n)
    return out | {
        "disk/full at a save": lambda d, w: full(d, w, "save"),
        "disk/no directory": blocked,
        "second start": second,
    }


def table(results: dict[str, str]) -> str:
    """Markdown: one row a case."""
    rows = [f"| {name} | {json.dumps(found) if found else 'holds'} |" for name, found in results.items()]
    return "\n".join(["| fault | outcome |", "|---|---|", *rows])
