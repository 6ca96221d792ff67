"""Mutation check: each one-line change that a test module lists must make a test of that module fail.

A test module lists them as ``MUTATIONS``, tuples of the file, the text there (which occurs once) and what takes its place.
They are applied one after the other to a copy of the repository:

    python tests/mutate.py                         all of them
    python tests/mutate.py tests/presets/test_lift.py ...   those of some modules
    python tests/mutate.py --part 3/40             the third of forty shares
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "jft",
    "tests",
    "configs",
    "benchmarks",
    "docs",
    "launch",
    "notebooks",
    "pyproject.toml",
    "README.md",
    "Makefile",
)
FAILED = 1  # pytest's exit status where tests ran and some failed


class Mutation(NamedTuple):
    """``old`` becomes ``new`` in ``file``, which a test of ``module`` must notice."""

    module: str
    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.module}: {self.file}: {' '.join(self.old.split())!r} -> {' '.join(self.new.split())!r}"


def mutations(modules: list[Path] | None = None) -> list[Mutation]:
    """What the test modules (default: all) list, read without importing them."""
    out = []
    for path in modules or sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "MUTATIONS" for t in node.targets):
                module = str(path.resolve().relative_to(ROOT))
                out += [Mutation(module, *one) for one in ast.literal_eval(node.value)]
    return out


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The text of its file after the mutation. Raises ``ValueError`` where the old text does not occur once."""
    text = (root / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.module}: {mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times, not once"
        )
    return text.replace(mutation.old, mutation.new)


def outcome(mutation: Mutation, copy: Path) -> str:
    """``caught`` where a test fails once it is applied to ``copy``, which is left as it was, ``NOT CAUGHT`` where none does.

    ``BROKEN`` is one with which pytest itself ends otherwise, by a signal or with nothing collected: it shows nothing.
    """
    path = copy / mutation.file
    before = path.read_text(encoding="utf-8")
    path.write_text(mutated(mutation, copy), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not peers", mutation.module]
    for optimized in ("0", "1"):
        environment = {**os.environ, "PYTHONPATH": str(copy), "JFT_TEST_OPTIMIZED": optimized}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if run.returncode or "optimized" not in (copy / mutation.module).read_text(encoding="utf-8"):
            break
    path.write_text(before, encoding="utf-8")
    if run.returncode not in (0, FAILED):
        print(f"exit status {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        return "BROKEN"
    return "caught" if run.returncode else "NOT CAUGHT"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", type=Path, help="test modules; default: all that list mutations")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th mutation from the K-th")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    wanted = mutations(options.modules)[part - 1 :: parts]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignore) if source.is_dir() else shutil.copy(source, copy / name)
        number_caught = 0
        for number, mutation in enumerate(wanted, 1):
            how = outcome(mutation, copy)
            print(f"{number}/{len(wanted)} {how}  {mutation}", flush=True)
            number_caught += how == "caught"
    print(f"{number_caught} of {len(wanted)} mutations are caught")
    return 0 if number_caught == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
