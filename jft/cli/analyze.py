"""Effects of runs in their base's tangent space: disentanglement maps, neural tangent kernels, distance from linearity."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jft.cli import options, restored
from jft.cli.errors import Parser, UsageError

EXAMPLES = """\
examples:
  jft analyze linearity runs/a
  jft analyze disentangle runs/a runs/b --points=9
  jft analyze ntk runs/a runs/b --examples=64 --until=features
"""
DISENTANGLE = """\
The weight-disentanglement error of two runs from one base, xi(a1, a2): on the evaluation data of both, how often the
prediction at the run's own task vector differs from that at a1 * first + a2 * second (Ortiz-Jimenez et al. 2023,
arXiv:2305.12827). The classifier that a run has trained for itself moves with its own task vector alone."""
NTK = """\
The neural tangent kernel of the base on evaluation examples of each run: eigenvalues, effective rank, and how much of the
eigenfunctions that each run's task vector moves lies on the examples of each run."""
LINEARITY = """\
For each run and coefficient a: how far the model at a * task vector is from its linearization, in units of how far it moved,
how often both predict the same, and the loss and metrics of both."""


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="jft analyze", description=__doc__, epilog=EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    maps = actions.add_parser("disentangle", help="how two task vectors disturb each other", description=DISENTANGLE)
    maps.add_argument("runs", nargs=2, metavar="RUN", help="folders of finished runs")
    maps.add_argument("--points", type=int, default=17, help="coefficients of each (default %(default)s)")
    maps.add_argument("--lowest", type=float, default=-2.0, help="smallest coefficient (default %(default)s)")
    maps.add_argument("--largest", type=float, default=2.0, help="largest coefficient (default %(default)s)")
    maps.add_argument("--forward", choices=["standard", "linearized"], help="default: as the first run trained")
    maps.add_argument("--until", help="the site up to which the model is linearized (features)")

    kernel = actions.add_parser("ntk", help="eigenvalues of the tangent kernel, and where they live", description=NTK)
    kernel.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs from one base")
    kernel.add_argument("--examples", type=int, default=64, help="of each run (default %(default)s)")
    kernel.add_argument("--until", help="the site whose values are the outputs (features); default the model's outputs")
    kernel.add_argument("--of", choices=["trace", "sum", "one"], default="trace", help="one kernel for all outputs")
    kernel.add_argument("--moving", action="append", metavar="PATTERN", help="weights that move (default: all)")

    line = actions.add_parser("linearity", help="how far the model is from linear", description=LINEARITY)
    line.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    line.add_argument("--points", type=int, default=11, help="coefficients from 0 (default %(default)s)")
    line.add_argument("--largest", type=float, default=1.0, help="largest coefficient (default %(default)s)")

    for action in (maps, kernel, line):
        if action is not kernel:
            action.add_argument("--batches", type=int, default=0, help="of the evaluation data at most (default: all)")
        action.add_argument("--out", metavar="DIR", help="where figures and numbers go (default: FIRST RUN/analysis)")
        action.add_argument("--json", action="store_true", help="print JSON")
    # Not parse_args: the parser of the action names the nearest of its own options.
    args, rest = parser.parse_known_args(argv)
    if rest:
        actions.choices[args.action].unknown(rest[0])
    for name, least in (("points", 2), ("examples", 1)):
        if getattr(args, name, least) < least:
            raise UsageError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    return args


class Run:
    """A finished run: its model, base, task vector and evaluation data."""

    def __init__(self, folder: str, batches: int = 0) -> None:
        config = restored.config_of([f"--workdir={folder}"])
        if config is None:
            raise UsageError(f"{folder!r} has no config.json: it is not the workdir of a run")
        self.run = restored.restore(options.load(config), Path(folder))
        if self.run.test is None:
            raise ValueError(f"the run {folder!r} has no eval_data to be analyzed on")
        self.name, self.model, self.base = Path(folder).name, self.run.model, self.run.base
        self.objective, self.tau = self.run.objective, self.run.task_vector()
        self.batches: Any = self.run.test if not batches else list(itertools.islice(self.run.test, batches))

    def takes(self, other: Run) -> Any:
        """The task vector of ``other`` as a change of this run's base: without the classifier of its own that it trained.

        Raises ``ValueError`` where it was made from another base.
        """
        from jft.models import Classifier

        drops_head = other is not self and isinstance(other.model.config, Classifier)
        return (other.tau.exclude("^classifier/") if drops_head else other.tau).resolve(self.base)


def _runs(args: argparse.Namespace) -> dict[str, Run]:
    """By the names of their folders; by their paths where these are equal."""
    runs = [Run(folder, getattr(args, "batches", 0)) for folder in args.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = args.runs
    if len(set(names)) < len(names):
        raise UsageError("a run is given twice")
    return dict(zip(names, runs, strict=True))


def disentangle(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """``jft analyze disentangle RUN RUN``."""

    from jft.analysis import disentangle as maps
    from jft.analysis import interpolation, tangent_plots

    runs = _runs(args)
    first, second = runs.values()
    # The task vector of a linearized run is a change of the linearized model.
    forward = interpolation.Forward.of(first.tau)
    if args.forward or args.until:
        forward = interpolation.Forward(args.forward or forward.name, args.until)
    members = [
        maps.Member(r.model, r.base, r.batches, r.objective, [r.takes(first), r.takes(second)]) for r in runs.values()
    ]
    grid = interpolation.grid(args.lowest, args.largest, args.points)
    result = maps.disentanglement(members[0], members[1], grid, forward)
    row = {"method": forward.name, "pair": list(runs), "grid": grid, "xi": result.xi.tolist()}
    row["each"] = dict(zip(runs, result.each.tolist(), strict=True))
    in_range = [c for c in grid if 0 <= c <= 1]
    # The corner alone, where nothing is added, says nothing.
    row["within"] = result.within() if len(in_range) > 1 else None
    lines = [f"xi from {result.xi.min():.4f} to {result.xi.max():.4f} ({forward.name})"]
    lines += [f"mean over coefficients in [0, 1]: {row['within']:.4f}"] if row["within"] is not None else []
    return row, {"disentangle": tangent_plots.disentanglement_maps([row])}, lines


def ntk(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """``jft analyze ntk RUN...``."""
    from jft import tangent
    from jft.analysis import tangent_plots
    from jft.analysis.ntk import task_kernel

    runs = _runs(args)
    first = next(iter(runs.values()))
    f_lin = tangent.linearize(first.model.apply, first.base, args.until)
    batches = {name: _examples(run, args.examples) for name, run in runs.items()}
    taus = {name: first.takes(run) for name, run in runs.items()}
    kernel = task_kernel(f_lin, batches, taus, moving=args.moving, of=args.of)
    values = [float(v) for v in kernel.spectrum.values]
    result = {"values": values, "effective_rank": kernel.effective_rank, "located": kernel.located}
    lines = [
        f"{len(values)} examples, effective rank {kernel.effective_rank:.1f}, largest eigenvalue {values[0]:.4g}, "
        # Outputs that no weight moves have a kernel of zeros.
        f"{values[0] / max(sum(values), 1e-300):.1%} of the trace"
    ]
    for tau, shares in kernel.located.items():
        lines.append(f"{tau}: " + "  ".join(f"{share:.1%} on {task}" for task, share in shares.items()))
    figures = {"ntk_spectrum": tangent_plots.spectra({" and ".join(runs): values})}
    if len(runs) > 1:
        figures["ntk_located"] = tangent_plots.located(kernel.located)
    return result, figures, lines


def _examples(run: Run, count: int) -> dict[str, Any]:
    """The first ``count`` real examples of the evaluation data, without what only the loss reads."""
    import numpy as np

    from jft.data.batches import equally_long

    rows: list[Mapping[str, Any]] = []
    total = 0
    for batch in run.batches:
        real = np.asarray(batch.get("valid", np.ones(len(next(iter(batch.values()))), bool)), bool)
        rows.append({k: np.asarray(x)[real] for k, x in batch.items() if k not in ("valid", "labels", "loss_mask")})
        total += int(real.sum())
        if total >= count:
            break
    rows = equally_long(rows)
    return {key: np.concatenate([row[key] for row in rows])[:count] for key in rows[0]}


def linearity(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """``jft analyze linearity RUN...``."""
    import numpy as np

    from jft.analysis import tangent_plots
    from jft.analysis.linearity import linearity as linearity_rows

    grid = [round(float(c), 6) for c in np.linspace(0, args.largest, args.points)]
    result = {
        name: linearity_rows(run.model, run.base, run.takes(run), run.batches, run.objective, grid)
        for name, run in _runs(args).items()
    }
    metric = "accuracy" if all("accuracy" in rows[0]["standard"] for rows in result.values()) else "loss"
    lines = [f"{'run':<20} {'coefficient':>11} {'error':>8} {'agreement':>9} {metric:>9} {'linearized':>10}"]
    for name, rows in result.items():
        for row in rows:
            error = "" if row["error"] is None else f"{row['error']:.4f}"
            both = f"{row['standard'][metric]:9.4f} {row['linearized'][metric]:10.4f}"
            lines.append(f"{name:<20} {row['coefficient']:11.3g} {error:>8} {row['agreement']:9.4f} {both}")
    return result, {"linearity": tangent_plots.linearity_curves(result, metric)}, lines


ACTIONS = {"disentangle": disentangle, "ntk": ntk, "linearity": linearity}


def main(argv: Sequence[str]) -> int:
    """``jft analyze disentangle | ntk | linearity RUN... [--out=DIR] [--json]``."""
    args = _options(argv)

    from jft.analysis import drawing, run_store

    restored.start()
    result, figures, lines = ACTIONS[args.action](args)
    out = Path(args.out) if args.out else Path(args.runs[0]) / "analysis"
    out.mkdir(parents=True, exist_ok=True)
    run_store.write_json(result, out / f"{args.action}.json")
    for name, figure in figures.items():
        drawing.save(figure, out / f"{name}.png")
    print(json.dumps(result) if args.json else "\n".join([*lines, f"wrote {out}"]))
    return 0
