"""Task vectors in files: what is in one, how two differ, apply one to a model, make one smaller."""

from __future__ import annotations

import argparse
import collections
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jft import terminal
from jft.cli import restored
from jft.cli.errors import Parser, UsageError

EXAMPLES = """\
examples:
  jft delta info run/task_vector.safetensors
  jft delta diff first.safetensors second.safetensors --json
  jft delta apply gpt2/ run/task_vector.safetensors merged/ --scale 0.4
  jft delta apply gpt2/ run/task_vector.safetensors forgot/ --scale=-0.4      (negation)
  jft delta compress run/task_vector.safetensors small.safetensors --method compeft --density 0.05
  jft delta extract-lora gpt2/ run/task_vector.safetensors adapter/ --rank 16 --select 'layers/.*/w$'
"""
INFO = """\
Show the manifest of a task vector, and for every path it changes: encoding, shape, density (non-zero entries / all
entries), norm and bytes in the file. Masks and gates have no norm without their base. Deltas are read one at a time, so the
file may be larger than memory."""
DIFF = """\
Compare two task vectors path by path: cosine, both norms, and the overlap of their supports (entries both change /
entries either changes). Paths that one of them does not change count as zero there."""
APPLY = """\
Write the model BASE + scale * TAU to OUT, a directory that transformers loads. The base must be, bit for bit, the one the
vector was made from; it is read in the dtype it had then."""
COMPRESS = """\
Write FILE compressed to OUT, and print for every path: encoding, bytes in the file and norm before and after, and the cosine
between the two. The options of a method, and what it computes, are those of jft.merge.compress:

  compeft     --density --alpha --scope            largest entries as plus or minus one scale     arXiv:2311.13171
  bitdelta    --zero                               a sign for each weight, a scale for a matrix   arXiv:2402.10193
  delta_come  --bits 8,3,2 --ranks 2,32 --ratio --group   singular vectors of mixed precision     arXiv:2406.08903
  low_rank    --rank, --energy                     truncated singular value decompositions (LoRA)
  magnitude   --density --scope --rescale          the largest entries
  random      --density --rescale                  random entries, 1/density times what they were (DARE)
  quantize    --bits --group --search              integers of 2 to 8 bits, a scale for each group"""
EXTRACT = """\
Write FILE as a LoRA adapter, OUT, that peft loads: the truncated singular value decomposition of the change of every matrix.
Changes of low rank keep their factors where neither --rank nor --energy is given. An adapter holds no norms, biases or
embeddings: leave them out with --select or --exclude. Prints for every path the rank, and the cosine to the change before."""


def _number_or_word(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _integers(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split(","))


def _bits(value: str) -> int | tuple[int, ...]:
    return _integers(value) if "," in value else int(value)


_METHOD_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "density": (float, "the fraction of entries that stay"),
    "alpha": (_number_or_word, "the scale in standard deviations, or stc for the mean magnitude"),
    "scope": (str, "model or tensor: what the density is of"),
    "rescale": (str, "none, density, l1 or l2"),
    "zero": (str, "minus or plus: the sign of zeros"),
    "bits": (_bits, "of an integer; for delta_come one for each group of vectors, as 8,3,2"),
    "ranks": (_integers, "of all groups but the last, as 2,32"),
    "ratio": (float, "bytes as a fraction of those in 16 bits"),
    "group": (int, "entries with a common scale"),
    "search": (bool, "scales with the least squared error"),
    "rank": (int, "singular values that stay"),
    "energy": (float, "the fraction of their squares that stays"),
}


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="jft delta", description=__doc__, epilog=EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    info = actions.add_parser("info", help="the manifest and a table of paths", description=INFO)
    info.add_argument("file", help="a task vector (.safetensors)")
    info.add_argument("--quick", action="store_true", help="read the header only: no densities, no norms")

    diff = actions.add_parser("diff", help="cosine, norms and overlap of two", description=DIFF)
    diff.add_argument("first", help="a task vector (.safetensors)")
    diff.add_argument("second", help="another")

    apply = actions.add_parser("apply", help="base + scale * task vector, as a model directory", description=APPLY)
    apply.add_argument("base", help="directory or hub id of the base model")
    apply.add_argument("file", help="a task vector (.safetensors)")
    apply.add_argument("out", help="directory to write; must not exist or be empty")
    apply.add_argument("--scale", type=float, default=1.0, help="coefficient (default 1; negative to subtract)")
    _add_selection(apply)
    apply.add_argument(
        "--dtype",
        help="read the base in this dtype (default: that of the vector's base; as stored where it is not known)",
    )
    apply.add_argument("--no-check", action="store_true", help="do not verify that BASE is the base of the vector")

    compress = actions.add_parser("compress", help="a task vector made smaller", description=COMPRESS)
    compress.add_argument("file", help="a task vector (.safetensors)")
    compress.add_argument("out", help="the file to write; must not exist")
    compress.add_argument("--method", required=True, help="one of those above")
    compress.add_argument(
        "--include", action="append", metavar="PATTERN", help="compress only paths matching this (repeatable)"
    )
    compress.add_argument("--seed", type=int, default=0, help="of random methods (default 0)")
    for name, (kind, text) in _METHOD_OPTIONS.items():
        more: dict[str, Any] = {"action": "store_true", "default": None} if kind is bool else {"type": kind}
        compress.add_argument(f"--{name}", help=text, **more)

    extract = actions.add_parser("extract-lora", help="an adapter that peft loads", description=EXTRACT)
    extract.add_argument("base", help="directory or hub id of the base model")
    extract.add_argument("file", help="a task vector (.safetensors)")
    extract.add_argument("out", help="directory to write; must not exist or be empty")
    extract.add_argument("--rank", type=int, help="singular values that stay of each matrix")
    extract.add_argument("--energy", type=float, help="the fraction of their squares that stays")
    _add_selection(extract)
    for action in (info, diff, apply, compress, extract):
        action.add_argument("--json", action="store_true", help="print JSON")
    options, rest = parser.parse_known_args(argv)
    if rest:
        actions.choices[options.action].unknown(rest[0])
    return options


def _add_selection(action: argparse.ArgumentParser) -> None:
    action.add_argument("--select", action="append", metavar="PATTERN", help="only paths matching this (repeatable)")
    action.add_argument("--exclude", action="append", metavar="PATTERN", help="no paths matching this (repeatable)")


def _selected(tau: Any, options: argparse.Namespace) -> Any:
    tau = tau.select(options.select) if options.select else tau
    return tau.exclude(options.exclude) if options.exclude else tau


def info(options: argparse.Namespace) -> int:
    """``jft delta info FILE``."""
    from jft.delta import TaskVector, file

    header = file.inspect(options.file)
    rows: list[dict[str, Any]] = []
    for path, entry in header.entries.items():
        row: dict[str, Any] = {"path": path, "encoding": entry.kind, "shape": list(entry.shape), "dtype": entry.dtype}
        if not options.quick:
            # One path at a time, as the file may be larger than memory.
            delta = TaskVector.load(options.file, [path])[path]
            row |= {"nnz": delta.nnz, "density": _share(delta.nnz, math.prod(delta.shape)), "norm": _norm(delta)}
        rows.append(row | {"nbytes": entry.nbytes})
    total: dict[str, Any] = {"paths": len(rows), "nbytes": sum(row["nbytes"] for row in rows)}
    if not options.quick:
        nnz = sum(row["nnz"] for row in rows)
        # Of the whole base where it is known: what does not change counts.
        parameters = header.manifest.get("base", {}).get("parameters") or sum(math.prod(row["shape"]) for row in rows)
        norms = [row["norm"] for row in rows]
        norm = None if None in norms else sum(norm**2 for norm in norms) ** 0.5
        total |= {"nnz": nnz, "parameters": parameters, "density": _share(nnz, parameters), "norm": norm}
    if options.json:
        print(json.dumps({"file": options.file, "manifest": header.manifest, "total": total, "paths": rows}, indent=2))
        return 0
    _print_manifest(header.manifest)
    columns = ["path", "encoding", "shape", "dtype", *([] if options.quick else ["density", "norm"]), "nbytes"]
    _print_table(columns, [*rows, {"path": f"{len(rows)} paths", **total}])
    return 0


def diff(options: argparse.Namespace) -> int:
    """``jft delta diff A B``."""
    from jft.delta import TaskVector, file

    headers = [file.inspect(options.first), file.inspect(options.second)]
    rows = []
    for path in dict.fromkeys([*headers[0].entries, *headers[1].entries]):
        sides = [
            TaskVector.load(name, [path])[path] if path in header.entries else None
            for name, header in zip((options.first, options.second), headers, strict=True)
        ]
        try:
            rows.append({"path": path, **_comparison(*sides)})
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
    totals: collections.Counter[str] = collections.Counter()
    for row in rows:
        totals.update({key: row[key] for key in ("dot", "both", "either")})
        totals.update({"first": row["norm_first"] ** 2, "second": row["norm_second"] ** 2})
    bases = [header.manifest.get("base", {}).get("fingerprint") for header in headers]
    total = _figures(totals["dot"], totals["first"] ** 0.5, totals["second"] ** 0.5, totals["both"], totals["either"])
    if options.json:
        report = {"first": options.first, "second": options.second, "bases": bases, "total": total, "paths": rows}
        print(json.dumps(report, indent=2))
        return 0
    same_base = bases[0] == bases[1]
    text = f"same base: {bases[0] or 'unknown'}" if same_base else f"different bases: {bases[0]} and {bases[1]}"
    print(terminal.plain(text))
    _print_table(["path", "cosine", "norm_first", "norm_second", "overlap"], [*rows, {"path": "all", **total}])
    return 0


def apply(options: argparse.Namespace) -> int:
    """``jft delta apply BASE TAU OUT``."""
    from jft import delta
    from jft.models import load, save

    _check_directory(options.out)
    restored.note_linearized(options.file)
    tau = _selected(delta.TaskVector.load(options.file), options)
    dtype = options.dtype or _dtype(tau.manifest)
    model, base = load(options.base, dtype=dtype)
    params = delta.apply(base, tau, options.scale, check=not options.no_check)
    save(model, params, options.out, like=options.base)
    summary = {"out": options.out, "scale": options.scale, "dtype": dtype, "paths": len(tau), "norm": float(tau.norm())}
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        dtype_text = dtype or "dtypes as stored"
        print(f"{options.out}: {options.base} + {options.scale:g} * {options.file}, {len(tau)} paths, {dtype_text}")
    return 0


def compress(options: argparse.Namespace) -> int:
    """``jft delta compress FILE OUT``."""
    from jft.delta import TaskVector, file
    from jft.merge import compress as compressed

    # Before the file is read, which may take minutes.
    if Path(options.out).exists():
        raise UsageError(f"{options.out!r} exists; nothing was written")
    given = {name: getattr(options, name) for name in _METHOD_OPTIONS if getattr(options, name) is not None}
    before = TaskVector.load(options.file)
    after = compressed(before, options.method, include=options.include, seed=options.seed, **given)
    after.save(options.out)
    # As they lie in the files: positions and signs take less there.
    headers = [file.inspect(name).entries for name in (options.file, options.out)]
    rows = []
    for path, delta in after.items():
        row: dict[str, Any] = {"path": path}
        for side, tau, header in zip(("before", "after"), (before, after), headers, strict=True):
            entry = header[path]
            row |= {f"encoding_{side}": entry.kind, f"bytes_{side}": entry.nbytes, f"norm_{side}": _norm(tau[path])}
        rows.append(row | {"cosine": _cosine(before[path], delta)})
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in ("bytes_before", "bytes_after")}
    if not before.relative:
        total |= {"norm_before": float(before.norm()), "norm_after": float(after.norm())}
        total |= {"cosine": float(before.cosine(after))}
    if options.json:
        report = {"file": options.file, "out": options.out, "method": options.method, "options": given}
        print(json.dumps({**report, "total": total, "paths": rows}, indent=2))
        return 0
    columns = ["path", *(f"{what}_{side}" for what in ("encoding", "bytes", "norm") for side in ("before", "after"))]
    _print_table([*columns, "cosine"], [*rows, {"path": f"{len(rows)} paths", **total}])
    return 0


def extract_lora(options: argparse.Namespace) -> int:
    """``jft delta extract-lora BASE TAU OUT``."""
    from jft.delta import TaskVector
    from jft.merge import compress as compressed
    from jft.models import load, save_adapter

    _check_directory(options.out)
    before = after = _selected(TaskVector.load(options.file), options)
    if options.rank is not None or options.energy is not None:
        after = compressed(before, "low_rank", rank=options.rank, energy=options.energy)
    model, _ = load(options.base)
    save_adapter(model, after, options.out, base=options.base)
    rows = [
        {"path": path, "rank": getattr(delta, "rank", None), "cosine": _cosine(before[path], delta)}
        for path, delta in after.items()
    ]
    total = {"cosine": float(before.cosine(after))}
    if options.json:
        print(json.dumps({"file": options.file, "out": options.out, "total": total, "paths": rows}, indent=2))
        return 0
    _print_table(["path", "rank", "cosine"], [*rows, {"path": f"{len(rows)} paths", **total}])
    return 0


def _check_directory(name: str) -> None:
    """Refuse an occupied directory, before a base is loaded, which may take minutes."""
    out = Path(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{name!r} exists and is not an empty directory; nothing was written")


def _cosine(first: Any, second: Any) -> float | None:
    """The cosine of two deltas; None where only the base could tell, 0 where one is zero."""
    if first.relative or second.relative:
        return None
    lengths = float(first.norm()) * float(second.norm())
    return float(first.dot(second)) / lengths if lengths else 0.0


def _comparison(first: Any, second: Any) -> dict[str, Any]:
    """The row of one path; None stands for a delta that is zero."""
    if first is None:
        return _figures(0.0, 0.0, float(second.norm()), 0, second.nnz)
    if second is None:
        return _figures(0.0, float(first.norm()), 0.0, 0, first.nnz)
    return _figures(float(first.dot(second)), float(first.norm()), float(second.norm()), *_support(first, second))


def _figures(dot: float, first: float, second: float, both: int, either: int) -> dict[str, Any]:
    cosine = dot / (first * second) if first and second else 0.0
    overlap = both / either if either else 0.0
    return {
        "dot": dot, "cosine": cosine, "norm_first": first, "norm_second": second,
        "both": both, "either": either, "overlap": overlap,
    }  # fmt: skip


def _support(first: Any, second: Any) -> tuple[int, int]:
    """Entries that both change, and entries that either changes."""
    from jft.delta.numeric import count_nonzero

    # Where one has coordinates, no dense array is needed.
    coordinates = first.coordinates()
    if coordinates is not None and second.coordinates() is not None:
        rows, columns, values = coordinates
        both = count_nonzero((values != 0) & (second.take(rows, columns) != 0))
        return both, first.nnz + second.nnz - both
    a, b = first.dense() != 0, second.dense() != 0
    return count_nonzero(a & b), count_nonzero(a | b)


def _norm(delta: Any) -> float | None:
    """The norm; None where only the base could tell."""
    return None if delta.relative else float(delta.norm())


def _dtype(manifest: dict[str, Any]) -> str | None:
    """The one floating-point dtype of the base; None, meaning as stored, where there are several or it is not known."""
    leaves = manifest.get("base", {}).get("leaves", {}).values()
    dtypes = {dtype for _, _, dtype in leaves if "float" in dtype}
    return dtypes.pop() if len(dtypes) == 1 else None


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


LONG = ("config", "trained", "content")  # entries of a manifest of many lines, which --json has


def _print_manifest(manifest: dict[str, Any]) -> None:
    entries = dict(manifest)
    base = entries.pop("base", None)
    parents = entries.pop("parents", [])
    text = f"{base['fingerprint']} ({base['parameters']:,} parameters)" if base else "unknown"
    print(terminal.plain(f"base         {text}"))
    for key, value in entries.items():
        if key not in LONG:
            print(terminal.plain(f"{key:<12} {_shown(value)}"))
    for parent in parents:
        coefficient = f"{parent['coefficient']:g} * " if parent.get("coefficient") is not None else ""
        facts = {k: v for k, v in parent["manifest"].items() if k not in (*LONG, "versions")}
        print(terminal.plain(f"{'parent':<12} {coefficient}{_shown(facts)}"))
    print()


def _shown(value: Any, width: int = 160) -> str:
    """A value of a manifest in one line: ``key=value`` of a section, without what is empty, cut where it is long."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            inner = [(k, v) for k, v in value.items() if v not in (None, "", [], {})]
            return ", ".join(f"{k}=({text(v)})" if isinstance(v, dict) else f"{k}={text(v)}" for k, v in inner)
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    line = text(value)
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _print_table(columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Rows under headers; the last row is the total."""
    headers = [column.replace("_", " ") for column in columns]
    cells = [[_cell(column, row.get(column, "")) for column in columns] for row in rows]
    terminal.show(
        terminal.table(headers, cells, left=("path", "encoding", "encoding before", "encoding after"), total=True)
    )


def _cell(column: str, value: Any) -> str:
    if column == "shape" and value != "":
        return "x".join(map(str, value)) or "scalar"
    if value is None:
        return "-"
    if "bytes" in column and value != "":
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str]) -> int:
    """``jft delta info|diff|apply|compress|extract-lora ...``."""
    options = _options(argv)
    actions = {"info": info, "diff": diff, "apply": apply, "compress": compress, "extract-lora": extract_lora}
    return actions[options.action](options)
