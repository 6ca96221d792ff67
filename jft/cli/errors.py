"""Errors of wrong usage, in one line."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from jft.cli.help import Formatter
from jft.names import nearest


class UsageError(ValueError):
    """An unknown command, option or config key, or a value that cannot be read: exit code 2."""


class Parser(argparse.ArgumentParser):
    """``argparse`` whose errors are :class:`UsageError`, with the nearest name for an unknown option."""

    def __init__(self, **options: Any):
        # No abbreviations: a new option would change what an old command line means.
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('jft ')}: {message}; see `{self.prog} --help`")

    def unknown(self, argument: str) -> NoReturn:
        """Raise for ``argument``, which no option takes, with the nearest option."""
        options = [o for action in self._actions for o in action.option_strings]
        name = argument.split("=", maxsplit=1)[0]
        what = "option" if name.startswith("-") else "argument"
        self.error(f"unknown {what} {name!r}{nearest(name, options) if what == 'option' else ''}")

    def strict(self, argv: Any) -> argparse.Namespace:
        """Parse all of ``argv``, or raise for the first argument that is left over."""
        known, rest = self.parse_known_args(argv)
        if rest:
            self.unknown(rest[0])
        return known


def tell_others(error: BaseException, status: int) -> None:
    """End this process with a line that the other processes of its run print as well; nothing for one by itself."""
    # They came by way of it, or there are none.
    module = sys.modules.get("jft.parallel.peers")
    peers = module.current() if module else None
    if peers is not None:
        peers.exit(error, status)
