"""Digests of checkpoints: whether one is whole, and the newest that is.

A checkpoint's folder holds ``digest.json``, written once the checkpoint is: its step, and size and CRC-32 of every file. One
without it was written by an earlier version, or its process was killed in the moment between; only its outline is checked.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import secrets
import shutil
import zlib
from pathlib import Path

from jft import files, strict_json

NAME = "digest.json"
ORBAX = "_CHECKPOINT_METADATA"
TEMPORARY = ".orbax-checkpoint-tmp"
ASIDE = "checkpoints-damaged"
_PIECE = 1 << 20


def _of(path: Path) -> list:
    """Size in bytes and CRC-32 of a file: against damage, which it finds at a third of the time of SHA-256."""
    size, crc = path.stat().st_size, 0
    with path.open("rb") as file:
        # In pieces that stay in the cache; zlib works without the interpreter's lock, so files are read side by side.
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return [size, f"{crc:08x}"]


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != NAME)


def _digests(folder: Path, names: list[str]) -> dict[str, list]:
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _of(folder / name), names), strict=True))


def write(folder: Path, step: int) -> None:
    """Write the digest of the whole checkpoint in ``folder``."""
    content = {"step": step, "files": _digests(folder, _files(folder))}
    files.write_text(folder / NAME, json.dumps(content))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it lies on disk. damage: what is wrong with it, empty where it is whole; digested: has a digest."""

    step: int
    folder: Path
    damage: str
    digested: bool


def _damage(folder: Path, step: int) -> tuple[str, bool]:
    if not (folder / NAME).is_file():
        missing = [name for name in (ORBAX, "state", "run") if not (folder / name).exists()]
        if not missing:
            try:
                strict_json.read(folder / ORBAX, nan=True)
            except (ValueError, OSError):
                return f"{ORBAX} cannot be read", False
        return (f"it has no {', '.join(missing)}" if missing else ""), False
    try:
        content = strict_json.read(folder / NAME)
        inside, expected = content["step"], {str(k): list(v) for k, v in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{NAME} cannot be read", True
    if inside != step:
        return f"it is that of step {inside}, renamed", True
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing", True
    # Sizes first: a file that was cut is found without reading any.
    for name, (size, _) in expected.items():
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes in place of {size}", True
    try:
        now = _digests(folder, list(expected))
    except OSError as error:
        return f"it cannot be read: {error}", True
    changed = [name for name in expected if now[name] != expected[name]]
    return (f"the content of {changed[0]} has changed" if changed else ""), True


def examine(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, whose name is its step, read and compared with its digest."""
    damage, digested = _damage(folder, int(folder.name))
    return Checkpoint(int(folder.name), folder, damage, digested)


def steps(directory: Path) -> list[Path]:
    """The folders of ``directory`` that are named as checkpoints are, newest first."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name), reverse=True)


def clear(directory: Path) -> None:
    """Remove what a write that was cut short has left."""
    for path in directory.glob(f"*{TEMPORARY}*") if directory.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def set_aside(directory: Path) -> list[str]:
    """Make the newest checkpoint of ``directory`` a whole one, and clear leftovers; what to tell the user, a line each.

    Damaged ones that are newer move to ``checkpoints-damaged`` beside it: their steps are to be written again.
    """
    clear(directory)
    lines = []
    for folder in steps(directory):
        checkpoint = examine(folder)
        if not checkpoint.damage:
            if not checkpoint.digested:
                lines.append(
                    f"the checkpoint of step {checkpoint.step} has no digest, so damage to it would not be noticed"
                )
            if any(", left" in line for line in lines):
                lines.append(f"the newest whole checkpoint is that of step {checkpoint.step}")
            return lines
        target = directory.parent / ASIDE / folder.name
        if target.exists():
            target = target.with_name(f"{folder.name}-{secrets.token_hex(4)}")
        target.parent.mkdir(exist_ok=True)
        os.rename(folder, target)
        lines.append(f"the checkpoint {folder} is damaged, left and moved to {target}: {checkpoint.damage}")
    return lines if not lines else [*lines, "no whole checkpoint is there: the run starts from its beginning"]
