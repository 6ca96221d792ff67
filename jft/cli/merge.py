"""Merge checkpoints on disk by a recipe (mergekit's YAML) or a rule, tensor by tensor: task arithmetic, TIES and others."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jft import terminal
from jft.cli.errors import Parser, UsageError

EXAMPLES = """\
examples:
  jft merge recipe.yml merged/                                        (a recipe of mergekit, as it is)
  jft merge recipe.yml merged/ --dry-run                              (what would be read, done and written)
  jft merge --method ties --base BASE A B C --out merged/ --weights 1 0.5 0.5 --option density=0.3 --preset mergekit
  jft merge --method task_arithmetic --base BASE A+ADAPTER run/task_vector.safetensors --out merged/
  jft merge --list

A model is a directory, a hub id, MODEL+ADAPTER (peft), an adapter of the base, or a task-vector file of jft. Recipes follow
mergekit (preset "mergekit"); --method follows the paper, the rule's first preset. See docs/merging.md for the differences.
An interrupted merge goes on from its finished shards when it is started again."""


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="jft merge", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("models", nargs="*", metavar="RECIPE OUT | MODEL", help="a recipe and a directory, or models")
    parser.add_argument("--method", help="the rule, in place of a recipe: --list shows all")
    parser.add_argument("--base", help="the base that the models are changes of")
    parser.add_argument("--out", help="the directory to write; it must not exist, or be empty")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one number, or one per model")
    parser.add_argument("--scale", type=float, help="factor of the merged change (lambda)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the rule (repeatable)"
    )
    parser.add_argument("--preset", help="whose semantics: paper, mergekit, peft, fusionbench")
    parser.add_argument("--dtype", help="dtype of the output (default: the recipe's, else that of the base)")
    parser.add_argument("--seed", type=int, help="of rules that draw at random")
    parser.add_argument(
        "--shard-size", type=float, default=5.0, metavar="GB", help="largest file of the output (default 5)"
    )
    parser.add_argument("--workers", type=int, help="threads (default: processors, 8 at most)")
    parser.add_argument("--mismatch", choices=["refuse", "base"], help="where a tensor is missing or has another shape")
    parser.add_argument("--no-check", action="store_true", help="do not verify the bases of task-vector files")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in OUT once the new one is written")
    parser.add_argument("--dry-run", action="store_true", help="show what would be read, done and written")
    parser.add_argument("--list", action="store_true", help="show the rules, their presets and options")
    parser.add_argument("--json", action="store_true", help="print JSON")
    # Options may stand between the models.
    options, rest = parser.parse_known_intermixed_args(argv)
    if rest:
        parser.unknown(rest[0])
    return options


def _recipe(options: argparse.Namespace) -> tuple[Any, str]:
    """``(recipe, directory)``, from a file or from the options."""
    from jft.merge import recipe

    if options.method is None:
        given = [n for n in ("weights", "scale", "preset", "base") if getattr(options, n) is not None]
        if given or options.option:
            raise UsageError(
                f"jft merge: --{(given or ['option'])[0]} belongs to --method; a recipe says it in its file"
            )
        files = [*options.models, *([options.out] if options.out else [])]
        if len(files) != 2:
            raise UsageError(
                "jft merge: give a recipe and a directory to write, or --method with models; see `jft merge --help`"
            )
        found = recipe.load(files[0])
        return recipe.parse({**found.text, **_overrides(options)}), files[1]
    if not options.models or not options.out:
        raise UsageError("jft merge: --method needs models and --out DIRECTORY")
    return recipe.parse(_described(options)), options.out


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    values = {"out_dtype": options.dtype, "seed": options.seed, "mismatch": options.mismatch}
    return {n: v for n, v in values.items() if v is not None} | ({"check": False} if options.no_check else {})


def _described(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe that ``--method`` and its options are."""
    from jft.merge import RULES

    weights = options.weights or []
    if len(weights) not in (0, 1, len(options.models)):
        raise UsageError(
            f"jft merge: --weights are one number, or one per model ({len(options.models)}), not {len(weights)}"
        )
    each: list[dict[str, Any]] = [{"model": model, "parameters": {}} for model in options.models]
    parameters: dict[str, Any] = {"scale": options.scale} if options.scale is not None else {}
    for entry, weight in zip(each, weights * len(each) if len(weights) == 1 else weights, strict=False):
        entry["parameters"]["weight"] = weight
    for text in options.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"jft merge: --option {text!r} is written NAME=VALUE")
        number = _value(value)
        if isinstance(number, list | tuple):
            # In a recipe a list runs over the layers.
            if len(number) != len(each):
                raise UsageError(f"jft merge: --option {name} has {len(number)} values for {len(each)} models")
            for entry, x in zip(each, number, strict=True):
                entry["parameters"][name] = x
        else:
            parameters[name] = number
    rule = RULES.get(options.method)
    preset = options.preset or (next(iter(rule.presets)) if rule else None)
    value = {"merge_method": options.method, "models": each, "parameters": parameters, "preset": preset}
    return value | ({"base_model": options.base} if options.base else {}) | _overrides(options)


def _value(text: str) -> Any:
    """A value as Python writes it; a bare word is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text, text)


def _list(options: argparse.Namespace) -> int:
    from jft.merge import RULES
    from jft.merge.mergekit import METHODS

    rows = []
    for name, rule in sorted(RULES.items()):
        methods = [m for m, method in METHODS.items() if method.rule == name]
        rows.append(
            {
                "rule": name,
                "mergekit": methods,
                "presets": list(rule.presets),
                "options": list(rule.options),
                "paper": rule.paper,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    headers = ["rule", "mergekit", "presets", "options", "paper"]
    cells = [[x if isinstance(x, str) else ", ".join(x) for x in row.values()] for row in rows]
    terminal.show(terminal.table(headers, cells, left=headers, fold=headers[1:]))
    return 0


def _dry_run(recipe: Any, out: str, options: argparse.Namespace) -> int:
    from jft.merge.plan import plan
    from jft.models.hf import writer
    from jft.parallel.memory import human

    planned = plan(recipe)
    files = writer.split(planned.tensors, options.shard_size * 1e9)
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for job in planned.jobs:
        # Equal numbers share one rule: the tensors that have them are a row.
        groups.setdefault((id(job.rule), job.scale), []).append(job)
    rows = [
        {
            "tensors": len(jobs),
            "first": jobs[0].name,
            "models": len(jobs[0].models),
            "scale": scale,
            **_numbers(jobs[0]),
        }
        for (_, scale), jobs in groups.items()
    ]
    sizes = {name: sum(t.nbytes for t in held) for name, held in files.items()}
    report = {
        "out": out, **{k: planned.manifest[k] for k in ("method", "rule", "preset", "inputs", "notes")},
        "read": planned.nbytes_read, "written": sizes, "tensors": rows,
    }  # fmt: skip
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{recipe.method}: rule {report['rule']}, preset {report['preset']}")
    for name in report["inputs"]:
        print(terminal.plain(f"reads   {name}"))
    print(f"reads   {human(planned.nbytes_read)} in {len(planned.jobs)} tensors")
    print(f"writes  {out}: {human(sum(sizes.values()))} in {len(sizes)} file{'s' * (len(sizes) > 1)}")
    _notes(planned)
    headers = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(h, "")) for h in headers] for row in rows]
    terminal.show(terminal.table(headers, cells, left=("first",), fold=headers[2:]))
    return 0


def _numbers(job: Any) -> dict[str, Any]:
    return {} if job.rule is None else {n: v if len(set(v)) > 1 else v[0] for n, v in job.values.items()}


def _cell(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in values)


def _notes(planned: Any) -> None:
    for note in planned.notes:
        print(terminal.plain(f"note: {note}"), file=sys.stderr)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Any], Callable[[int], None]]]:
    """A bar with the time left, on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress("merging", *columns, console=console, disable=not console.is_terminal) as bar:

        def begin(planned: Any) -> Callable[[int], None]:
            task = bar.add_task("merging", total=planned.nbytes_read)
            return lambda count: bar.advance(task, count)

        yield begin


def main(argv: Sequence[str]) -> int:
    """``jft merge RECIPE OUT``, or ``jft merge --method RULE --base BASE MODEL ... --out OUT``."""
    options = _options(argv)
    if options.list:
        return _list(options)
    recipe, out = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe, out, options)
    target = Path(out)
    if target.exists() and not options.overwrite and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"{out!r} exists and is not an empty directory; nothing was written (--overwrite replaces a model)"
        )

    from jft.merge.on_disk import merge_to_disk

    with _progress() as progress:
        planned = merge_to_disk(
            recipe, out, overwrite=options.overwrite, shard_bytes=options.shard_size * 1e9, workers=options.workers,
            progress=progress,
        )  # fmt: skip
    _notes(planned)
    if options.json:
        print(json.dumps({"out": out, **planned.manifest, "tensors": len(planned.jobs)}, indent=2))
    else:
        manifest = planned.manifest
        print(
            f"{out}: {manifest['rule']} ({manifest['preset']}) of {len(manifest['inputs'])} inputs, {len(planned.jobs)} tensors"
        )
    return 0
