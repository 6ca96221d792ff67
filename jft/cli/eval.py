"""Evaluate a run, or its base, on the evaluation data of its config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jft.cli import options, restored
from jft.cli.errors import Parser
from jft.cli.train import may_add


def measure(run: restored.Restored, params: object, model: object = None) -> dict[str, float]:
    """Loss and metrics of ``params`` (of the run's model) over the run's evaluation data, each example once."""
    from jft.train import evaluate

    if run.test is None:
        raise ValueError("the config has no eval_data to evaluate on; give --config.eval_data.source and its options")
    return evaluate(run.model if model is None else model, params, run.test, run.objective)


def linearized(run: restored.Restored, until: str | None) -> dict[str, float]:
    """As :func:`measure`, of the model linearized at the run's base, moved by the run's task vector."""
    from jft.tangent import linearize

    f_lin = linearize(run.model.apply, run.base, until)
    return measure(run, f_lin.direction(run.task_vector()), f_lin)


def main(argv: Sequence[str]) -> int:
    """``jft eval --workdir=RUN [--config=FILE.py] [--base] [--forward linearized [--until SITE]] [--json]``."""
    parser = Parser(prog="jft eval", description=__doc__)
    parser.add_argument("--workdir", help="the run; without it, the base of --config is evaluated")
    parser.add_argument("--base", action="store_true", help="evaluate the base that the run started from")
    parser.add_argument(
        "--forward",
        choices=["standard", "linearized"],
        help="the model at the changed weights, or linearized at the base; default as the run trained",
    )
    parser.add_argument("--until", help="the site up to which the model is linearized (features); default all of it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args, config = options.parse(parser, argv, restored.config_of(argv), may_add, "that of the run")

    restored.start()
    run = restored.restore(config, Path(args.workdir) if args.workdir else None)
    if args.base or not args.workdir:
        metrics = measure(run, run.base)
    else:
        from jft.analysis.interpolation import Forward

        # As the run trained: elsewhere its task vector gives another function.
        trained = Forward.of(run.task_vector())
        forward = args.forward or trained.name
        metrics = (
            linearized(run, args.until or trained.until) if forward == "linearized" else measure(run, run.params())
        )
    print(json.dumps(metrics) if args.json else "  ".join(f"{key} {value:.6g}" for key, value in metrics.items()))
    return 0
