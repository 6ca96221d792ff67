"""Files that are whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, beside ``path``; it becomes ``path`` when the block ends, and is removed when the block fails.

    Whoever reads ``path``, also after a crash, finds the old file or the new one. Missing parent folders are made.
    """
    path = Path(path)
    # In the same folder, because os.replace is atomic inside one file system only.
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: processes on several hosts may write the same file, and their process ids may be equal.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    # BaseException: an interrupt or an exit must not leave half a file either.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """``text`` as the UTF-8 file ``path``, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
