"""Fine-tune a model, or train one from scratch, as a config says."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from jft.cli import options, restored
from jft.cli.errors import Parser, tell_others

EXAMPLES = """
  jft train --config=configs/llm.py:qwen2.5-0.5b,lora --workdir=runs/qwen
  jft train --config=configs/decoder_sft.py --workdir=runs/sft --config.model.source=DIR --config.optimizer.lr=3e-5
  jft train --config=configs/decoder_sft.py --config.data.files=mine.jsonl --dry-run

The workdir gets config.json, metrics.jsonl, checkpoints/ and task_vector.safetensors; started again with the same workdir,
a run goes on where it stopped. `--keys` lists every key of a config; `jft init KIND` writes one to begin with.

FILE.py is Python and is run: read a config that you were given. A model directory, or data, is not run (docs/files.md).
"""


def keys() -> str:
    """Every key of a train config with its default and meaning."""
    from jft.train.config import documentation

    rows = [(key, repr(default), doc) for key, default, doc in documentation()]
    width = max(len(key) for key, _, _ in rows)
    return "\n".join(f"  --config.{key:<{width}}  {doc} (default {default})" for key, default, doc in rows)


def may_add(path: str, config: Any = None) -> bool:
    """Whether an override may add the dotted ``path``: any key of the schema, and the options of open parts."""
    from jft.train.config import documentation

    return options.is_open(path) or path in {key for key, _, _ in documentation()}


def resolved(config: Any) -> str:
    """All keys of a config as JSON, which ``--config=FILE.json`` takes: defaults filled in, evaluation data derived."""
    from jft.data.config import derived
    from jft.train.config import check

    known = check(config)
    # A fleet has the data of its members.
    whole = dataclasses.replace(
        known, eval_data=derived(known.data, known.eval_data) if known.data else known.eval_data
    )
    return json.dumps(dataclasses.asdict(whole), indent=2)


def _say(text: str) -> None:
    """Print, where there still is a terminal: after SIGHUP there may be none."""
    try:
        print(text, flush=True)
    except OSError:
        # What is left in the buffer must not raise again at exit, whose status would be lost.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str]) -> int:
    """``jft train --config=FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE]``."""
    parser = Parser(prog="jft train", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--workdir", help="where the run goes (required)")
    parser.add_argument("--keys", action="store_true", help="list every key of a config, its default and meaning")
    parser.add_argument(
        "--print-config", action="store_true", help="print the config with all overrides as JSON, no more"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="everything up to the first step: look at the data, compile, and print config, steps, weights, memory and an "
        "example; nothing is written",
    )
    # Ahead of the parser, which would miss a config.
    if "--keys" in argv:
        print(keys())
        return 0
    args, config = options.parse(parser, argv, may_add=may_add)
    if args.print_config:
        print(resolved(config))
        return 0
    if not args.workdir and not args.dry_run:
        parser.error("--workdir=DIR is needed")

    from jft.train import FinishedError, Preempted, experiment
    from jft.train.config import check
    from jft.train.preemption import EXIT_CODE, Watch

    restored.start(check(config).distributed)
    if args.dry_run:
        print(resolved(config))
    try:
        # From the first moment, so that a signal while data and model load ends with the same status.
        with Watch():
            run = experiment.run(config, args.workdir, dry_run=args.dry_run)
    except Preempted as preemption:
        if preemption.step is None:
            tell_others(preemption, EXIT_CODE)
        _say(f"jft: {preemption}")
        return EXIT_CODE
    except FinishedError as error:
        # Who starts a command until it succeeds must come to an end.
        if not error.whole:
            raise
        print(f"done before: {error}")
        return 0
    if args.dry_run:
        print("dry run: nothing was trained, and nothing written")
        return 0
    fleet = isinstance(run, list)
    runs: Any = run if fleet else [run]
    for member in runs:
        last = member.metrics[-1] if member.metrics else {}
        loss = f", {last['split']} loss {last['loss']:.4g}" if "loss" in last else ""
        print(f"{'done' if member.error is None else 'stopped'}: step {int(member.state.step)}{loss}")
    where = "MEMBER/task_vector.safetensors" if fleet else "task_vector.safetensors"
    print(f"task vector{'s' if fleet else ''} in {args.workdir}/{where}")
    return 0
