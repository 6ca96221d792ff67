"""`Source`: a random-access table of records, and views that keep some of its rows.

A record is a dict of field name to value. Sources are picklable (worker processes reopen them) and hold no record in
memory that they can read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft.data.errors import DataError, hint

# The seed of every fixed choice of rows (held-out part, few-shot, limit). Changing it would change published splits.
SPLIT_SEED = 0


class Source:
    """A random-access table: ``len(source)`` records, ``source[i]`` a dict; ``name`` is its origin, for messages."""

    name: str = "source"

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no length")

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} has no items")

    def where(self, index: int) -> str:
        """The place of record ``index``, for messages: ``file.jsonl:12``."""
        return f"{self.name}, example {index}"

    def class_names(self, field: str) -> tuple[str, ...] | None:
        """Names of the classes of a label field where the source knows them, else None."""
        return None

    def column(self, field: str) -> Sequence[Any]:
        """All values of one field; sources that can read it cheaply override this."""
        return [field_of(self, i, field) for i in range(len(self))]


def field_of(source: Source, index: int, field: str, record: Mapping[str, Any] | None = None) -> Any:
    """``source[index][field]``; a missing field is a :class:`DataError` naming place and nearest field."""
    record = source[index] if record is None else record
    if field not in record:
        raise DataError(f"{source.where(index)}: no field {field!r}.{hint(field, record)}")
    return record[field]


# Rows and bytes that a fingerprint reads: a fraction of a second for text, a second for images.
FINGERPRINT_ROWS, FINGERPRINT_BYTES = 2**14, 2**26


def _bytes(value: Any) -> bytes:
    """A value of a record as bytes, equal for equal values only."""
    if isinstance(value, Mapping):
        return b"".join(repr(k).encode() + _bytes(value[k]) for k in sorted(value, key=str)) + b"}"
    if isinstance(value, np.ndarray) or hasattr(value, "tobytes"):
        array = np.asarray(value)
        return f"{array.dtype} {array.shape}".encode() + array.tobytes()
    # A lone surrogate of a file has no UTF-8.
    return repr(value).encode("utf-8", "surrogatepass") + b";"


def fingerprint(source: Source) -> str:
    """SHA-256, as hex, of a source's content and order: the number of rows, and rows at even distances with their values.

    All rows of up to ``FINGERPRINT_ROWS``, or as many as ``FINGERPRINT_BYTES`` hold by the size of the first; of a larger
    source that many, so that a change of a single row may go unnoticed there, and another order or another length does not.
    """
    count = len(source)
    digest = hashlib.sha256(str(count).encode())
    if count:
        size = max(1, len(_bytes(source[0])))
        rows = min(count, FINGERPRINT_ROWS, max(64, FINGERPRINT_BYTES // size))
        # The first and the last row are among them.
        for index in np.linspace(0, count - 1, rows).round().astype(np.int64):
            digest.update(_bytes(source[int(index)]))
    return digest.hexdigest()


class View(Source):
    """Some rows of a source, in a given order."""

    def __init__(self, source: Source, rows: np.ndarray):
        self.source, self.rows, self.name = source, np.asarray(rows, np.int64), source.name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.rows[index])]

    def where(self, index: int) -> str:
        return self.source.where(int(self.rows[index]))

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return self.source.class_names(field)

    def column(self, field: str) -> Sequence[Any]:
        values = self.source.column(field)
        return [values[i] for i in self.rows]


def _order(source: Source) -> np.ndarray:
    # RandomState's stream is frozen by NumPy's compatibility policy; Generator's is not.
    return np.random.RandomState(SPLIT_SEED).permutation(len(source))


def held_out(source: Source, fraction: float, keep: bool) -> Source:
    """A fixed random ``fraction`` of the rows (``keep``), or the other rows; both in the source's order.

    The "Val" data sets of task arithmetic (Ilharco et al. 2023, arXiv 2212.04089) are 10% of the training split held
    out this way. Raises :class:`DataError` for a fraction outside (0, 1) or where a part would be empty.
    """
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise DataError(f"a held-out fraction must lie between 0 and 1, got {fraction!r}")
    count = round(len(source) * fraction)
    if not 0 < count < len(source):
        raise DataError(f"{source.name}: holding out {fraction} of {len(source)} examples leaves one part empty")
    order = _order(source)
    return View(source, np.sort(order[:count] if keep else order[count:]))


def limited(source: Source, limit: int) -> Source:
    """``limit`` rows (all, if there are fewer) drawn by a fixed seed, in the source's order.

    A larger limit holds a smaller one's rows. Raises :class:`DataError` for a limit below 1.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise DataError(f"limit must be a whole number of examples, at least 1, got {limit!r}")
    return View(source, np.sort(_order(source)[:limit]))


def few_shot(source: Source, shots: int, field: str) -> Source:
    """``shots`` rows of each class of ``field``, drawn by a fixed seed; a class with fewer rows is refused."""
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise DataError(f"shots must be a whole number of examples per class, at least 1, got {shots!r}")
    labels = source.column(field)
    by_class: dict[Any, list[int]] = {}
    for row in _order(source):
        rows = by_class.setdefault(labels[row], [])
        if len(rows) < shots:
            rows.append(int(row))
    for label, rows in by_class.items():
        if len(rows) < shots:
            raise DataError(f"{source.name}: class {label!r} has {len(rows)} examples, fewer than shots={shots}")
    return View(source, np.sort(np.concatenate([np.asarray(r) for r in by_class.values()])))
