"""S2FT: a few heads and channels of each layer."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.select import scores, structured
from jft.select.structured import CHOSEN, SIDES

RANDOM = scores.Random()


@register("s2ft", paper="Yang et al. 2024, arXiv:2412.06289")
def s2ft(
    o: float = 0.05,
    down: float = 0.02,
    v: float = 0.0,
    up: float = 0.0,
    score: scores.Score = RANDOM,
    largest: bool = True,
) -> Method:
    """Train a few heads and channels of each layer: their rows of the output and of the down projection.

    o, down, v, up: fractions, rounded down to whole heads and channels (at least one; 0 for none), of heads in the output and
    value projections, of channels in down and in up with gate; coupled weights choose alike. score: random as in the
    paper's main runs, or any other, summed over the rows of a head or channel; ``largest=False`` takes the other end. Query
    heads that share values are chosen by the group where v trains. The paper and its code permute coupled weights until the
    chosen rows are contiguous; here the rows are gathered, which trains the same values without touching the model, and the
    backward pass costs and keeps the slices alone. The released helper for grouped queries counts the wrong heads; this does
    not. Weights inside layers, without experts.
    """
    names = {"attn/o": o, "attn/v": v, "mlp/down": down, "mlp/up": up, "mlp/gate": up}
    for name, fraction in names.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"the fraction of {name} is {fraction}; it lies in [0, 1]")
    wanted = "|".join(name for name, fraction in names.items() if fraction)
    if not wanted:
        raise ValueError("s2ft with o, v, down and up all 0 trains nothing")
    choice = structured.HeadsAndChannels(o, v, down, up, score, largest)
    select = Select((rf"(^|/)({wanted})/w$",), linear_only=True, score=choice, granularity=SIDES, budget=CHOSEN)
    return Method(select, InPlace())
