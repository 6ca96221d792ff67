"""Batches of several shapes as batches of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def equally_long(batches: Sequence[Any]) -> list[Any]:
    """Batches of text, each of its own bucket, with padding up to the longest; anything else as it is."""
    if not all(isinstance(batch, Mapping) and "segments" in batch for batch in batches):
        return list(batches)
    sides = [(side, f"{side}segments") for side in ("decoder_", "") if f"{side}segments" in batches[0]]
    most = {side: max(b[name].shape[1] for b in batches if name in b) for side, name in sides}

    def widened(batch: Any) -> Any:
        out = dict(batch)
        for side, name in sides:
            length = batch[name].shape[1] if name in batch else most[side]
            fields = [f"{side}{field}" for field in ("tokens", "segments", "positions", "token_types")]
            # The loss is over the decoder's tokens where there is one, which comes first.
            fields += ["loss_mask"] if side == sides[0][0] else []
            for field in (f for f in fields if f in batch):
                # Zeros: of segment 0, so that nothing else of them is read.
                out[field] = np.pad(batch[field], ((0, 0), (0, most[side] - length)))
        return out

    return [widened(batch) for batch in batches]
