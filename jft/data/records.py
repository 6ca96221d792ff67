"""JSON arrays, Parquet files and rows in memory as sources."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft import files, strict_json
from jft.data.errors import DataError, shorten
from jft.data.source import Source
from jft.data.tables import find_files

MAX_BYTES = 2_000_000_000
"""Of a JSON file, which is read whole; larger ones are for source ``jsonl``."""


class Memory(Source):
    """Rows in memory: a sequence of mappings (a list of dicts, a `datasets` set), or a mapping of equally long columns.

    For Python: ``jft.data.build({"source": "rows", "rows": rows, "task": ...})``. Raises :class:`DataError` where there is no
    row, columns differ in length, or a row is no mapping (naming it).
    """

    name = "rows"

    def __init__(self, rows: Any):
        self.columns: dict[str, Any] | None = None
        if isinstance(rows, Mapping):
            self.columns = {str(k): v for k, v in rows.items()}
            sizes = {k: len(v) for k, v in self.columns.items()}
            if len(set(sizes.values())) > 1:
                raise DataError(f"rows: the columns differ in length: {sizes}")
            self.size = next(iter(sizes.values()), 0)
        elif hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not isinstance(rows, str | bytes):
            self.size = len(rows)
        else:
            raise DataError(f"rows must be a list of dicts, or a dict of columns, got {type(rows).__name__}")
        if not self.size:
            raise DataError("rows: there is no row")
        self.rows = rows

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.columns is not None:
            return {k: v[index] for k, v in self.columns.items()}
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise DataError(f"{self.where(index)}: a row must be a dict of fields, got {shorten(row)}")
        return dict(row)

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"


class Json(Source):
    """JSON files that hold an array of objects each, read whole; ``field``: the array is under that key of an object.

    Raises :class:`DataError` for a file that is not JSON (with line and column) or holds no such array, and for an entry that
    is no object.
    """

    def __init__(self, files: str | os.PathLike | list | tuple, field: str | None = None):
        self.files = find_files(files)
        self.name = self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"
        entries = [self._read(file, field) for file in self.files]
        self.records = [record for part in entries for record in part]
        self.stops = np.cumsum([len(part) for part in entries])

    @staticmethod
    def _read(file: str, field: str | None) -> list[Any]:
        try:
            # utf-8-sig: editors of some systems write a mark before the text.
            content = files.read_bytes(file, MAX_BYTES, DataError).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text ({error.reason}); convert the file") from None
        lines = content.lstrip().startswith("{") and "\n{" in content
        hint = "one object a line is source 'jsonl'" if lines else ""
        value = strict_json.loads(content, file, hint=hint, error=DataError)
        if field is not None and isinstance(value, Mapping):
            value = value.get(field)
        if not isinstance(value, list):
            keys = [k for k, v in value.items() if isinstance(v, list)] if isinstance(value, Mapping) else []
            way_out = f"; set field to the key that holds the array ({', '.join(keys)})" if keys else ""
            raise DataError(f"{file}: must hold an array of objects, got {type(value).__name__}{way_out}")
        if not value:
            raise DataError(f"{file}: the file holds no records")
        return value

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        if not isinstance(record, dict):
            raise DataError(f"{self.where(index)}: an entry must be an object {{...}}, got {shorten(record)}")
        return dict(record)

    def where(self, index: int) -> str:
        file = int(np.searchsorted(self.stops, index, side="right"))
        return f"{self.files[file]}, entry {index - (int(self.stops[file - 1]) if file else 0)}"


# Each thread that reads ahead may be in another row group; a row group is what Parquet reads at once.
_GROUPS = 16


@functools.lru_cache(maxsize=_GROUPS)
def _group(file: str, number: int, changed: int) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file).read_row_group(number)


class Parquet(Source):
    """Parquet files, read a row group at a time; the last few stay in memory. Names of classes as `datasets` writes them.

    Raises :class:`DataError` where pyarrow is not installed (naming the extra), for a file that is not Parquet, files whose
    columns differ, and a missing or empty file.
    """

    def __init__(self, files: str | os.PathLike | list | tuple):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError("source 'parquet' needs pyarrow: pip install 'jft[hf]'") from None
        self.files = find_files(files)
        self.name = self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"
        groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        schema: Any = None
        for number, file in enumerate(self.files):
            try:
                opened = pyarrow.parquet.ParquetFile(file)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise DataError(f"{file}: not a Parquet file: {shorten(str(error), 200)}") from None
            columns = opened.schema_arrow
            if schema is not None and columns.names != schema.names:
                raise DataError(f"{file}: columns {columns.names} differ from the first file's {schema.names}")
            schema = schema or columns
            if not opened.metadata.num_rows:
                raise DataError(f"{file}: the file holds no records")
            for group in range(opened.metadata.num_row_groups):
                groups.append((number, group))
                sizes.append(opened.metadata.row_group(group).num_rows)
        self.groups, self.stops = groups, np.cumsum(sizes)
        # A file that is written anew must not be served from memory.
        self.changed = [os.stat(file).st_mtime_ns for file in self.files]
        self.columns = list(schema.names)
        self.names = _class_names(schema.metadata)

    def __len__(self) -> int:
        return int(self.stops[-1])

    def _place(self, index: int) -> tuple[int, int, int]:
        """(file, row group, row in it)."""
        at = int(np.searchsorted(self.stops, index, side="right"))
        return *self.groups[at], index - (int(self.stops[at - 1]) if at else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, group, row = self._place(index)
        table = _group(self.files[file], group, self.changed[file])
        return {k: _picture(v, self, index) for k, v in table.slice(row, 1).to_pylist()[0].items()}

    def where(self, index: int) -> str:
        file, group, row = self._place(index)
        before = sum(
            int(stop - (self.stops[i - 1] if i else 0))
            for i, (stop, place) in enumerate(zip(self.stops, self.groups, strict=True))
            if place[0] == file and place[1] < group
        )
        return f"{self.files[file]}, row {before + row}"

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return self.names.get(field)

    def column(self, field: str) -> Sequence[Any]:
        if field not in self.columns:
            return super().column(field)
        import pyarrow.parquet

        return [x for file in self.files for x in pyarrow.parquet.read_table(file, columns=[field])[field].to_pylist()]


def _picture(value: Any, source: Source, index: int) -> Any:
    """Pixels of an encoded image, as `datasets` writes them; anything else as it is."""
    if not isinstance(value, dict) or set(value) != {"bytes", "path"} or not isinstance(value["bytes"], bytes):
        return value
    from PIL import Image

    try:
        with Image.open(io.BytesIO(value["bytes"])) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"{source.where(index)}: not a readable image: {error}") from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Class names by column from the metadata that `datasets` writes into a Parquet file."""
    try:
        features = strict_json.loads((metadata or {})[b"huggingface"], "metadata")["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {k: tuple(v["names"]) for k, v in features.items() if isinstance(v, dict) and v.get("names")}
