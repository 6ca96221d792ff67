"""Names that were meant: the hint in an error about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(
    word: object,
    known: Iterable[object],
    n: int = 1,
    cutoff: float = 0.6,
    hint: str = " (did you mean '{}'?)",
    otherwise: str = "",
) -> str:
    """``" (did you mean 'train'?)"``: ``hint`` with the known words nearest to ``word``; ``otherwise`` where none is near.

    n: words at the most, nearest first, joined by commas. cutoff: how alike they must be, of 0 (any will do) to 1 (equal).
    """
    # str: keys of a user's file may be numbers or None, which difflib refuses.
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=n, cutoff=cutoff)
    return hint.format(", ".join(close)) if close else otherwise
