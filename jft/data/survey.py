"""`survey`: a pass over all records before training, which finds what would stop it later, and counts tokens and rows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jft.data import buckets
from jft.data.errors import DataError

if TYPE_CHECKING:
    from jft.data.loader import Loader

SHOWN = 3
"""Records that an error names."""
ENOUGH = 1000
"""Records that cannot be used, after which no more are looked for."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a pass over the records found.

    records: all there are; seen: those looked at. dropped, truncated: of those seen. tokens: without padding, of those kept;
    positions: with it, as they are padded to their buckets (0: packed, or no text). highest: the largest token id, -1 for none.
    """

    records: int
    seen: int
    dropped: int = 0
    truncated: int = 0
    tokens: int = 0
    longest: tuple[int, ...] = ()
    positions: int = 0
    highest: int = -1
    seconds: float = 0.0

    @property
    def padding(self) -> float:
        """The share of padding in rows of the buckets."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    def text(self, name: str, loader: Loader) -> str:
        """One line: ``data: 600 records, 13.1 tokens each, at most 24; 2 dropped, 3 truncated; rows of 16, 128 ...``."""
        parts = [f"{self.records:,} records"]
        if self.seen < self.records:
            parts[0] += (
                f", {self.seen:,} looked at in {self.seconds:.0f} s (check_data), the rest as training reads them"
            )
        kept = self.seen - self.dropped
        if self.longest and kept:
            longest = " + ".join(map(str, self.longest))
            parts[0] += f", {self.tokens / kept:.1f} tokens each, at most {longest}"
        if self.dropped or self.truncated:
            limit = " + ".join(map(str, loader.tasks[0].longest))
            cut = f"{self.truncated:,} truncated to {limit} tokens" if self.truncated else ""
            parts.append(", ".join(x for x in (f"{self.dropped:,} dropped" if self.dropped else "", cut) if x))
        if self.positions:
            rows = ", ".join("+".join(map(str, shape)) for shape in loader.shapes or (loader.tasks[0].longest,))
            parts.append(f"rows of {rows} tokens, {100 * self.padding:.0f}% padding")
        return f"{name}: {'; '.join(parts)}"


def _order(count: int) -> Iterator[int]:
    """All of ``range(count)``, any part of it spread over the whole."""
    # Steps of the golden ratio leave no large gap at any time, and take no memory as a permutation would.
    step = max(round(count * 0.618), 1)
    while math.gcd(step, count) > 1:
        step += 1
    return (i * step % count for i in range(count))


def survey(loader: Loader, seconds: float = math.inf) -> Survey:
    """Prepare the records of ``loader``, for at most ``seconds``; its lengths are known afterwards.

    Raises :class:`DataError` with how many cannot be used (broken lines, missing fields, labels out of range, rows that are
    too long ...), and the first of them with place and reason.
    """
    since, tasks = time.perf_counter(), loader.tasks
    rng = np.random.default_rng(0) if loader.train else None
    problems: list[str] = []
    seen, dropped, highest = 0, 0, -1
    before = [task.truncated for task in tasks]
    for number, (task, measured) in enumerate(zip(tasks, loader.measured, strict=True), 1):
        budget = since + seconds * number / len(tasks)
        for index in _order(len(task.source)):
            if len(problems) >= ENOUGH or time.perf_counter() > budget:
                break
            seen += 1
            try:
                example = task.example(index, rng)
            except DataError as error:
                problems.append(str(error))
                continue
            dropped += example is None
            if task.longest:
                measured.add(index, example)
            if example is not None and "tokens" in example:
                # Without padding, which may have any id.
                highest = max(highest, int(buckets.crop(example, buckets.lengths(example))["tokens"].max()))
    if problems:
        raise DataError(_refusal(problems, seen, loader.examples))
    truncated = sum(task.truncated for task in tasks) - sum(before)
    found = Survey(loader.examples, seen, dropped, truncated, highest=highest)
    return dataclasses.replace(found, **_lengths(loader), seconds=time.perf_counter() - since)


def _refusal(problems: list[str], seen: int, records: int) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = "; ".join(problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    of = f"{seen} looked at of {records}" if seen < records else f"{records}"
    return f"{len(problems)} records of {of} cannot be used: {shown}{more}"


def _lengths(loader: Loader) -> dict[str, Any]:
    """Tokens, positions and the longest row of the records whose lengths are known."""
    if not loader.tasks[0].longest:
        return {}
    found = np.concatenate([m.found for m in loader.measured])
    found = found[found[:, 0] > 0]
    if not len(found):
        return {}
    shapes = np.asarray(loader.shapes or (loader.tasks[0].longest,))
    positions = 0 if loader.rows.pack else int(shapes.sum(1)[buckets.fitting(found, shapes)].sum())
    return {
        "tokens": int(found.sum()),
        "longest": tuple(map(int, found.max(0))),
        "positions": positions,
    }
