"""What a run prints before it starts: the weights and what trains of them, and the first example as the model sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jft import terminal, tree
from jft.data.display import marked
from jft.methods import Plan


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight: how it lies and how many of its values train."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    trains: int

    @property
    def density(self) -> float:
        """Values that train, of values there are."""
        return self.trains / max(int(np.prod(self.shape)), 1)


def rows(params: Any, trained: Mapping[str, Any], shardings: Any = None) -> list[Row]:
    """A row for each weight, in tree order; ``trained`` as in :meth:`Plan.init` (arrays or shapes)."""
    specs = tree.flatten(shardings) if shardings is not None else {}
    out = []
    for path, x in tree.flatten(params).items():
        spec = getattr(specs.get(path), "spec", None)
        written = ", ".join("+".join(a) if isinstance(a, tuple) else str(a or "-") for a in spec) if spec else "-"
        trains = tree.count(trained[path]) if path in trained else 0
        out.append(Row(path, tuple(x.shape), np.dtype(x.dtype).name, written, trains))
    return out


def summary(table: list[Row]) -> str:
    """``123 weights, 1,234,567 values, 12,345 train (1.0%)``."""
    values = sum(int(np.prod(r.shape)) for r in table)
    trains = sum(r.trains for r in table)
    return f"{len(table)} weights, {values:,} values; {trains:,} train ({100 * trains / max(values, 1):.3g}%)"


def text(table: list[Row]) -> str:
    """The rows as plain aligned text, with the totals below."""
    cells = []
    for r in table:
        trains = (f"{r.trains:,}", f"{r.density:.3g}") if r.trains else ("-", "-")
        cells.append((r.path, "x".join(map(str, r.shape)) or "scalar", r.dtype, r.sharding, *trains))
    headers = ("weight", "shape", "dtype", "sharding", "trains", "density")
    lines = terminal.text(terminal.table(headers, cells, left=("weight", "dtype", "sharding")))
    return f"{lines}\n{summary(table)}"


def example(batch: Any, objective: Any, tokenizer: Any, limit: int = 400) -> str:
    """The first row of a host batch decoded, up to ``limit`` tokens: with what the loss is over in ⟦brackets⟧ where that is
    tokens, else with its label. Empty where the batch holds no text or there is no tokenizer.
    """
    if not isinstance(batch, Mapping):
        batch = {"tokens": batch}
    decoder = "decoder_" if "decoder_tokens" in batch else ""
    if tokenizer is None or f"{decoder}tokens" not in batch:
        return ""
    tokens = batch[f"{decoder}tokens"][0]
    segments = batch[f"{decoder}segments"][0] if f"{decoder}segments" in batch else np.ones_like(tokens)
    end = min(int(np.flatnonzero(segments > 0).max(initial=-1)) + 1, limit)
    weights = objective.weights(batch, np)[0] if hasattr(objective, "weights") else np.float32(1)
    if weights.ndim:
        # Weights stand where the prediction is made, one before the token that is predicted.
        counts = np.roll(weights, 1) > 0
        return f"first example, targets in brackets: {marked(tokenizer, tokens[:end], counts[:end])}"
    label = f", label {batch['labels'][0]}" if "labels" in batch else ""
    return f"first example{label}: {tokenizer.decode(tokens[:end])}"


def describe(plan: Plan) -> str:
    """The method in one line: name and options."""
    options = ", ".join(f"{k}={v!r}" for k, v in plan.method.options.items())
    return f"{plan.method.name}({options})"
