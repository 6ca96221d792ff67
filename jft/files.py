"""Files written whole or not at all, and read within bounds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PROBES = 32  # slices of a file that a fingerprint reads


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


def fingerprint(paths: Iterable[Path]) -> str:
    """32 hex digits over names, sizes and :data:`PROBES` slices of the files among ``paths``: a large one is not read whole."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as handle:
            for start in range(0, size, max(1 << 16, size // PROBES)):
                handle.seek(start)
                digest.update(handle.read(1 << 16))
    return digest.hexdigest()[:32]


def check_regular(path: str | os.PathLike, error: type[ValueError] = ValueError) -> os.stat_result:
    """Its status; ``error`` for what is not a regular file or a link to one: a pipe or device would never end.

    Raises ``FileNotFoundError`` where there is nothing.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise error(f"{os.fspath(path)} is {what}, not a file")
    return status


def read_bytes(path: str | os.PathLike, limit: int, error: type[ValueError] = ValueError, hint: str = "") -> bytes:
    """What a regular file holds; ``error`` for another, or one of more than ``limit`` bytes, with ``hint`` as a way out."""
    size = check_regular(path, error).st_size
    if size > limit:
        end = f"; {hint}" if hint else ""
        raise error(f"{os.fspath(path)}: {size:,} bytes, where {limit:,} at most are read{end}")
    return Path(path).read_bytes()


def read_text(path: str | os.PathLike, limit: int, error: type[ValueError] = ValueError) -> str:
    """The UTF-8 text of a file, as :func:`read_bytes`."""
    try:
        return read_bytes(path, limit, error).decode("utf-8")
    except UnicodeDecodeError as bad:
        raise error(f"{os.fspath(path)}: not UTF-8 text (byte {bad.start}); convert the file") from None


def read_npz(path: str | os.PathLike) -> dict[str, Any]:
    """The arrays of a NumPy ``.npz`` file by name; ``ValueError`` naming it for another file. Pickled objects are refused."""
    import numpy as np

    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    # Of damaged archives zipfile, zlib and NumPy raise errors of their own; of a single array there is no ``files``.
    except (ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{os.fspath(path)} is no whole .npz file: {error}") from None


def check_name(name: object, what: str, error: type[ValueError] = ValueError) -> str:
    """``name``, which becomes that of a folder; ``error`` where it would lead out of the one it is made in, or is none."""
    good = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not {"/", "\\"} & set(name)
    # File systems allow 255 bytes, of which suffixes take some.
    if not good or len(os.fsencode(str(name))) > 200:
        raise error(f"{what} is {name!r:.80}, which cannot be the name of its folder")
    return str(name)
