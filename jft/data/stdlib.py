"""`stdlib`: the text of the running Python's own library, a corpus that every machine has."""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jft.data.errors import DataError, choose
from jft.data.source import Source

KINDS = ("source", "docstrings", "docs")
SPLITS = ("train", "validation", "test", "all")
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "config", "pydoc_data"}


def split_of(name: str) -> str:
    """The split of a module or topic, by a hash of its name: 90% train, 5% validation, 5% test, in every Python."""
    # Not hash(), which is another one in every process.
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def _modules(split: str) -> list[tuple[str, Path]]:
    """(path relative to the library, file), sorted; tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        excluded = any(part in _EXCLUDED or part.startswith(("config-", "test_")) for part in relative.parts)
        if not excluded and split in ("all", split_of(relative.as_posix())):
            modules.append((relative.as_posix(), file))
    return sorted(modules)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _docstrings_of(name: str, file: Path) -> Iterator[dict[str, str]]:
    """One record for each documented module, class and function of a file."""
    source = _read(file)
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return
    lines = source.splitlines()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(module):
        if not isinstance(node, kinds) or not (text := ast.get_docstring(node)):
            continue
        # A module has no signature.
        if isinstance(node, ast.Module):
            head = f"# module {name}"
        else:
            head = "\n".join(line.strip() for line in lines[node.lineno - 1 : node.body[0].lineno - 1])
        yield {"text": text, "prompt": head, "response": text, "path": name}


@functools.lru_cache(maxsize=8)
def _docstrings(split: str) -> tuple[dict[str, str], ...]:
    return tuple(record for name, file in _modules(split) for record in _docstrings_of(name, file))


def _topics(split: str) -> tuple[dict[str, str], ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("stdlib: this Python ships no pydoc topics; use kind 'source' or 'docstrings'") from None
    return tuple({"text": topics[t], "path": t} for t in sorted(topics) if split in ("all", split_of(t)))


class Stdlib(Source):
    """Texts of the Python library, in a fixed order, split by module (:func:`split_of`).

    kind "source": one record a module, ``{"text", "path"}``, read at each access.
    kind "docstrings": one record a documented module, class or function: ``text``; also ``prompt`` (its signature) and
    ``response`` (the docstring), for prompt-response training. kind "docs": the language reference that ``help()`` shows.
    What it holds depends on the Python version. Raises :class:`DataError` for an unknown kind or split.
    """

    def __init__(self, kind: str = "source", split: str = "train"):
        choose(kind, KINDS, "stdlib: kind")
        choose(split, SPLITS, "stdlib: split")
        self.name = f"stdlib ({kind}, {split})"
        self.files: list[tuple[str, Path]] = []
        self.records: tuple[dict[str, str], ...] = ()
        if kind == "source":
            # Empty files, mostly ``__init__.py``, have nothing to train on.
            self.files = [(name, file) for name, file in _modules(split) if file.stat().st_size > 0]
        else:
            self.records = _docstrings(split) if kind == "docstrings" else _topics(split)
        if not len(self):
            raise DataError(f"{self.name}: this Python's library holds no such text")

    def __len__(self) -> int:
        return len(self.files) or len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.files:
            return dict(self.records[index])
        name, file = self.files[index]
        return {"text": _read(file), "path": name}

    def where(self, index: int) -> str:
        return f"{self.name}, {self[index]['path']}"
