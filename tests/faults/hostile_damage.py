"""Kinds of damage of a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

DEEP = 100_000


def content(text: str | bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def within(change: Callable[[str], str]) -> Callable[[Path], None]:
    """A change of the text of the first object, which is not damaged otherwise."""
    return lambda file: file.write_text(change(file.read_text()))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def _first(entry: str) -> Callable[[str], str]:
    return lambda text: text.replace("{", "{" + entry + ", ", 1)


def sparse(file: Path) -> None:
    with file.open("wb") as handle:
        handle.write(b'{"a": "')
        handle.truncate(2**31)


TEXTS: dict[str, Callable[[Path], None]] = {
    "empty": content(""),
    "blank": content("  \n\n "),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]) and None,
    "words": content("Entry not found"),
    "page": content("<!DOCTYPE html><html><body>404</body></html>"),
    "pointer": content("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"),
    "array": content("[1, 2]"),
    "number": content("1"),
    "null": content("null"),
    "string": content('"a"'),
    "deep list": content("[" * DEEP),
    "deep closed list": content("[" * DEEP + "]" * DEEP),
    "deep objects": content('{"a":' * DEEP + "1" + "}" * DEEP),
    "moderately deep": within(_first('"x": ' + "[" * 500 + "]" * 500)),
    "key twice": within(_first('"x": 1, "x": 2')),
    "long integer": within(_first('"x": ' + "9" * 5000)),
    "surrogate": within(_first('"x": "\\ud800"')),
    "raw control character": within(_first('"x": "\x1b[31m"')),
    "latin-1": content('{"a": "é"}'.encode("latin-1")),
    "utf-16": lambda file: file.write_bytes(file.read_text().encode("utf-16")) and None,
    "comment": within(lambda text: text + " // a comment"),
    "two values": within(lambda text: text + " {}"),
    "null bytes": content(b"\0" * 64),
}
NUMBERS = {"not a number": within(_first('"x": NaN')), "infinity": within(_first('"x": -Infinity'))}
NUMBERS |= {"beyond a float": within(_first('"x": 1e999'))}
FILES: dict[str, Callable[[Path], None]] = {
    "pipe": replaced(lambda file: os.mkfifo(file)),
    "folder": replaced(lambda file: file.mkdir()),
    "device": replaced(lambda file: file.symlink_to("/dev/zero")),
    "link to itself": replaced(lambda file: file.symlink_to(file)),
    "2 GiB": replaced(sparse),
}


def damaged(name: str, damage: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text('{"text": "a"}\n')
        damage(folder / name)
        return folder

    return make
