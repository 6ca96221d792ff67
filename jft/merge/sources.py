"""What a merge reads, as changes of the tensors of a base: model directories, peft adapters, task-vector files.

A tensor is one of the checkpoint's, by its name there; nothing is read before it is asked for, and then that tensor alone.
"""

from __future__ import annotations

import abc
import functools
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jft import files, tree
from jft.delta import Dense, LowRank, file
from jft.delta import manifest as manifests
from jft.merge import host
from jft.merge.adapters import PeftAdapter
from jft.merge.statistics import load_statistics
from jft.models import loading
from jft.models.core import Model
from jft.models.hf import config_schema, reader, registry
from jft.models.hf.checkpoint import DTYPES, Checkpoint, Entry, LoadError, read_header, read_json
from jft.models.loading import fetch
from jft.names import nearest

HEADS = ("lm_head.weight", "embed_out.weight")
"""Output heads, which a checkpoint with tied embeddings may lack."""
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")


class Source(abc.ABC):
    """A model to merge. path: where it came from. ``check`` before ``delta``."""

    path: Path

    @abc.abstractmethod
    def check(self, names: Mapping[str, Entry], base: Directory) -> None:
        """Raise ``ValueError`` where this is no change of the tensors ``names`` of ``base``."""

    @abc.abstractmethod
    def delta(self, name: str, base: np.ndarray, out: np.ndarray) -> None:
        """Write the change of ``name`` to ``out``, flat float32; ``base`` is the base's tensor, flat float32."""

    @abc.abstractmethod
    def nbytes(self, name: str) -> int:
        """Bytes read for ``name``."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hex digits that tell its files apart from others of the same name."""

    def release(self, name: str) -> None:  # noqa: B027 (most have none)
        """Give back the pages of ``name``."""


class Directory(Source):
    """A model directory, or hub id: ``config.json`` and safetensors."""

    def __init__(self, path: str | os.PathLike):
        self.path = fetch(path)
        self.checkpoint = Checkpoint(self.path)
        config = self.path / "config.json"
        self.config = read_json(config) if config.is_file() else {}
        config_schema.check_kinds(self.config, config)
        if self.config.get("quantization_config") is not None:
            raise LoadError(f"{config}: the weights are quantised; merge the checkpoint they were made from")
        #: Tensors that count as unchanged, because this model lacks them or has them in another shape.
        self.unchanged: set[str] = set()

    @property
    def entries(self) -> dict[str, Entry]:
        """Every tensor of the files."""
        return self.checkpoint.entries

    @functools.cached_property
    def buffers(self) -> re.Pattern[str]:
        """The tensors that are computed, not learned, or that no model of this type has; heads are not among them."""
        family = registry.families().get(self.config.get("model_type", ""))
        ignored = [p for p in (family.ignored if family else ()) if not any(re.fullmatch(p, head) for head in HEADS)]
        return re.compile("|".join(f"(?:{p})" for p in (*reader.BUFFERS, *ignored)))

    def tensor(self, name: str) -> str:
        """The name under which this model has the tensor ``name``: of a tied head, that of the embedding."""
        if name in self.entries or name not in HEADS or not self.config.get("tie_word_embeddings", False):
            return name
        embeddings = [n for n in self.entries if EMBEDDINGS.search(n)]
        return embeddings[0] if len(embeddings) == 1 else name

    def check(self, names: Mapping[str, Entry], base: Directory) -> None:
        """Raises for tensors one of them lacks, other shapes, another ``model_type``."""
        types = (base.config.get("model_type"), self.config.get("model_type"))
        if None not in types and types[0] != types[1]:
            raise ValueError(f"{self.path} is a {types[1]!r} model and the base {base.path} a {types[0]!r} model")
        for name, entry in names.items():
            if problem := self._problem(name, entry, base):
                raise ValueError(f"{problem}; mismatch='base' (--mismatch base) takes the base's there")
        for name in self._extra(base):
            raise ValueError(
                f"{self.path} has {name!r}, which the base {base.path} does not have; mismatch='base' leaves it out"
            )

    def tolerate(self, names: Mapping[str, Entry], base: Directory) -> list[str]:
        """Count what ``check`` refuses as unchanged, or leave it out; a remark for each tensor."""
        self.unchanged = {name for name, entry in names.items() if self._problem(name, entry, base)}
        return [f"{name} counts as unchanged in {self.path}" for name in sorted(self.unchanged)] + [
            f"{name} of {self.path} is left out" for name in self._extra(base)
        ]

    def _extra(self, base: Directory) -> list[str]:
        """Tensors that the base lacks; a head that is its embedding, and buffers, are none."""
        tied = all(d.config.get("tie_word_embeddings", False) for d in (self, base))
        extra = (n for n in self.entries if n not in base.entries and not base.buffers.fullmatch(n))
        return [n for n in extra if not (n in HEADS and tied)]

    def _problem(self, name: str, entry: Entry, base: Directory) -> str:
        here = self.entries.get(self.tensor(name))
        if here is None:
            if base.buffers.fullmatch(name):
                self.unchanged.add(name)
                return ""
            near = nearest(name, self.entries, hint="; nearest there: '{}'")
            return f"{self.path} lacks {name!r} of the base {base.path}{near}"
        if here.shape != entry.shape:
            return f"{name!r} has shape {here.shape} in {self.path} and {entry.shape} in the base {base.path}"
        return ""

    def stored(self, name: str) -> np.ndarray:
        """The tensor, flat and mapped."""
        return self.checkpoint.tensor(self.tensor(name)).reshape(-1)

    def array(self, name: str) -> np.ndarray:
        """As :meth:`stored`; ``ValueError`` for a tensor that is not floating point."""
        array = self.stored(name)
        if array.dtype.kind in "iub":
            raise ValueError(f"{name!r} in {self.path} has dtype {array.dtype}; only floating-point tensors are merged")
        return array

    def delta(self, name: str, base: np.ndarray, out: np.ndarray) -> None:
        if name in self.unchanged:
            out[...] = 0
        else:
            host.subtract(self.array(name), base, out)

    def nbytes(self, name: str) -> int:
        return 0 if name in self.unchanged else self.entries[self.tensor(name)].nbytes

    def release(self, name: str) -> None:
        if self.tensor(name) in self.entries:
            self.checkpoint.release(self.tensor(name))

    def fingerprint(self) -> str:
        return files.fingerprint({entry.file for entry in self.entries.values()} | {self.path / "config.json"})


class Adapter(Source):
    """A peft adapter directory (LoRA), as a change of the base; ``on``: of another model, whose own change is added."""

    def __init__(self, path: str | os.PathLike, on: Directory | None = None):
        self.adapter = PeftAdapter(Path(path).expanduser())
        self.path, self.on = self.adapter.directory, on
        self.modules: dict[str, str] = {}

    def check(self, names: Mapping[str, Entry], base: Directory) -> None:
        if self.on is not None:
            self.on.check(names, base)
        self.modules = self.adapter.bind({name: entry.shape for name, entry in names.items()}, base.path)

    def delta(self, name: str, base: np.ndarray, out: np.ndarray) -> None:
        out[...] = 0
        if self.on is not None:
            self.on.delta(name, base, out)
        if name in self.modules:
            # What peft saved in full (modules_to_save) stands in place of the weight.
            self.adapter.add(self.modules[name], base, out)

    def nbytes(self, name: str) -> int:
        own = self.adapter.nbytes(self.modules[name]) if name in self.modules else 0
        return own + (self.on.nbytes(name) if self.on else 0)

    def release(self, name: str) -> None:
        if self.on is not None:
            self.on.release(name)

    def fingerprint(self) -> str:
        return files.fingerprint(set(self.adapter.files)) + (f"+{self.on.fingerprint()}" if self.on else "")


class VectorFile(Source):
    """A jft task-vector file: its paths go to the checkpoint's tensors by the tables of the model's family.

    Dense, low-rank and entry-wise deltas are cut to one layer before they become dense; others become dense a path at a time.
    Masks and gates are refused: ``tau.resolve(base)`` first. verify: check the base's checksums, which reads it once, a
    parameter (a stack of layers) at a time.
    """

    def __init__(self, path: str | os.PathLike, verify: bool = True):
        self.path, self.verify = Path(path), verify
        self.header = file.inspect(path)
        self.arrays = read_header(self.path)
        self.parts: dict[str, list[tuple[reader.Leaf, tuple[int, ...]]]] = {}
        self.lock = threading.Lock()
        self.read = functools.lru_cache(maxsize=16)(lambda p: file.read(self.path, [p])[0][p])

    def check(self, names: Mapping[str, Entry], base: Directory) -> None:
        # Layers of dense deltas are read past `file.read`, which looks at checksums and for what is not finite.
        file.verify(self.path)
        table, shapes = _table(base)
        known = self.header.manifest.get("base", {}).get("leaves", {}) if self.verify else {}
        for path in self.header.entries:
            if path not in table:
                raise ValueError(f"{self.path} changes {path!r}, which {base.path} does not have{nearest(path, table)}")
        for path in dict.fromkeys([*self.header.entries, *(p for p in known if p in table)]):
            leaf = reader.bind(base.checkpoint, path, table[path], shapes[path])
            if path in known:
                self._verify(base, leaf, *known[path])
            if path not in self.header.entries:
                continue
            if self.header.entries[path].shape != leaf.shape:
                raise ValueError(
                    f"{path!r} has shape {self.header.entries[path].shape} in {self.path}, {leaf.shape} in {base.path}"
                )
            for position, name in leaf.names.items():
                self.parts.setdefault(name, []).append((leaf, position))

    def _verify(self, base: Directory, leaf: reader.Leaf, checksum: str, _: int, dtype: str) -> None:
        value = reader.read(base.checkpoint, leaf, tuple(slice(None) for _ in leaf.shape), np.dtype(dtype))
        if tree.checksums({leaf.path: value})[leaf.path] != checksum:
            raise manifests.BaseMismatch(
                f"{base.path} is not the base of {self.path}: {leaf.path!r} differs (read as {dtype}); "
                "give the base it was made from, or check=False (--no-check) to go on"
            )

    def delta(self, name: str, base: np.ndarray, out: np.ndarray) -> None:
        out[...] = 0
        for leaf, position in self.parts.get(name, ()):
            view = leaf.source.view(out.reshape(leaf.source.shape))
            view[...] = self._layer(leaf, position).reshape(view.shape)

    def _layer(self, leaf: reader.Leaf, position: tuple[int, ...]) -> np.ndarray:
        shape = leaf.shape[len(position) :]
        entry = self.arrays.get(f"{leaf.path}|value")
        if self.header.entries[leaf.path].kind == Dense.kind and entry is not None:
            dtype, count = DTYPES[entry.dtype], int(np.prod(shape))
            index = int(np.ravel_multi_index(position, leaf.shape[: len(position)])) if position else 0
            with self.path.open("rb") as handle:
                handle.seek(entry.start + index * count * dtype.itemsize)
                return host.widen(np.frombuffer(handle.read(count * dtype.itemsize), dtype)).reshape(shape)
        with self.lock:
            change = self.read(leaf.path)
        if change.relative:
            raise ValueError(f"{leaf.path!r} of {self.path} depends on its base; save tau.resolve(base) instead")
        if isinstance(change, LowRank) and change.a.ndim == len(position) + 2:
            return np.asarray(LowRank(change.a[position], change.b[position]).dense())
        coordinates = change.coordinates()
        if coordinates is None:
            return np.asarray(change.dense())[position]
        rows, columns, values = (np.asarray(x) for x in coordinates)
        out = np.zeros((int(np.prod(shape[:-1])), shape[-1] if shape else 1), np.float32)
        first = len(out) * (int(np.ravel_multi_index(position, leaf.shape[: len(position)])) if position else 0)
        here = (rows >= first) & (rows < first + len(out))
        np.add.at(out, (rows[here] - first, columns[here]), values[here].astype(np.float32))
        return out.reshape(shape)

    def nbytes(self, name: str) -> int:
        parts = self.parts.get(name, ())
        return sum(self.header.entries[leaf.path].nbytes // max(1, len(leaf.names)) for leaf, _ in parts)

    def fingerprint(self) -> str:
        return files.fingerprint({self.path})


class Piece(NamedTuple):
    """The part of a checkpoint's tensor that belongs to one leaf of jft, at a position of its stack."""

    leaf: reader.Leaf
    position: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """In jft: a matrix or vector, or several where the checkpoint has all experts in one tensor."""
        return self.leaf.shape[len(self.position) :]

    def read(self, flat: np.ndarray) -> np.ndarray:
        """It, from the flat tensor."""
        return self._view(flat).reshape(self.shape)

    def write(self, value: np.ndarray, flat: np.ndarray) -> None:
        """It, into the flat tensor."""
        view = self._view(flat)
        view[...] = value.reshape(view.shape)

    def _view(self, flat: np.ndarray) -> np.ndarray:
        return self.leaf.source.view(flat.reshape(self.leaf.source.shape))


class StatisticsFile:
    """A file of statistics, cut to the tensors of checkpoints like ``base``."""

    def __init__(self, path: str | os.PathLike, base: Directory):
        self.path = Path(path).expanduser()
        self.values = load_statistics(self.path)
        self.pieces: dict[str, list[Piece]] = {}
        table, shapes = _table(base)
        for weight, value in self.values.items():
            if weight not in table:
                raise ValueError(
                    f"{self.path} is of {weight!r}, which {base.path} does not have{nearest(weight, table)}"
                )
            leaf = reader.bind(base.checkpoint, weight, table[weight], shapes[weight])
            stack = leaf.shape[: leaf.stacked]
            for x in value.values() if isinstance(value, dict) else (value,):
                if x.shape[: len(stack)] != stack:
                    raise ValueError(
                        f"statistics of {weight!r} in {self.path} have shape {x.shape}, and must begin with {stack}"
                    )
            for position, name in leaf.names.items():
                self.pieces.setdefault(name, []).append(Piece(leaf, position))

    def of(self, piece: Piece) -> Any:
        """The statistics of a piece, float32: a pytree of arrays."""
        cut = lambda x: np.asarray(x[piece.position], np.float32)
        value = self.values[piece.leaf.path]
        return {name: cut(x) for name, x in value.items()} if isinstance(value, dict) else cut(value)

    def fingerprint(self) -> str:
        """A digest of the file."""
        return files.fingerprint({self.path})


def _table(base: Directory) -> tuple[Mapping[str, Any], dict[str, tuple[int, ...]]]:
    """Where the leaves of jft are in a checkpoint, and their shapes."""
    family = registry.family_of(base.config, base.path / "config.json")
    config = loading.backbone(family, base.config, base.checkpoint)
    shapes = {path: tuple(x.shape) for path, x in tree.flatten(Model(config).abstract()).items()}
    return family.table(config), shapes


def open_source(reference: str, base: Directory | None, check: bool = True) -> Source:
    """``DIR`` or hub id, an adapter ``DIR``, ``MODEL+ADAPTER``, or a task-vector file, as a source.

    base: the base of the merge; a ``MODEL`` that is the base itself is not read twice. check: verify bases of task vectors.
    """
    model, plus, adapter = reference.partition("+")
    if plus and not Path(reference).exists():
        directory = Directory(model)
        on = None if base is not None and directory.path.resolve() == base.path.resolve() else directory
        return Adapter(adapter, on)
    path = Path(reference).expanduser()
    if path.is_file():
        return VectorFile(path, check)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return Adapter(path)
    return Directory(reference)
