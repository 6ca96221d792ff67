"""Instruction bundles of TPU programs, from what libtpu writes when it compiles: a bound of time without a chip.

A bundle is what a core issues in one cycle. Bundles of a loop times its passes, over the clock, are the time of a kernel that
never waits for memory.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Iterator

# Bundles a second of one core, by the name that topologies begin with.
CLOCK = {"v5e": 1.503e9, "v5p": 1.75e9}


@contextlib.contextmanager
def dumps(topology: str) -> Iterator[str | None]:
    """A folder into which libtpu writes the instructions of what it compiles; None without a topology."""
    if not topology:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("LIBTPU_INIT_ARGS")
        # Read when libtpu is loaded, so it must not have been before.
        os.environ["LIBTPU_INIT_ARGS"] = f"{before or ''} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["LIBTPU_INIT_ARGS"]
            else:
                os.environ["LIBTPU_INIT_ARGS"] = before


def clear(dumps: str | None) -> None:
    """Remove what was written so far."""
    for path in glob.glob(f"{dumps}/*") if dumps else ():
        os.unlink(path)


def inner_loop(dumps: str | None, name: str) -> int | None:
    """Instruction bundles in the longest of the innermost loops of a kernel; None where libtpu wrote none."""
    paths = (
        [p for p in glob.glob(f"{dumps}/*-{name}*final_bundles.txt") if "schedule-analysis" not in p] if dumps else []
    )
    if not paths:
        return None
    loops: list[tuple[int, int]] = []
    regions: dict[str, int] = {}
    with open(paths[0], encoding="utf-8") as lines:
        for line in lines:
            head = re.match(r"\s*(0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2})?\s*:\s*(>*)", line)
            if head is None:
                continue
            address, depth = int(head[1], 16), len(head[2])
            for region in re.findall(r"Start region (\d+)", line):
                regions.setdefault(region, address)
            jump = re.search(r"sbr\.rel \([^)]*\) target = \$region(\d+)", line)
            # A jump backwards ends a loop; five bundles follow before it is taken.
            if jump and regions.get(jump[1], address + 1) <= address:
                loops.append((depth, address - regions[jump[1]] + 5))
    deepest = max((depth for depth, _ in loops), default=0)
    return max((size for depth, size in loops if depth == deepest), default=None)
