"""Rows of fixed length from token sequences: one sequence a row (padded), or several (packed).

A row is ``{"tokens", "segments", "positions": int32 [T], "loss_mask": float32 [T]}``. Segments count 1, 2, ... in a row
and are 0 on padding, so that attention stays inside a sequence; positions start at 0 in each. The first token of a
segment has no context and is never a target.
"""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from jft.data.errors import choose
from jft.data.tasks import Example, padded

PACKS = ("first_fit", "concat", False)
# Rows filled side by side by first fit: more find better gaps, and cost as much memory and look-ahead.
BINS = 64


def pad(example: Example, length: int, fill: int) -> Example:
    """One sequence of at most ``length`` tokens as a row."""
    count = len(example["tokens"])
    return {
        "tokens": padded(example["tokens"], length, fill),
        "segments": padded(np.ones(count, np.int32), length),
        "positions": padded(np.arange(count, dtype=np.int32), length),
        "loss_mask": padded(example["loss_mask"], length),
    }


class _Finish:
    """Grain's packed features under this module's names, padding filled, targets off at each segment's start."""

    def __init__(self, fill: int):
        self.fill = fill

    def __call__(self, packed: dict[str, np.ndarray]) -> Example:
        segments = packed["tokens_segment_ids"].astype(np.int32)
        starts = np.diff(segments, prepend=0) != 0
        return {
            "tokens": np.where(segments > 0, packed["tokens"], self.fill).astype(np.int32),
            "segments": segments,
            "positions": packed["tokens_positions"].astype(np.int32),
            "loss_mask": np.where(starts | (segments == 0), 0, packed["loss_mask"]).astype(np.float32),
        }


def pack(sequences: Any, how: str, length: int, fill: int) -> Any:
    """A Grain iterator dataset of rows from one of ``{"tokens", "loss_mask"}`` sequences; checkpointable, deterministic.

    how: "first_fit": whole sequences, each into the first of 64 open rows with room (sequences must not exceed
    ``length``). "concat": sequences one after the other, cut at row ends; a part that starts a row is a segment of its
    own, with positions from 0, and loses its first token as a target.
    """
    choose(how, PACKS, "pack")
    lengths = {"tokens": length, "loss_mask": length}
    if how == "first_fit":
        # Not shuffled: a resumed run must get its rows in the same order.
        packed = grain.experimental.FirstFitPackIterDataset(
            sequences, length_struct=lengths, num_packing_bins=BINS, shuffle_bins=False
        )
    else:
        packed = grain.experimental.ConcatThenSplitIterDataset(sequences, length_struct=lengths)
    return packed.map(_Finish(fill))


def bins(lengths: np.ndarray, how: str, length: int) -> int:
    """Rows of ``length`` that sequences of these ``lengths`` fill, one after the other: what :func:`pack` makes of one pass."""
    if how == "concat":
        return int(-(-lengths.sum() // length))
    # As Grain's: a sequence goes into the first open row with room; where none has any, all rows are given out.
    room, rows = np.full(BINS, length), 0
    for need in lengths:
        if not (room >= need).any():
            rows, room = rows + BINS, np.full(BINS, length)
        room[(room >= need).argmax()] -= need
    return rows + int((room < length).sum())
