"""Evaluate a run, or its base, on the evaluation data of its config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jft.cli import options, restored
from jft.cli.errors import Parser
from jft.cli.train import may_add


def measure(run: restored.Restored, params: object) -> dict[str, float]:
    """Loss and metrics of ``params`` over the run's evaluation data, each example once."""
    from jft.train import evaluate
    from jft.train.objectives import infer

    if run.test is None:
        raise ValueError("the config has no eval_data to evaluate on; give --config.eval_data.source and its options")
    said = run.config
    which = {"name": said.objective, **said.objective_options} if said.objective else infer(run.test.sample())
    return evaluate(run.model, params, run.test, which)


def main(argv: Sequence[str]) -> int:
    """``jft eval --workdir=RUN [--config=FILE.py] [--base] [--json]``."""
    parser = Parser(prog="jft eval", description=__doc__)
    parser.add_argument("--workdir", help="the run; without it, the base of --config is evaluated")
    parser.add_argument("--base", action="store_true", help="evaluate the base that the run started from")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given, config = options.parse(parser, argv, restored.config_of(argv), may_add, "that of the run")

    restored.start()
    run = restored.restore(config, Path(given.workdir) if given.workdir else None)
    found = measure(run, run.base if given.base or not given.workdir else run.params())
    print(json.dumps(found) if given.json else "  ".join(f"{key} {value:.6g}" for key, value in found.items()))
    return 0
