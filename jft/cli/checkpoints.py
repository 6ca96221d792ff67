"""List the checkpoints of a run and verify each against its digest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jft.cli.errors import Parser, UsageError

EXAMPLES = """
  jft checkpoints runs/qwen
  jft checkpoints runs/qwen --json

Exit code 1 where one is damaged. A run takes the newest whole one; `no digest`: written by an earlier version.
"""


def main(argv: Sequence[str]) -> int:
    """``jft checkpoints WORKDIR``."""
    parser = Parser(prog="jft checkpoints", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("workdir", help="that of the run, or its folder of checkpoints")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.strict(argv)
    directory = Path(args.workdir)
    if not directory.is_dir():
        raise UsageError(f"workdir {args.workdir!r} does not exist")
    directory = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory

    from jft.train import digests

    rows: list[dict[str, Any]] = []
    for folder in reversed(digests.steps(directory)):
        checkpoint = digests.examine(folder)
        state = "damaged" if checkpoint.damage else "whole" if checkpoint.digested else "no digest"
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        rows.append({"step": checkpoint.step, "state": state, "bytes": size, "damage": checkpoint.damage})
    if args.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"no checkpoints in {directory}")
    else:
        for row in rows:
            print(f"{row['step']:>10}  {row['state']:<9}  {row['bytes'] / 1e6:>10.1f} MB  {row['damage']}".rstrip())
    return int(any(row["damage"] for row in rows))
