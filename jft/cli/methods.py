"""List the fine-tuning methods: paper, options, what each trains and stores."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jft import terminal
from jft.cli.errors import Parser, UsageError
from jft.names import nearest
from jft.select.layers import Depth


def _describe(entry: Any) -> dict[str, Any]:
    """One preset as plain data. A preset whose options have no defaults is built only when they are given, so not here."""
    from jft.methods import method

    row = {
        "name": entry.name,
        "paper": entry.paper,
        "summary": entry.summary.replace("``", ""),
        "options": entry.options,
        **({} if entry.card is None else {"card": dataclasses.asdict(entry.card)}),
    }
    try:
        preset = method(entry.name)
    except (TypeError, ValueError):
        return {**row, "trains": "depends on its options", "stores": "depends on its options"}
    return {**row, "trains": _trains(preset), "stores": _stores(preset.train)}


def _trains(preset: Any) -> str:
    """The weights that train, in words, from the method's selection."""
    select = preset.select
    what = "matrices inside layers" if select.linear_only else "all weights"
    if tuple(select.include) != ("",):
        what += " matching " + " or ".join(select.include)
    if select.exclude:
        what += " but not " + " or ".join(select.exclude)
    if preset.undecided is not None:
        what += ", of which the base and the data decide"
    elif isinstance(select.layers, Depth):
        what += f" of layers {select.layers}"
    elif select.layers is not None:
        what += f", {select.layers}"
    return what


def _stores(train: Any) -> str:
    """The stored form of the change of one weight, from its parametrisation."""
    summary = (type(train).__doc__ or "").strip().split("\n")[0].split(". ")[0].rstrip(".").replace("``", "")
    return f"{type(train).__name__}: {summary}"


def _table(rows: list[dict[str, Any]]) -> None:
    headers = ("method", "what it does", "options", "paper")
    cells = [(row["name"], row["summary"], ", ".join(row["options"]), row["paper"]) for row in rows]
    terminal.show(terminal.table(headers, cells, left=headers, fold=headers[1:]))


def _card(row: dict[str, Any], doc: str, card: Any) -> None:
    print(f"{row['name']}: {row['summary']}\n")
    # The first paragraph is the summary, which is printed above.
    body = doc.split("\n\n", maxsplit=1)
    if len(body) == 2:
        print(body[1] + "\n")
    print(f"  paper    {row['paper']}")
    for name, text in _sources(card):
        print(f"  {name:<8} {text}")
    print(f"  trains   {row['trains']}")
    print(f"  stores   {row['stores']}")
    for name, default in row["options"].items():
        print(f"  option   {name} = {_shown(default)}{_card_defaults(card, name)}")
    print("  always   include=PATTERNS (only these), exclude=PATTERNS (none of these),")
    print("           also=PATTERNS (train these in place as well), freeze=PATTERNS (never train these)")


def _sources(card: Any) -> list[tuple[str, str]]:
    """The entries of a card, by name; none for a method without one."""
    if card is None:
        return []
    texts = {"formula": card.formula, "code": card.code, "follows": card.follows, "departs": card.departs or "nowhere"}
    return [(name, text) for name, text in {**texts, "check": card.check}.items() if text]


def _card_defaults(card: Any, option: str) -> str:
    """The defaults of paper and code, where the card has them."""
    if card is None or option not in card.defaults:
        return ""
    paper, code = card.defaults[option]
    return f"  (paper: {paper}, code: {code})"


def markdown(entries: Mapping[str, Any]) -> str:
    """The cards of all methods, docs/methods.md."""
    lines = [
        "# Methods",
        "",
        "Each preset held against its paper and the code its authors released. `jft methods NAME` prints one;",
        "`jft methods --markdown` wrote this page.",
    ]
    for name, entry in entries.items():
        lines += ["", f"## {name}", "", entry.summary.replace("``", "`"), "", f"- **paper**: {entry.paper}"]
        lines += [f"- **{key}**: {_escaped(text)}" for key, text in _sources(entry.card)]
        if entry.arguments:
            lines += ["", "| option | jft | paper | code |", "|---|---|---|---|"]
        for option, default in entry.arguments.items():
            paper, code = entry.card.defaults.get(option, ("", "")) if entry.card else ("", "")
            cells = (f"`{_shown(default)}`", _escaped(str(paper)), _escaped(str(code)))
            lines.append(f"| {option} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    """A default as it is written; a function by its name, since its repr has its address in this process."""
    return default.__qualname__ if inspect.isfunction(default) else repr(default)


def _escaped(text: str) -> str:
    """Plain text with what Markdown would take for emphasis or a tag."""
    return re.sub(r"([*_<`])", r"\\\1", text)


def main(argv: Sequence[str]) -> int:
    """``jft methods [NAME] [--json]``."""
    parser = Parser(prog="jft methods", description=__doc__)
    parser.add_argument("name", nargs="?", help="one method in full, instead of the table of all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--markdown", action="store_true", help="print the cards of all methods, as docs/methods.md has them"
    )
    options = parser.strict(argv)

    from jft.methods import entries

    known = entries()
    if options.name is not None and options.name not in known:
        raise UsageError(f"unknown method {options.name!r}{nearest(options.name, known)}; `jft methods` lists all")
    if options.markdown:
        print(markdown(known), end="")
        return 0
    if options.name is not None:
        import inspect

        row = _describe(known[options.name])
        doc = inspect.getdoc(known[options.name].build) or ""
        print(json.dumps(row, default=str, indent=2)) if options.json else _card(row, doc, known[options.name].card)
        return 0
    rows = [_describe(entry) for entry in known.values()]
    print(json.dumps(rows, default=str, indent=2)) if options.json else _table(rows)
    return 0
