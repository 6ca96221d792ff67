"""Plot the metrics of a run, or of all runs below a folder, into one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jft.cli.errors import Parser

Series = dict[str, dict[str, tuple[list[float], list[float]]]]
SHOWN = ("train/loss", "eval/loss", "train/accuracy", "eval/accuracy", "train/lr", "train/grad_norm")


def gather(workdir: Path, names: Sequence[str]) -> Series:
    """``{split/metric: {run: (steps, values)}}`` of every ``metrics.jsonl`` under ``workdir``; ``names`` empty: all."""
    from jft.train.metrics import read

    files = sorted(workdir.rglob("metrics.jsonl"))
    if not files:
        raise ValueError(f"no metrics.jsonl in {str(workdir)!r} or below; `jft train --workdir` writes one")
    series: Series = {}
    for file in files:
        run = str(file.parent.relative_to(workdir)) if file.parent != workdir else workdir.name
        for row in read(file):
            for key, value in row.items():
                name = f"{row['split']}/{key}"
                if key not in ("step", "split") and isinstance(value, int | float) and (not names or name in names):
                    steps, values = series.setdefault(name, {}).setdefault(run, ([], []))
                    steps.append(row["step"])
                    values.append(value)
    return series


def main(argv: Sequence[str]) -> int:
    """``jft plot --workdir=DIR [--metrics=train/loss,eval/loss] [--out=FILE.png]``."""
    parser = Parser(prog="jft plot", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a run's folder, or one with runs in it")
    parser.add_argument(
        "--metrics",
        default=",".join(SHOWN),
        metavar="SPLIT/NAME,...",
        help="which to plot, or 'all' (default: loss, accuracy, learning rate, gradient norm)",
    )
    parser.add_argument("--out", metavar="FILE.png", help="default: WORKDIR/metrics.png")
    options = parser.strict(argv)

    from jft.analysis import drawing, plots

    workdir = Path(options.workdir)
    names = () if options.metrics == "all" else options.metrics.split(",")
    series = gather(workdir, names)
    if not series:
        # Once more without the filter, for the names that there are.
        known = ", ".join(sorted(gather(workdir, ())))
        raise ValueError(f"none of the metrics {options.metrics} is there; these are: {known}")
    ordered = {name: series[name] for name in (names or sorted(series)) if name in series}
    out = Path(options.out) if options.out else workdir / "metrics.png"
    drawing.save(plots.metric_curves(ordered, title=workdir.resolve().name), out)
    print(out)
    return 0
