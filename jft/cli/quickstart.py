"""Run a study: base, tasks, methods, arithmetic, one report. Without --config a small one that needs no download.

jft quickstart --workdir=DIR pretrains two small models (a vision transformer, a language model), fine-tunes them by
several methods, adds and negates the task vectors, and writes DIR/report.html, results.json, CSV tables and plots. A config
of your own (configs/clip_eight.py) runs through the same steps. What DIR holds already is not run again.
"""

from __future__ import annotations

import shlex
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jft.cli import options
from jft.cli.errors import Parser


def shipped(name: str) -> str:
    """The path of a config that comes with jft: the clone's ``configs/``, or where a wheel puts them.

    Raises ``ValueError`` where neither has it.
    """
    clone = Path(__file__).parents[2]
    candidates = [clone / "configs" / name, Path(sysconfig.get_path("data")) / "share" / "jft" / "configs" / name]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ValueError(f"this installation has no {name}; give --config=FILE.py from a clone's configs/")
    return str(path)


def may_add(path: str, study_config: Any) -> bool:
    """Whether an override may add the dotted ``path`` to the config ``study_config``.

    It may where a study has a partial train config and the key is of that; not a new study, task or method.
    """
    from jft.analysis.settings import OF_TASK
    from jft.train import config

    study_keys: tuple[str, ...]
    match path.split("."):
        case ["studies", name, "common", *rest] | ["studies", name, "base", "train", *rest]:
            study_keys, exists = (), name in study_config.studies
        case ["studies", name, "tasks", task, *rest]:
            study_keys, exists = OF_TASK, name in study_config.studies and task in study_config.studies[name].tasks
        case ["studies", name, "methods", method, *rest]:
            study_keys, exists = (), name in study_config.studies and method in study_config.studies[name].methods
        case _:
            return False
    key = ".".join(rest)
    known = {name for name, _, _ in config.documentation()}
    return exists and bool(rest) and (rest[0] in study_keys or key in known or options.is_open(key))


def main(argv: Sequence[str]) -> int:
    """``jft quickstart [--workdir=DIR] [--config=FILE.py] [--config.KEY=VALUE]``."""
    parser = Parser(prog="jft quickstart", description=__doc__)
    parser.add_argument("--workdir", default="runs/quickstart", help="where everything goes (default: %(default)s)")
    args, config = options.parse(parser, argv, shipped("quickstart.py"), may_add)

    from jft.analysis import study

    path = study.run(config, Path(args.workdir), shlex.join(["jft", "quickstart", *argv]))
    print(f"report: {path}")
    return 0
