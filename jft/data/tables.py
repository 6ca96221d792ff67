"""JSONL and CSV files as sources, read by byte offset: memory holds one offset a record, never the records."""

from __future__ import annotations

import csv
import glob
import io
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jft import strict_json
from jft.data.errors import DataError, shorten
from jft.data.source import Source
from jft.files import check_regular

MAX_RECORD = 64 * 2**20
"""Bytes of a line of JSONL, or a row of CSV: a longer one is mostly a file of another kind, and would fill the memory."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def find_files(files: str | os.PathLike | list | tuple) -> list[str]:
    """The files named by one path, one glob (``data/*.jsonl``, ``**`` for any depth) or a list of them, sorted per glob.

    Raises :class:`DataError` where one names nothing, a directory, or a compressed file.
    """
    entries = [files] if isinstance(files, str | os.PathLike) else list(files)
    matches: list[str] = []
    for entry in entries:
        pattern = os.fspath(entry)
        hits = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not hits:
            raise DataError(f"no file matches {pattern!r} (looked from {Path.cwd().name}/, the working directory)")
        matches += hits
    if not matches:
        raise DataError("files: an empty list names no file")
    for file in matches:
        if os.path.isdir(file):
            raise DataError(f"{file} is a directory; name its files, as {os.path.join(file, '*')!r}")
        check_regular(file, DataError)
        if file.endswith(_COMPRESSED):
            raise DataError(f"{file} is compressed, and cannot be read by offset; decompress it first")
    return matches


class _Records(Source):
    """Records at known byte ranges of some files; subclasses find the ranges and parse one."""

    def __init__(self, files: str | os.PathLike | list | tuple):
        self.files = find_files(files)
        self.name = self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"
        # Eight bytes a number, where a list of integers would take several times that.
        columns = array("q"), array("q"), array("q"), array("q")
        for number, file in enumerate(self.files):
            before = len(columns[0])
            with open(file, "rb") as stream:
                for entry in self._ranges(stream, number):
                    for column, value in zip(columns, (number, *entry), strict=True):
                        column.append(value)
            if len(columns[0]) == before:
                raise DataError(f"{file}: the file holds no records")
        self.file, self.start, self.stop, self.line = (np.frombuffer(c, np.int64) for c in columns)

    def _ranges(self, stream: io.BufferedReader, number: int) -> Iterator[tuple[int, int, int]]:
        """(first byte, byte after the last, line number) of each record."""
        raise TypeError(f"{type(self).__name__} reads no format")

    def _parse(self, raw: bytes, index: int) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} reads no format")

    def __len__(self) -> int:
        return len(self.start)

    def where(self, index: int) -> str:
        return f"{self.files[self.file[index]]}:{self.line[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop = int(self.start[index]), int(self.stop[index])
        # Opened for each read: sources are pickled for workers, and threads must not share a position.
        with open(self.files[self.file[index]], "rb", buffering=0) as stream:
            stream.seek(start)
            raw = stream.read(stop - start)
        if len(raw) != stop - start:
            raise DataError(f"{self.where(index)}: the file became shorter while in use")
        return self._parse(raw, index)

    def _text(self, raw: bytes, index: int) -> str:
        try:
            # A byte order mark can be at the start of a file only.
            return raw.decode("utf-8-sig" if self.start[index] == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(index)}: not UTF-8 text ({error.reason}); convert the file") from None


def _check_size(size: int, file: str, line: int) -> None:
    if size > MAX_RECORD:
        raise DataError(f"{file}:{line}: a record of more than {MAX_RECORD // 2**20} MiB; is it one record a line?")


class Jsonl(_Records):
    """JSON Lines: one JSON object a line, of 64 MiB at most; blank lines are skipped.

    files: a path, a glob, or a list of them. Raises :class:`DataError` naming file and line for a line that is not a
    JSON object, and for a missing or empty file.
    """

    def _ranges(self, stream: io.BufferedReader, number: int) -> Iterator[tuple[int, int, int]]:
        start = 0
        # One byte more than a record may have, to see that it has.
        for line, raw in enumerate(iter(lambda: stream.readline(MAX_RECORD + 1), b""), 1):
            _check_size(len(raw), self.files[number], line)
            if raw.strip():
                yield start, start + len(raw), line
            start += len(raw)

    def _parse(self, raw: bytes, index: int) -> dict[str, Any]:
        text = self._text(raw, index)
        try:
            record = strict_json.loads(text, self.where(index), error=DataError)
        except DataError as error:
            whole = "; a file that is one array is source 'json'" if text.lstrip().startswith("[") else ""
            raise DataError(f"{error}, in {shorten(text.strip())}{whole}") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{self.where(index)}: a line must hold a JSON object {{...}}, got {type(record).__name__}"
                f" {shorten(record)}"
                + ("; a file that is one array is source 'json'" if isinstance(record, list) else "")
            )
        return record


class Csv(_Records):
    """Comma-separated values with a header row; quoted fields may hold commas, quotes ("") and line breaks.

    A row has 64 MiB at most and a field 131,072 characters (``csv.field_size_limit`` raises that). Every value is a string.
    separator: one character. Files must share one header. Raises :class:`DataError` naming file and line for a row of another
    width, an unclosed quote, a repeated column name, a missing or empty file.
    """

    def __init__(self, files: str | os.PathLike | list | tuple, separator: str = ","):
        if not isinstance(separator, str) or len(separator) != 1:
            raise DataError(f"csv: separator must be one character, got {separator!r}")
        self.separator = separator
        self.header: list[str] = []
        super().__init__(files)

    def _ranges(self, stream: io.BufferedReader, number: int) -> Iterator[tuple[int, int, int]]:
        rows = self._rows(stream, self.files[number])
        first = next(rows, None)
        if first is None:
            return
        position = stream.tell()
        stream.seek(first[0])
        where = f"{self.files[number]}:{first[2]}"
        try:
            header = self._split(stream.read(first[1] - first[0]).decode("utf-8-sig"), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 text ({error.reason}); convert the file") from None
        # ``_rows`` is in the middle of the stream.
        stream.seek(position)
        if len(set(header)) != len(header):
            raise DataError(f"{self.files[number]}:{first[2]}: a column name stands twice in the header {header}")
        if self.header and header != self.header:
            raise DataError(
                f"{self.files[number]}:{first[2]}: header {header} differs from the first file's {self.header}"
            )
        self.header = header
        yield from rows

    @staticmethod
    def _rows(stream: io.BufferedReader, file: str) -> Iterator[tuple[int, int, int]]:
        # A row ends at a line end outside quotes; an escaped quote ("") counts twice and so changes nothing.
        start, position, first_line, quotes, line = 0, 0, 1, 0, 0
        while raw := stream.readline(MAX_RECORD + 1):
            line += 1
            position += len(raw)
            _check_size(position - start, file, first_line)
            quotes += raw.count(b'"')
            if quotes % 2:
                continue
            # A blank line is no row, unless it ends a quoted field.
            if raw.strip() or position - start > len(raw):
                yield start, position, first_line
            start, first_line, quotes = position, line + 1, 0
        if quotes % 2:
            raise DataError(f"{file}:{first_line}: a quote opened in this row is never closed")

    def _split(self, text: str, where: str) -> list[str]:
        try:
            # newline="": the csv module reads line breaks inside quotes itself.
            return next(csv.reader(io.StringIO(text, newline=""), delimiter=self.separator), [])
        except csv.Error as error:
            raise DataError(f"{where}: bad CSV: {error}; JSONL takes longer fields, or csv.field_size_limit") from None

    def _parse(self, raw: bytes, index: int) -> dict[str, Any]:
        values = self._split(self._text(raw, index), self.where(index))
        if len(values) != len(self.header):
            raise DataError(
                f"{self.where(index)}: {len(values)} values for the {len(self.header)} columns {self.header}:"
                f" {shorten(values)}"
            )
        return dict(zip(self.header, values, strict=True))
