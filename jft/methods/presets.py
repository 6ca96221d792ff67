"""Presets whose selection is a matter of names: full, by pattern, by layer, LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from jft.methods.low_rank import LowRank
from jft.methods.parametrise import InPlace
from jft.methods.patterns import patterns
from jft.methods.plan import Method, Select
from jft.methods.registry import register


@register("full", paper="-")
def full() -> Method:
    """Train every weight."""
    return Method(Select(), InPlace())


@register("pattern", paper="-")
def pattern(include: Sequence[str] | str = ("",), exclude: Sequence[str] | str = ()) -> Method:
    """Train the weights whose path matches any of ``include`` and none of ``exclude`` (regular expressions)."""
    return Method(Select(patterns(include), patterns(exclude)), InPlace())


@register("bitfit", paper="Ben Zaken, Ravfogel and Goldberg 2021, arXiv:2106.10199")
def bitfit() -> Method:
    """Train the bias terms only, those of norms included; the paper also trains the task head: add ``also="^head/"``."""
    return Method(Select(include=(r"(^|/)(b|bias)$",)), InPlace())


@register("last_k_layers", paper="-")
def last_k_layers(k: int = 1) -> Method:
    """Train all weights of the last ``k`` layers. No backward pass runs below them."""
    if k < 1:
        raise ValueError(f"last_k_layers needs k of at least 1, not {k}")
    return Method(Select(layers=tuple(range(-k, 0))), InPlace())


@register("embeddings_and_output", paper="-")
def embeddings_and_output() -> Method:
    """Train what embeds the input and the output head, nothing inside the layers."""
    return Method(
        Select(include=(r"(^|/)(table|cls)$|(^|/)(patch|head|classifier)/",), exclude=("layers/",)), InPlace()
    )


@register("lora", paper="Hu et al. 2021, arXiv:2106.09685")
def lora(
    rank: int = 16,
    alpha: float | None = None,
    include: Sequence[str] | str = ("",),
    exclude: Sequence[str] | str = (),
    rank_stabilised: bool = False,
    b_rate: float = 1.0,
) -> Method:
    """Train ``scale * a @ b`` beside every matrix inside the layers.

    alpha: the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rank_stabilised`` (rsLoRA); default
    ``alpha = rank``. b_rate: ``b`` learns this many times faster than ``a`` (LoRA+; its authors suggest 16).
    include, exclude narrow the matrices by pattern.
    """
    return Method(
        Select(patterns(include), patterns(exclude), linear_only=True),
        LowRank(rank, float(rank if alpha is None else alpha), rank_stabilised, b_rate),
    )
