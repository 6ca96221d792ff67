"""Hostile and malformed files, as people download them: made one by one, and used as a person would.

    python -m tests.faults.hostile                every case, each in a process bounded in memory, and a table of outcomes
    python -m tests.faults.hostile model tfds     those of some places, or with some text in their names
    python -m tests.faults.hostile --list

A case is a kind of damage in a place. It must end in an error of one line that names the file (no traceback, nothing that a
terminal would act on), within 30 s and 2 GB, with no code run and nothing written outside; or, where its kind is harmless,
in nothing at all. The cases are in the modules below: a later one is a line there.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS = 30
MEMORY = 2 * 2**30
PAYLOAD = "hostile_payload"
MODULES = ("json", "models", "vectors", "templates", "data", "names")
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Case:
    """A damaged file and its use.

    make: writes it into an empty folder, and returns what ``use`` is given. refused: whether ``use`` must raise a user's error.
    names: what the message must hold of the file; None where it is of no file.
    """

    name: str
    make: Callable[[Path], object]
    use: Callable[[object], object]
    refused: bool = True
    names: str | None = None


class Hang(BaseException):
    """More than the seconds a case has; no Exception, so that nothing takes it for one of its own."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def payload(folder: Path) -> Path:
    """A module on the path that leaves a file where it is imported; the file."""
    mark = folder / "code_was_run"
    (folder / f"{PAYLOAD}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Feature: pass\n")
    sys.path.insert(0, str(folder))
    return mark


def outcome(case: Case, folder: Path, mark: Path) -> str:
    """``refused`` or ``accepted`` where that is right, else what is wrong."""
    from jft import terminal
    from jft.cli.main import USER_ERRORS

    inside = folder / "inside"
    inside.mkdir(parents=True)
    given = case.make(inside)
    before = _outside(folder)
    try:
        with _deadline(SECONDS):
            case.use(given)
        result = "WRONG: accepted in silence" if case.refused else "accepted"
    except Hang:
        result = f"HANG: more than {SECONDS} s"
    except USER_ERRORS as error:
        result = _message(case, str(error), terminal.plain(" ".join(str(error).split())))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        result = f"RAW: {type(error).__name__}: {error!s:.80} ({Path(last.filename).name}:{last.lineno})"
    if mark.exists() or PAYLOAD in sys.modules:
        result = "CODE: the module was imported"
    if _outside(folder) != before:
        result = "REACH: something outside the folder changed"
    return result


def _outside(folder: Path) -> list[tuple[str, int]]:
    return sorted((p.name, p.lstat().st_size) for p in folder.iterdir() if p.name != "inside")


def _message(case: Case, text: str, shown: str) -> str:
    if not case.refused:
        return f"WRONG: refused: {text:.200}"
    if case.names is not None and case.names not in text:
        return f"WRONG: the message does not name {case.names}: {text:.200}"
    if not shown.isprintable():
        return "WRONG: the message has control characters"
    if not text.strip() or len(text) > 4000 or "Traceback" in text:
        return f"WRONG: no message of a line: {text:.200}"
    return "refused"


def cases(words: list[str] | None = None) -> list[Case]:
    """All cases, always in the same order; with ``words``, those with one of them in their names."""
    out = [case for name in MODULES for case in importlib.import_module(f"tests.faults.hostile_{name}").cases()]
    repeated = [name for name, n in collections.Counter(c.name for c in out).items() if n > 1]
    assert not repeated, repeated
    return [c for c in out if not words or any(word in c.name for word in words)]


def run(chosen: list[Case]) -> Iterator[tuple[str, str, float]]:
    """``(name, outcome, seconds)`` of each, in this process."""
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "payload").mkdir()
        mark = payload(Path(temporary) / "payload")
        try:
            for i, case in enumerate(chosen):
                since = time.perf_counter()
                folder = Path(temporary) / str(i)
                yield case.name, outcome(case, folder, mark), time.perf_counter() - since
        finally:
            sys.path.remove(str(mark.parent))


def _child(names: list[str]) -> None:
    """Run some cases with a bound on memory, a line of JSON for each."""
    wanted = set(names)
    chosen = [case for case in cases() if case.name in wanted]
    # Of what is mapped already, threads and their stacks among it, and this much more.
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for row in run(chosen):
        print(json.dumps(row), flush=True)


def main(argv: list[str]) -> int:
    """``python -m tests.faults.hostile [WORD...] [--list]``; 1 where a case does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        _child(json.load(sys.stdin))
        return 0
    names = [case.name for case in cases(options.words)]
    if options.list:
        print("\n".join(names))
        return 0
    results: dict[str, tuple[str, float]] = {}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # A process that dies takes its case with it, and another goes on after that.
    while left := [name for name in names if name not in results]:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.hostile", "--child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        with child.stdin:
            json.dump(left, child.stdin)
        for line in child.stdout:
            name, result, seconds = json.loads(line)
            results[name] = (result, seconds)
        if child.wait() and (dead := [name for name in left if name not in results]):
            results[dead[0]] = (f"DEATH: exit status {child.returncode}", 0.0)
    return _report(results)


def _report(results: dict[str, tuple[str, float]]) -> int:
    """The table by place, and every case that does not hold."""
    by_place: dict[str, collections.Counter[str]] = {}
    slowest: dict[str, float] = {}
    for name, (result, seconds) in results.items():
        place = name.split("/")[0]
        by_place.setdefault(place, collections.Counter())[result.split(":")[0]] += 1
        slowest[place] = max(slowest.get(place, 0.0), seconds)
    print("| place | cases | refused | harmless | wrong | slowest, s |\n|---|---|---|---|---|---|")
    for place, counts in by_place.items():
        refused, accepted, total = counts["refused"], counts["accepted"], sum(counts.values())
        print(f"| {place} | {total} | {refused} | {accepted} | {total - refused - accepted} | {slowest[place]:.1f} |")
    wrong = {name: result for name, (result, _) in results.items() if result not in ("refused", "accepted")}
    print(f"\n{len(results)} cases, {len(wrong)} wrong")
    for name, result in wrong.items():
        print(f"  {name}: {result}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
