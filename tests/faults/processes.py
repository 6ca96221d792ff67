"""Faults of runs of several processes: other settings on one, errors, kills and processes that never come.

Each case gives what was found, ``""`` where it holds: all processes end within 30 s, with a status and one line that says
why, none with a traceback; and where the run can go on, it ends as one that nothing struck.
"""

import atexit
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jft import presets
from jft.cli import main as cli
from jft.parallel.peers import LOST
from jft.train.preemption import EXIT_CODE
from tests.faults import runs
from tests.parallel.test_distributed import free_port

BOUND = 30.0
STEPS, EVERY = 20, 4
CONFIG = {
    "steps": STEPS,
    "batch_size": 8,
    "model": {"arch": "encoder", "classes": 2},
    "data": {"source": "jsonl", "files": "data.jsonl", "task": "classification", "text": "text", "label": "label"},
    "eval_data": {"classes": 2},
    "checkpoint": {"every": EVERY},
    "log": {"every": 1, "progress": False},
    "check_data": 0.0,
}
OPTIONS = {"width": 16, "layers": 1, "heads": 2, "hidden": 32, "vocab": 300, "positions": 16}


def rows(count: int = 64, label: Callable[[int], int] = lambda i: i % 2) -> str:
    return "".join(json.dumps({"text": f"row {i}", "label": label(i)}) + "\n" for i in range(count))


def _child(
    index: int, count: int, devices: int, port: int, folder: str, argv: list[str], act: tuple[str, int] | None
) -> None:
    """Process ``index`` of a run, from within ``folder``; ``act``: the moment at which a signal strikes it, or a full disk."""
    os.chdir(folder)
    for name in ("stdout", "stderr"):
        target = os.open(f"{name}-{index}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, getattr(sys, name).fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ |= {
        "JFT_COORDINATOR": f"localhost:{port}",
        "JFT_NUM_PROCESSES": str(count),
        "JFT_PROCESS_ID": str(index),
    }
    jax.config.update("jax_num_cpu_devices", devices)
    if act is not None:
        moment, number = act
        runs.strike(moment, lambda: _strike(number))
    try:
        status = cli.call(["train", *argv])
    except BaseException:
        # As the interpreter itself would, outside of multiprocessing.
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def _strike(number: int) -> None:
    if not number:
        raise OSError("the disk has gone")
    os.kill(os.getpid(), number)


@dataclasses.dataclass(frozen=True)
class Process:
    """What one process has of its own: overrides of its config, files of its folder, and the moment and signal of its fault.

    number: 0 for an error of the operating system in place of a signal. present: whether it comes at all.
    """

    argv: tuple[str, ...] = ()
    files: dict[str, str | None] = dataclasses.field(default_factory=dict)
    act: tuple[str, int] | None = None
    present: bool = True


@dataclasses.dataclass(frozen=True)
class Ended:
    status: int | None
    out: str
    error: str


def train(workdir: Path, count: int, own: dict[int, Process] | None = None, devices: int = 1) -> list[Ended | None]:
    """Run ``count`` processes of ``devices`` in ``workdir``, each from a folder of its own beside it, until they end.

    None for a process that never comes; a status of None for one that had to be killed.
    """
    context = multiprocessing.get_context("forkserver")
    modules = [module.name for module in pkgutil.iter_modules(presets.__path__, "jft.presets.")]
    preload = ["jft.train.experiment", "jft.train.checkpoints", "jft.cli.train", "jft.data.pipeline"]
    context.set_forkserver_preload([__name__, runs.__name__, *preload, *modules])
    own, port, started = own or {}, free_port(), {}
    config = {**CONFIG, "model": {**CONFIG["model"], "options": OPTIONS}}
    config["data"] = {**config["data"], "classes": 2, "tokenizer": "bytes", "max_length": 16, "buckets": False}
    for index in range(count):
        process = own.get(index, Process())
        folder = workdir.with_name(f"{workdir.name}-{index}")
        folder.mkdir(exist_ok=True)
        for name, text in ({"data.jsonl": rows(), "config.json": json.dumps(config)} | process.files).items():
            if text is not None:
                (folder / name).write_text(text)
        argv = ["--config=config.json", f"--workdir={workdir}", *process.argv]
        if process.present:
            arguments = (index, count, devices, port, str(folder), argv, process.act)
            started[index] = context.Process(target=_child, args=arguments), folder
            started[index][0].start()
    still = [index for index in started if (own.get(index, Process()).act or ("", 0))[1] == signal.SIGSTOP]
    _wait([process for index, (process, _) in started.items() if index not in still])
    return [_ended(index, *started[index]) if index in started else None for index in range(count)]


def _wait(processes: list[multiprocessing.Process]) -> None:
    """Return once all have ended, or ``BOUND`` seconds after the first has."""
    multiprocessing.connection.wait([process.sentinel for process in processes], 120)
    deadline = time.monotonic() + BOUND
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def _ended(index: int, process: multiprocessing.Process, folder: Path) -> Ended:
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    texts = [(folder / f"{name}-{index}.txt") for name in ("stdout", "stderr")]
    return Ended(status, *(text.read_text() if text.exists() else "" for text in texts))


def refused(workdir: Path, count: int, own: dict[int, Process], *expected: str, status: int = 1) -> str:
    """All processes end in time, with ``status`` and one line that holds all of ``expected``; a killed one has no line."""
    for index, one in enumerate(train(workdir, count, own)):
        act = own.get(index, Process()).act
        if one is None or (act and act[1] in (signal.SIGKILL, signal.SIGSTOP)):
            continue
        lines = one.error.splitlines()
        if one.status != status or len(lines) != 1 or not lines[0].startswith("jft: "):
            return f"process {index}: status {one.status}: {one.error[-600:]}"
        missing = [text for text in expected if text not in lines[0]]
        if missing:
            return f"process {index} does not say {missing}: {lines[0]}"
        if index and one.out:
            return f"process {index} prints {one.out[:200]}"
    return ""


def goes_on(workdir: Path, count: int, whole: Path, devices: int = 1, *argv: str) -> str:
    """Started again, the run ends as that which nothing struck."""
    for index, one in enumerate(train(workdir, count, {k: Process(argv) for k in range(count)}, devices)):
        if one.status:
            return f"started again, process {index} ends with status {one.status}: {one.error[-300:]}"
    return runs.differs(workdir, whole)


def uninterrupted(workdir: Path, count: int = 2) -> Path:
    """The run of ``count`` processes that nothing strikes, made once beside ``workdir``."""
    whole = workdir.with_name(f"whole-{count}")
    if not (whole / "task_vector.safetensors").is_file():
        ended = train(whole, count)
        assert all(one.status == 0 for one in ended), ended
    return whole


def struck(workdir: Path, count: int, victim: int, moment: str, again: bool = True) -> str:
    """One process is killed: the others say that it is lost and what was saved, and all go on when started ``again``."""
    own = {victim: Process(act=(moment, signal.SIGKILL))}
    saved = {"save": f"that of step {EVERY}", "result": f"that of step {STEPS}"}.get(moment, "")
    found = refused(workdir, count, own, f"process {victim} of {count} was lost", saved, "again", status=LOST)
    return found or (goes_on(workdir, count, uninterrupted(workdir, count)) if again else "")


def failed(workdir: Path, moment: str) -> str:
    """An error of the operating system on one process."""
    found = refused(workdir, 2, {1: Process(act=(moment, 0))}, "process 1 of 2 failed", "the disk has gone")
    return found or goes_on(workdir, 2, uninterrupted(workdir))


def signalled(workdir: Path, number: int) -> str:
    """A signal to one process: both stop at the same step and save it, and go on from there."""
    ended = train(workdir, 2, {1: Process(act=("step", number))})
    for index, one in enumerate(ended):
        if one.status != EXIT_CODE or one.error:
            return f"process {index}: status {one.status}: {one.error[-300:]}"
    return goes_on(workdir, 2, uninterrupted(workdir))


def resized(workdir: Path) -> str:
    """4 devices as 2 processes, which are stopped, go on as 4 and end as 1: the same bits as those of 1 process."""
    whole = workdir.with_name("whole-1")
    ended = train(whole, 1, devices=4) + train(workdir, 2, {1: Process(act=("step", signal.SIGTERM))}, 2)
    if [one.status for one in ended] != [0, EXIT_CODE, EXIT_CODE]:
        return f"statuses {[one.status for one in ended]}: {ended[-1].error[-300:]}"
    ended = train(workdir, 4, {2: Process(act=("evaluation", signal.SIGKILL))})
    if [one.status for one in ended] != [LOST, LOST, -signal.SIGKILL, LOST]:
        return f"statuses {[one.status for one in ended]}: {ended[0].error[-300:]}"
    return goes_on(workdir, 1, whole, 4)


def stopped(workdir: Path) -> str:
    """A process that stands still, as one behind a network that is down."""
    own = {0: Process(("--config.distributed.heartbeat=3",)), 1: Process(act=("step", signal.SIGSTOP))}
    return refused(workdir, 2, own, "process 1 of 2 was lost: no sign of life for 3 s", status=LOST)


DIFFERENCES = {
    "learning rate": ("optimizer.lr", "0.5", "0.0001"),
    "weight decay": ("optimizer.weight_decay", "0.25", "0.0"),
    "batch size": ("batch_size", "16", "8"),
    "data file": ("data.files", "other.jsonl", "data.jsonl"),
    "steps": ("steps", "7", str(STEPS)),
    "checkpoint.every": ("checkpoint.every", "3", str(EVERY)),
    "method": ("method.name", "bitfit", "full"),
    "seed": ("seed", "5", "0"),
    "eval.every": ("eval.every", "2", "0"),
    "accumulate": ("accumulate", "2", "1"),
    "schedule": ("optimizer.schedule", "cosine", "constant"),
    "dtype": ("model.dtype", "bfloat16", "float32"),
}


def differing(workdir: Path, name: str, count: int = 2) -> str:
    """Another setting on the last process: refused by name and values, and nothing is written."""
    key, other, usual = DIFFERENCES[name]
    own = {count - 1: Process((f"--config.{key}={other}",))}
    who = "process 0," if count == 2 else f"processes {', '.join(map(str, range(count - 1)))},"
    found = refused(workdir, count, own, key, usual, other, f"on {who}", f"on process {count - 1}")
    return found or ("it wrote" if workdir.exists() and any(workdir.iterdir()) else "")


def cases() -> dict[str, Callable[[Path], str]]:
    """All cases by name, each a function of an unused workdir."""
    out = {f"differs/{name}": lambda d, n=name: differing(d, n) for name in DIFFERENCES}
    broken = rows(label=lambda i: 7 if i == 40 else i % 2)
    everywhere = lambda count: {k: Process(files={"data.jsonl": broken}) for k in range(count)}
    missing = {1: Process(files={"data.jsonl": None})}
    out |= {
        "differs/learning rate, 4 processes": lambda d: differing(d, "learning rate", 4),
        "differs/steps, 4 processes": lambda d: differing(d, "steps", 4),
        "differs/work directory": lambda d: refused(
            d, 2, {1: Process((f"--workdir={d}-other",))}, "workdir is", f'{d.name}"', f'{d.name}-other" on process 1'
        ),
        "differs/dry run": lambda d: refused(d, 2, {1: Process(("--dry-run",))}, "dry_run is false on process 0"),
        "differs/content of the data": lambda d: refused(
            d, 2, {1: Process(files={"data.jsonl": rows(65)})}, "differ: content of data", "on process 1"
        ),
        "differs/number of processes": lambda d: refused(
            d, 2, {1: Process(("--config.distributed.processes=3",))}, "process 1 was started for 3 processes"
        ),
        "error/missing file": lambda d: refused(d, 2, missing, "process 1 of 2 failed", "data.jsonl"),
        "error/missing file, 4 processes": lambda d: refused(d, 4, missing, "process 1 of 4 failed", "data.jsonl"),
        "error/broken row": lambda d: refused(d, 2, everywhere(2), "data.jsonl:41", "failed"),
        "error/broken row, 4 processes": lambda d: refused(d, 4, everywhere(4), "data.jsonl:41", "failed"),
        **{f"error/{m}": lambda d, m=m: failed(d, m) for m in ("compile", "step", "evaluation", "result")},
        **{f"SIGKILL/process 1, {m}": lambda d, m=m: struck(d, 2, 1, m) for m in ("start", "compile", "step", "save")},
        **{f"SIGKILL/process 0, {m}": lambda d, m=m: struck(d, 2, 0, m) for m in ("start", "step", "save", "result")},
        "SIGKILL/process 3 of 4, step": lambda d: struck(d, 4, 3, "step"),
        "SIGKILL/process 0 of 4, step": lambda d: struck(d, 4, 0, "step"),
        "SIGSTOP/process 1, step": stopped,
        **{f"{s.name}/process 1, step": lambda d, s=s: signalled(d, s) for s in runs.SIGNALS if s != signal.SIGKILL},
        "SIGTERM/process 1, compile": lambda d: refused(
            d, 2, {1: Process(act=("compile", signal.SIGTERM))}, "process 1 of 2 was stopped", status=EXIT_CODE
        ),
        "resize/2 processes, 4, 1": resized,
        "absent/process 1": lambda d: refused(
            d,
            2,
            {0: Process(("--config.distributed.timeout=2",)), 1: Process(present=False)},
            "after 2 s, processes 1 of 2",
        ),
        "absent/process 0": lambda d: refused(
            d,
            2,
            {1: Process(("--config.distributed.timeout=2",)), 0: Process(present=False)},
            "did not meet",
            "within 2 s",
        ),
    }
    return {f"processes/{name}": case for name, case in out.items()}
