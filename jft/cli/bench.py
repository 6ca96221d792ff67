"""Measure the cost of a training step by method: FLOPs, memory, seconds."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jft import terminal
from jft.cli.errors import Parser, UsageError

METHODS = (
    "full", "lora:rank=16", "block_sparse:density=0.05,block=(64,64)", "super_tuning:sparsity=0.99", "lift:rank=4", "s2ft",
)  # fmt: skip


def _method(text: str) -> tuple[str, dict[str, Any]]:
    """``name:option=value,option=value``, values as Python writes them; a bare word is a string."""
    name, _, rest = text.partition(":")
    options = {}
    # A comma separates options where the next one begins: those inside a value have none after them.
    for pair in re.split(r",(?=\w+=)", rest) if rest else []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"jft bench: method {text!r} is written name:option=value,option=value")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return name, options


def _mesh(text: str) -> tuple[tuple[str, int], ...]:
    try:
        return tuple((name, int(n)) for name, n in (part.split("=") for part in text.split(",") if part))
    except ValueError:
        raise UsageError(f"jft bench: --mesh {text!r} is written fsdp=8,tensor=2") from None


def _table(costs: Sequence[Any]) -> None:
    from jft.parallel.memory import human

    first = costs[0]
    relative = f"of {first.method}"

    def share(name: str) -> Callable[[Any], str]:
        return lambda c: f"{getattr(c, name) / getattr(first, name):.4g}" if getattr(c, name) else ""

    columns: list[tuple[str, Callable[[Any], str]]] = [
        ("method", lambda c: c.method),
        ("trained", lambda c: f"{100 * c.density:.2f}%"),
    ]
    if first.flops:
        columns += [("FLOPs", lambda c: f"{c.flops:.3g}" if c.flops else ""), (relative, share("flops"))]
    columns += [("grad + optimizer", lambda c: human(c.optimizer_bytes)), (relative, share("optimizer_bytes"))]
    # Where FLOPs are not counted, as for a topology, memory is what can be compared.
    if not first.flops:
        columns += [
            ("arguments / device", lambda c: human(c.arguments) if c.fits else ""),
            ("temporaries / device", lambda c: human(c.temporaries) if c.fits else ""),
        ]
    columns += [("peak / device", lambda c: human(c.peak) if c.fits else f"over {human(c.peak)}, does not fit")]
    if first.seconds:
        columns += [("s / step", lambda c: f"{c.seconds:.2f}"), (relative, lambda c: f"{c.times(first):.3g}")]
    headers = [header for header, _ in columns]
    rows = [[cell(c) for _, cell in columns] for c in costs]
    terminal.show(terminal.table(headers, rows, left=("method",), fold=headers))


def main(argv: Sequence[str]) -> int:
    """``jft bench step [--model NAME] [--methods A,B:option=value ...] [--steps N] [--topology v5e:4x4 --mesh fsdp=16]``."""
    parser = Parser(prog="jft bench", description=__doc__)
    parser.add_argument("what", choices=["step"], help="step: one training step of each method")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        help="name:option=value,...; the first is what others are compared with",
    )
    parser.add_argument("--model", default="smollm2-135m", help="the shape of the model (random weights)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default="none", choices=["none", "full", "dots"])
    parser.add_argument("--attention", default="plain", choices=["plain", "blockwise", "fused"])
    parser.add_argument(
        "--logits-chunk", type=int, default=0, help="tokens of a row whose logits exist at once; 0: all. Not with FLOPs"
    )
    parser.add_argument(
        "--unroll", type=int, default=0, help="layers per scan step; 0 unrolls all, without which FLOPs are not counted"
    )
    parser.add_argument("--steps", type=int, default=0, help="steps to time, each method in turn; 0 compiles only")
    parser.add_argument("--topology", default="", help="compile for TPU chips that are not here: v5e:4x4, v5p:2x2x2")
    parser.add_argument("--mesh", default="", help="fsdp=8,tensor=2")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = vars(parser.strict(argv))
    what = [_method(text) for text in args.pop("methods")]
    args["mesh"] = _mesh(args["mesh"])
    as_json = args.pop("json")
    # There is one benchmark; what remains are the fields of ``Setting``.
    args.pop("what")

    from jft.bench.step import Setting, measure

    setting = Setting(**args)
    costs = measure(setting, what, lambda line: print(line, file=sys.stderr))
    if as_json:
        import jax

        rows = [dataclasses.asdict(c) for c in costs]
        print(json.dumps({"setting": dataclasses.asdict(setting), "jax": jax.__version__, "costs": rows}, indent=2))
    else:
        _table(costs)
    return 0
