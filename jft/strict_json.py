"""JSON as files that people download have it: read within bounds, without guesses, and checked against a schema.

The one JSON reader of jft. Where Python's takes what no other reader would (``NaN``, a key twice, of which it drops the first),
or ends in ``RecursionError``, this one raises an error of one line that names the file, the place in it and a way out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from jft import files

MAX_DEPTH = 128
"""Objects and lists inside each other: far beyond any config, and what every recursive reader of a value stands."""
MAX_BYTES = 32_000_000
"""Of a file: the index of a model of a hundred thousand tensors has a third of it."""


def loads(
    text: str | bytes, where: object, *, hint: str = "", nan: bool = False, error: type[ValueError] = ValueError
) -> Any:
    """The value that ``text`` holds; ``error`` for anything else.

    where: its file, or file and line, and ``hint``, what to do about it, both for the message. nan: NaN and infinities may
    stand in it, as Python writes them, and numbers may be beyond a float.

    Refused are text that is not UTF-8 or not JSON, a key that stands twice in an object, lone surrogates (no text can hold
    them), and more than ``MAX_DEPTH`` objects or lists inside each other.
    """

    def fail(reason: str) -> NoReturn:
        raise error(f"{where}: {reason}{f'; {hint}' if hint else ''}") from None

    def constant(name: str) -> float:
        return float(name) if nan else fail(f"{name} is no JSON number")

    def number(digits: str) -> float:
        value = float(digits)
        return value if nan or math.isfinite(value) else fail(f"the number {digits:.20} is beyond the range of a float")

    try:
        content = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as bad:
        fail(f"not UTF-8 text (byte {bad.start})")
    try:
        value = json.loads(content, object_pairs_hook=_once, parse_constant=constant, parse_float=number)
    except json.JSONDecodeError as bad:
        place = f"line {bad.lineno}, column {bad.colno}" if "\n" in content.strip() else f"column {bad.colno}"
        fail(f"bad JSON at {place}: {bad.msg}" if content.strip() else "empty, where JSON should be")
    except _TwiceError as bad:
        fail(f"the key {bad.args[0]!r:.80} stands twice in one object")
    except RecursionError:
        fail(f"more than {MAX_DEPTH} objects or lists inside each other")
    except ValueError as bad:
        # Of ``fail`` above, or an integer of thousands of digits, which Python refuses to read.
        if isinstance(bad, error) and str(bad).startswith(str(where)):
            raise
        fail(f"bad JSON: {bad}")
    # Counting brackets is cheap, and settles it for almost every text.
    if content.count("{") + content.count("[") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        fail(f"more than {MAX_DEPTH} objects or lists inside each other")
    if "\\u" in content:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as bad:
            fail(f"a lone surrogate (\\u{ord(bad.object[bad.start]):04x}), which no text can hold")
    return value


def read(
    path: str | os.PathLike,
    *,
    hint: str = "",
    nan: bool = False,
    error: type[ValueError] = ValueError,
    limit: int = MAX_BYTES,
) -> dict[str, Any]:
    """The JSON object that a file holds; ``error``, as of :func:`loads`, for another value, a device, or too large a file.

    Raises ``FileNotFoundError`` where there is none.
    """
    value = loads(files.read_bytes(path, limit, error, hint), os.fspath(path), hint=hint, nan=nan, error=error)
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a JSON {type(value).__name__}"
        raise error(f"{os.fspath(path)}: holds {kind}, not an object{f'; {hint}' if hint else ''}")
    return value


class _TwiceError(Exception):
    """A key that stands twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return value


def depth(value: Any) -> int:
    """How many dicts and lists of ``value`` lie inside each other, counted without recursion; 0 of a plain value."""
    level, count = [value] if isinstance(value, dict | list) else [], 0
    while level:
        count += 1
        inner = (x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer))
        level = [x for x in inner if isinstance(x, dict | list)]
    return count


class Kind(NamedTuple):
    """A kind of value: what it is called in an error, and its test."""

    name: str
    test: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:  # type: ignore[override]
        return Kind(f"{self.name} or {other.name}", lambda x: self.test(x) or other.test(x))


# Not isinstance, to which True is an integer.
def _whole(x: Any) -> bool:
    return type(x) is int


def _number(x: Any) -> bool:
    # An integer of hundreds of digits is beyond a float.
    return type(x) in (int, float) and abs(x) < 1e300


NULL = Kind("null", lambda x: x is None)
FLAG = Kind("true or false", lambda x: type(x) is bool)
TEXT = Kind("text", lambda x: isinstance(x, str))
SIZE = Kind("a whole number from 1 to 2**31 - 1", lambda x: _whole(x) and 0 < x < 2**31)
COUNT = Kind("a whole number from 0 to 2**31 - 1", lambda x: _whole(x) and 0 <= x < 2**31)
NUMBER = Kind("a finite number", _number)
POSITIVE = Kind("a finite number above 0", lambda x: _number(x) and x > 0)
FRACTION = Kind("a number above 0 and up to 1", lambda x: _number(x) and 0 < x <= 1)
OBJECT = Kind("an object", lambda x: isinstance(x, dict))


def listed(kind: Kind) -> Kind:
    """The kind of lists of values of a kind."""
    return Kind(f"a list, each {kind.name}", lambda x: isinstance(x, list) and all(map(kind.test, x)))


def check(
    value: Mapping[str, Any], schema: Mapping[str, Kind], where: object, error: type[ValueError] = ValueError
) -> None:
    """``error``, naming ``where``, key and value, for an entry that is not of the kind its schema says; others may be there."""
    for key, kind in schema.items():
        if key in value and not kind.test(value[key]):
            raise error(f"{where}: {key} is {value[key]!r:.60}; it must be {kind.name}")


def need(
    value: Any, schema: Mapping[str, Kind], where: object, error: type[ValueError] = ValueError, hint: str = ""
) -> None:
    """:func:`check`, and ``error`` where ``value`` is no object or lacks a key of the schema."""
    end = f"; {hint}" if hint else ""
    if not isinstance(value, Mapping):
        raise error(f"{where}: {value!r:.60} is no object{end}")
    missing = [key for key in schema if key not in value]
    if missing:
        raise error(f"{where}: lacks {missing[0]!r}{end}")
    try:
        check(value, schema, where, error)
    except error as bad:
        raise error(f"{bad}{end}") from None
