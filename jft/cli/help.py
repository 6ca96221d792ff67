"""Help texts as wide as the terminal."""

from __future__ import annotations

import argparse
import textwrap


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills the paragraphs of descriptions and epilogs; those with an indented line (examples, tables) stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = lambda paragraph: textwrap.fill(paragraph, width, initial_indent=indent, subsequent_indent=indent)
        return "\n\n".join(
            textwrap.indent(paragraph, indent) if "\n " in f"\n{paragraph}" else fill(paragraph)
            for paragraph in text.strip("\n").split("\n\n")
        )
