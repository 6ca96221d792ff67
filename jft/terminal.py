"""Tables and text for the terminal; tables have columns under bold headers, two spaces apart, without lines."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any

# What is piped into a file or a pager: a terminal's 80 columns would fold what has room there.
_PIPED = 150
_ENDLESS = 1_000_000


def plain(text: str) -> str:
    """``text`` with control characters, other than line breaks and tabulators, and lone surrogates as escapes (``\\x1b``).

    What stands in a file, a name in it or a line of data, must not move the cursor, recolour or retitle the terminal that it
    is shown in, nor turn the direction of what is written there.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or (c.isspace() and c > "\x9f") else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


# rich is imported inside the functions: most uses of the library print no table.
def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    left: Collection[str] = (),
    fold: Collection[str] = (),
    total: bool = False,
) -> Any:
    """A ``rich`` table, for :func:`show` or :func:`text`. Cells are shown as they are, without markup.

    left: the headers of columns that are words; others are numbers, flushed right. fold: of columns that may take several
    lines where the terminal is narrow. total: the last row is one, and bold.
    """
    from rich.table import Table
    from rich.text import Text

    out = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        justify = "left" if header in left else "right"
        out.add_column(Text(header), justify=justify, no_wrap=header not in fold, overflow="fold")  # type: ignore[arg-type]
    lines = list(rows)
    for i, row in enumerate(lines):
        # Text, not str: rich would read [brackets] of a path or a pattern as markup.
        out.add_row(*(Text(plain(str(cell))) for cell in row), style="bold" if total and i == len(lines) - 1 else None)
    return out


def show(table: Any) -> None:
    """Print a :func:`table`: as wide as the terminal, or, where the output is none, as what does not fold.

    Where a terminal is narrower than what does not fold, headers take a line for each of their words; where that is not enough,
    lines are longer than the terminal, and nothing is cut.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPED, _least(table, console))
    elif _least(table, console) > console.width:
        for column in table.columns:
            column.header.plain = column.header.plain.replace(" ", "\n")
        console.width = max(console.width, _least(table, console))
    console.print(table)


def _least(table: Any, console: Any) -> int:
    """The width in columns that a table needs with all that folds folded."""
    # A table is measured against the console's own width, so it must be told that there is no limit.
    endless = console.options.update(width=_ENDLESS)
    for column in table.columns:
        if column.no_wrap:
            # rich would let a column be as narrow as its longest word, and cut what does not wrap.
            cells = [column.header, *column.cells]
            column.min_width = max(console.measure(cell, options=endless).maximum for cell in cells)
    return console.measure(table, options=endless).minimum


def text(table: Any) -> str:
    """A :func:`table` as plain lines, however long, without spaces at their ends."""
    from rich.console import Console

    console = Console(file=io.StringIO(), color_system=None, width=_ENDLESS)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
