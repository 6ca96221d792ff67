"""Tables of sources: written linear by linear and norm by norm, or from the names of modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jft.models.decoder import DecoderConfig
from jft.models.hf.mapping import Source, identity, transposed

_LEAVES = {"w": "weight", "b": "bias", "scale": "weight", "bias": "bias", "table": "weight"}


class Sources:
    """Collects ``{path: Source}`` in `table_of`.

    prefixes: every tensor stands under the first, or, in some checkpoints, under one of the others. ``old_norms``: norms
    may be called ``gamma`` and ``beta``, as in checkpoints converted from TensorFlow.
    """

    def __init__(self, prefixes: tuple[str, ...] = ("",), old_norms: bool = False):
        self.prefixes = prefixes
        self.old_norms = old_norms
        self.table_of: dict[str, Source] = {}

    def leaf(self, path: str, name: str, shape: tuple[int, ...], *others: str, **options: Any) -> None:
        """One leaf under ``name``, or one of ``others``, with each of the prefixes."""
        # Saving writes the first of them.
        first, *aliases = (prefix + n for n in (name, *others) for prefix in self.prefixes)
        self.table_of[path] = Source(first, shape, aliases=tuple(aliases), **options)

    def table(self, path: str, name: str, rows: int, width: int) -> None:
        """An embedding."""
        self.leaf(f"{path}/table", f"{name}.weight", (rows, width))

    def linear(self, path: str, name: str, rows: int, columns: int, bias: bool = True) -> None:
        """A torch ``Linear`` from ``rows`` inputs to ``columns`` outputs."""
        self.leaf(f"{path}/w", f"{name}.weight", (columns, rows), view=transposed)
        if bias:
            self.leaf(f"{path}/b", f"{name}.bias", (columns,))

    def norm(self, path: str, name: str, width: int, bias: bool = True) -> None:
        """A layer norm, or an rms norm without bias."""
        self.leaf(f"{path}/scale", f"{name}.weight", (width,), *((f"{name}.gamma",) if self.old_norms else ()))
        if bias:
            self.leaf(f"{path}/bias", f"{name}.bias", (width,), *((f"{name}.beta",) if self.old_norms else ()))

    def block(
        self, path: str, name: str, names: Mapping[str, str], width: int, hidden: int, qkv_bias: bool = True
    ) -> None:
        """The layers of :func:`jft.models.blocks.stack`: ``names`` says how each part is called under ``name``."""
        for part in ("attn/q", "attn/k", "attn/v", "attn/o"):
            bias = qkv_bias or part == "attn/o"
            self.linear(f"{path}/{part}", f"{name}.{names[part]}", width, width, bias)
        self.linear(f"{path}/mlp/up", f"{name}.{names['mlp/up']}", width, hidden)
        self.linear(f"{path}/mlp/down", f"{name}.{names['mlp/down']}", hidden, width)
        for part in ("attn_norm", "mlp_norm"):
            self.norm(f"{path}/{part}", f"{name}.{names[part]}", width)


def sources(config: DecoderConfig, names: Mapping[str, str], prefixes: tuple[str, ...]) -> dict[str, Source]:
    """A `Source` per parameter: ``names`` map module paths (``layers/attn/q``) to Hugging Face modules.

    A name is taken with each prefix in turn (the first when saving), or as it is if it starts with ``=``.
    """
    table = {}
    for path, shape in config.shapes().items():
        module, leaf = path.rsplit("/", 1)
        # Fused modules have no name of their own here: the family's table adds them.
        if module not in names:
            continue
        name = f"{names[module]}.{_LEAVES[leaf]}"
        spellings = (name[1:],) if name.startswith("=") else tuple(prefix + name for prefix in prefixes)
        tensor_shape = shape[name.count("{layer}") + name.count("{expert}") :]
        shape, view = (tensor_shape[::-1], transposed) if leaf == "w" else (tensor_shape, identity)
        table[path] = Source(spellings[0], shape, view, spellings[1:])
    return table


def present(suffix: str, field: str, absent: bool = False) -> Callable[[Any, frozenset[str]], Any]:
    """A `Family.refine` that sets the config's ``field`` to whether a tensor whose name ends in ``suffix`` is there.

    ``absent``: to whether it is not.
    """

    def refine(config: Any, names: frozenset[str]) -> Any:
        return dataclasses.replace(config, **{field: any(name.endswith(suffix) for name in names) != absent})

    return refine
