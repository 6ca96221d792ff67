"""All faults of runs, in a table: python -m tests.faults [PART OF A NAME]."""

import sys
import tempfile
from pathlib import Path

from tests.faults import processes, runs


def main() -> int:
    """Run every case, print the table of docs/faults.md; exit code 1 where one does not hold."""
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        cases = {name: lambda d, c=case: c(d, whole) for name, case in runs.cases().items()} | processes.cases()
        if any(part in name for name in runs.cases()):
            runs.train(whole)
        for i, (name, case) in enumerate(cases.items()):
            if part in name:
                try:
                    results[name] = case(Path(folder) / str(i))
                except Exception as error:  # a case of many: the others still run
                    results[name] = f"{type(error).__name__}: {error}"[:300]
                print(f"{name}: {results[name] or 'holds'}", file=sys.stderr, flush=True)
    print(runs.table(results))
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
