"""Measure the cost of a training step by method, of the kernels, or of merging: FLOPs, bytes, memory, seconds."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jft import terminal
from jft.cli.errors import Parser, UsageError
from jft.names import nearest

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
    if first.estimate:
        columns += [
            ("s by XLA's cycles", lambda c: f"{c.estimate:.3f}" if c.estimate else ""),
            (relative, share("estimate")),
        ]
    if first.seconds:
        columns += [("s / step", lambda c: f"{c.seconds:.2f}"), (relative, lambda c: f"{c.times(first):.3g}")]
    headers = [header for header, _ in columns]
    rows = [[cell(c) for _, cell in columns] for c in costs]
    terminal.show(terminal.table(headers, rows, left=("method",), fold=headers))


def _case(text: str, density: float, args: dict[str, Any]) -> Any:
    from jft.bench.kernels import Case

    try:
        tokens, inputs, outputs = map(int, text.split("x"))
    except ValueError:
        raise UsageError(f"jft bench: shape {text!r} is written TOKENSxINPUTSxOUTPUTS: 8192x4096x4096") from None
    return Case(tokens, inputs, outputs, density, (args["block"], args["block"]), args["dtype"])


def _kernel_table(costs: Sequence[Any], clock: float | None) -> None:
    from jft.parallel.memory import human

    def number(value: Any, scale: float = 1, form: str = ".3g") -> str:
        return "" if value is None else f"{value * scale:{form}}"

    columns: list[tuple[str, Callable[[Any], str]]] = [
        ("kernel", lambda c: c.kernel),
        ("form", lambda c: c.form),
        ("shape", lambda c: f"{c.case.tokens} x {c.case.inputs} x {c.case.outputs}, {100 * c.case.density:g}%"),
        ("FLOPs", lambda c: c.refusal or number(c.flops)),
        ("bytes of floor", lambda c: number(c.to_floor)),
        ("temporaries", lambda c: "" if c.temporaries is None else human(c.temporaries)),
    ]
    optional: list[tuple[str, Callable[[Any], str]]] = [
        ("us by XLA's model", lambda c: number(c.estimate, 1e6, ".0f")),
        ("us by bundles", lambda c: number(c.bundles and clock and c.bundles / clock, 1e6, ".0f")),
        ("us measured", lambda c: number(c.seconds, 1e6, ".0f")),
    ]
    columns += [(header, cell) for header, cell in optional if any(cell(c) for c in costs)]
    headers = [header for header, _ in columns]
    rows = [[cell(c) for _, cell in columns] for c in costs]
    terminal.show(terminal.table(headers, rows, left=("kernel", "form", "shape"), fold=headers))


def _kernels(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="jft bench kernels", description="The kernels for selected blocks beside XLA's and dense forms."
    )
    parser.add_argument("--kernels", nargs="+", help="block_sddmm, block_spmm, block_put, sparse_adam; default: all")
    parser.add_argument(
        "--shapes", nargs="+", default=("8192x4096x4096",), help="tokens x inputs x outputs of a weight"
    )
    parser.add_argument(
        "--density", nargs="+", type=float, default=(0.1,), help="shares of the blocks that are selected"
    )
    parser.add_argument("--block", type=int, default=128, help="rows and columns of a block")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=0, help="runs to time on the device that is here; 0 compiles only")
    parser.add_argument("--topology", default="", help="compile for a TPU that is not here: v5e:2x2, v6e:2x2")
    parser.add_argument(
        "--tune", action="store_true", help="time all configurations here, and write the table of this device"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = vars(parser.strict(argv))
    if args["topology"] and (args["steps"] or args["tune"]):
        raise UsageError(f"jft bench: nothing can be run on the topology {args['topology']}, whose chips are not here")
    cases = [_case(text, density, args) for text in args["shapes"] for density in args["density"]]
    say = lambda line: print(line, file=sys.stderr)

    import jax

    from jft.bench import bundles, kernels

    if args["tune"]:
        from jft.bench.tune import tune

        print(tune(cases, args["steps"] or 10, say))
        return 0
    names = args["kernels"] or kernels.KERNELS
    for name in names:
        if name not in kernels.KERNELS:
            known = ", ".join(kernels.KERNELS)
            raise UsageError(
                f"jft bench: kernel {name!r} is unknown{nearest(name, kernels.KERNELS)}; it is one of {known}"
            )
    costs = kernels.measure(cases, names, args["topology"], args["steps"], say)
    if args["json"]:
        rows = [{**dataclasses.asdict(c), "to_floor": c.to_floor} for c in costs]
        device = args["topology"] or jax.devices()[0].device_kind
        print(json.dumps({"device": device, "jax": jax.__version__, "costs": rows}, indent=2))
    else:
        _kernel_table(costs, bundles.CLOCK.get(args["topology"].split(":")[0]))
    return 0


def _merge(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="jft bench merge", description="Merging of random Llamas on disk: jft beside mergekit, both here and now."
    )
    parser.add_argument("--params", default="350M", help="10M, 350M or 1.1B")
    parser.add_argument(
        "--methods", nargs="+", default=["ties", "task_arithmetic"], help="ties, task_arithmetic, linear"
    )
    parser.add_argument("--models", type=int, default=4, help="checkpoints, the base among them")
    parser.add_argument("--tools", nargs="+", help="jft, mergekit; default: both, where mergekit is installed")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, of which the fastest counts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = vars(parser.strict(argv))

    from jft.bench import merge

    installed = importlib.util.find_spec("mergekit") is not None
    args["tools"] = args["tools"] or ["jft", *(("mergekit",) if installed else ())]
    for key, known in (("params", merge.SHAPES), ("methods", merge.RECIPES), ("tools", merge.TOOLS)):
        for name in [args[key]] if key == "params" else args[key]:
            if name not in known:
                raise UsageError(
                    f"jft bench: --{key} {name!r} is unknown{nearest(name, known)}; it is one of {', '.join(known)}"
                )
    as_json = args.pop("json")
    runs = merge.measure(**args, say=lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps({"setting": args, "runs": [dataclasses.asdict(r) for r in runs]}, indent=2))
        return 0

    from jft.parallel.memory import human

    first = {r.method: r for r in reversed(runs)}
    rows = [
        [r.method, r.tool, f"{r.seconds:.1f}", f"{r.seconds / first[r.method].seconds:.2f}", human(r.peak),
         f"{r.peak / first[r.method].peak:.2f}"]
        for r in runs
    ]  # fmt: skip
    share = f"of {args['tools'][0]}"
    terminal.show(
        terminal.table(["method", "tool", "seconds", share, "peak memory", share], rows, left=("method", "tool"))
    )
    return 0


def main(argv: Sequence[str]) -> int:
    """``jft bench step [--model NAME] [--methods A,B:option=value ...] [--steps N] [--topology v5e:4x4 --mesh fsdp=16]``,
    or ``jft bench kernels [--shapes 8192x4096x4096 ...] [--density 0.1 ...] [--topology v5e:2x2 | --steps N | --tune]``,
    or ``jft bench merge [--params 350M] [--methods ties task_arithmetic]``.
    """
    if argv and argv[0] == "kernels":
        return _kernels(argv[1:])
    if argv and argv[0] == "merge":
        return _merge(argv[1:])
    parser = Parser(prog="jft bench", description=__doc__)
    parser.add_argument(
        "what",
        choices=["step", "kernels", "merge"],
        help="step: one training step of each method; others: see jft bench kernels --help, jft bench merge --help",
    )
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
