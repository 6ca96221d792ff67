"""`show`: a batch's rows decoded, targets marked, to read before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jft.data.tokenizer import Tokenizer


def _pieces(ids: np.ndarray, mask: np.ndarray) -> list[tuple[bool, np.ndarray]]:
    """Runs of equal mask: ``(is target, ids)``."""
    borders = np.flatnonzero(np.diff(mask)) + 1
    return [(bool(mask[run[0]]), ids[run]) for run in np.split(np.arange(len(ids)), borders) if len(run)]


def marked(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray, markup: bool = False) -> str:
    """``ids`` decoded, those where ``mask`` is set in ⟦ ⟧ (in Rich green with ``markup``)."""
    opening, closing = ("[bold green]", "[/bold green]") if markup else ("⟦", "⟧")
    out = ""
    for target, run in _pieces(ids, mask):
        text = tokenizer.decode(run)
        if markup:
            # Brackets of the text would pass for markup.
            from rich.markup import escape

            text = escape(text)
        out += f"{opening}{text}{closing}" if target else text
    return out


def _sequence(batch: Mapping[str, Any], row: int, tokenizer: Tokenizer, markup: bool, prefix: str) -> str:
    ids = np.asarray(batch[f"{prefix}tokens"])[row]
    segments = np.asarray(batch.get(f"{prefix}segments", np.ones_like(batch[f"{prefix}tokens"])))[row]
    masked = "loss_mask" in batch and np.shape(batch["loss_mask"]) == np.shape(batch[f"{prefix}tokens"])
    mask = np.asarray(batch["loss_mask"])[row] > 0 if masked else np.zeros(len(ids), bool)
    length = int((segments > 0).sum())
    head = f"{prefix}tokens: {length} of {len(ids)} used, {int(segments.max(initial=0))} segment(s)"
    lines = [head + (f", {int(mask.sum())} targets" if masked else "")]
    # One by one: decoding across a border would join two texts.
    for segment in range(1, int(segments.max(initial=0)) + 1):
        in_segment = segments == segment
        lines.append(marked(tokenizer, ids[in_segment], mask[in_segment], markup))
    return "\n".join(lines)


def show(
    batch: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    row: int = 0,
    markup: bool = False,
    classes: Any = None,
) -> str:
    """Row ``row`` of a batch as text, one segment a line; targets are in ⟦ ⟧ (in Rich green with ``markup``).

    Of a loader the rows are one example of each source.

    Without tokens: the shapes, the range of the pixels, and the label (its name, with ``classes``).
    """
    if not isinstance(batch, Mapping):
        # A loader is endless, and to look for a field in it would never end.
        if not hasattr(batch, "sample"):
            raise ValueError(f"show takes a batch, a dict of arrays, or a jft loader, not a {type(batch).__name__}")
        tokenizer, classes = tokenizer or batch.tokenizer, classes or batch.classes
        batch = batch.sample()
    lines = []
    for prefix in ("", "decoder_"):
        if f"{prefix}tokens" in batch and tokenizer is not None:
            lines.append(_sequence(batch, row, tokenizer, markup, prefix))
    if "images" in batch:
        image = np.asarray(batch["images"][row])
        lines.append(f"image: {' x '.join(map(str, image.shape))}, values {image.min():.3g} to {image.max():.3g}")
    if "labels" in batch:
        label = int(np.asarray(batch["labels"])[row])
        lines.append(f"label: {label}" + (f" ({classes[label]})" if classes else ""))
    return "\n".join(lines)
