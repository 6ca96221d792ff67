"""S2FT: a few heads and channels of each layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import scores
from jft.select.calibration import Calibration
from jft.select.scores import Scores
from jft.select.structured import CHOSEN, SIDES, attention, floor_count, spread_heads
from jft.select.threshold import top_each

Array = jax.Array
RANDOM = scores.Random()


def _named(calibration: Calibration, ending: str) -> dict[str, str]:
    """Candidates with this ending, by what stands before it."""
    return {p.removesuffix(ending): p for p in calibration.paths if p.endswith(ending)}


@dataclasses.dataclass(frozen=True)
class HeadsAndChannels:
    """1 for the heads and channels of each layer that ``score`` chooses, in all weights that they couple.

    o, v, down, up: the fraction of heads whose rows of the output and columns of the value projection, of channels whose rows
    of down and columns of up and gate are chosen; rounded down, at least one of what is above 0. A head or channel counts
    with the sum of ``score`` over its rows of o or down (without them, its columns of v or up), so that the smaller of
    two fractions is a part of the larger. Where v takes part and query heads share values, they are chosen by the group.
    """

    o: float
    v: float
    down: float
    up: float
    score: scores.Score = RANDOM
    largest: bool = True

    def share(self, path: str, available: int) -> int:
        "About how many of the rows or columns of a weight are chosen: whole heads are not known here."
        fraction = {"attn/o": self.o, "attn/v": self.v, "mlp/down": self.down}.get(
            "/".join(path.split("/")[-3:-1]), self.up
        )
        return floor_count(fraction, available)

    def __call__(self, calibration: Calibration) -> Scores:
        of_entries = self.score(calibration)
        return self._heads(calibration, of_entries) | self._channels(calibration, of_entries)

    def _heads(self, calibration: Calibration, found: Scores) -> Scores:
        out: Scores = {}
        rows, columns = _named(calibration, "attn/o/w"), _named(calibration, "attn/v/w")
        for stack in rows | columns:
            # o before v: coupled weights must choose by one score, or they would train different heads.
            path = rows.get(stack) or columns[stack]
            count, groups = attention(calibration, path)
            # Query heads that share values cannot train their part of v apart.
            units = groups if stack in columns else count
            score = _pooled(found[path], units, rows=path.endswith("o/w"))
            # The same scores with another count: the smaller choice is a part of the larger.
            if stack in rows:
                chosen = top_each(score, floor_count(self.o, units), 1, self.largest)
                out[rows[stack]] = spread_heads(chosen, calibration.params[rows[stack]].shape[1])
            if stack in columns:
                chosen = top_each(score, floor_count(self.v, units), 1, self.largest)
                out[columns[stack]] = spread_heads(chosen, calibration.params[columns[stack]].shape[2])
        return out

    def _channels(self, calibration: Calibration, found: Scores) -> Scores:
        out: Scores = {}
        rows, ups, gates = (_named(calibration, f"mlp/{name}/w") for name in ("down", "up", "gate"))
        for stack in rows | ups:
            # down before up, for the same reason.
            path = rows.get(stack) or ups[stack]
            score = _pooled(found[path], found[path].shape[1 if stack in rows else 2], rows=stack in rows)
            for weights, fraction in ((rows, self.down), (ups, self.up), (gates, self.up)):
                if stack in weights:
                    chosen = top_each(score, floor_count(fraction, score.shape[1]), 1, self.largest)
                    out[weights[stack]] = chosen.astype(jnp.float32)
        return out


def _pooled(score: Array, units: int, rows: bool) -> Array:
    """Sums ``[L, units]`` of a score ``[L, I, O]`` over runs of rows, or of columns."""
    summed = jnp.sum(score.astype(jnp.float32), axis=2 if rows else 1)
    return jnp.sum(summed.reshape(len(summed), units, -1), axis=2)


CARD = Card(
    formula=(
        "In each layer max(1, floor(o H)) heads: their rows of the output projection, and for v their columns of the value "
        "projection; max(1, floor(down F)) channels: their rows of down, and for up their columns of up and gate; drawn at "
        "random, coupled weights alike"
    ),
    follows="Paper: a few heads and channels of each block, coupled weights selected together, random draws. Code: fractions.",
    code="Infini-AI-Lab/S2FT@a58edbb556d9251d8cb2a34f359b34f1958a3270, efficiency/latency.py, experiments/train/finetune.py",
    departs=(
        "The code draws int(o L H) heads and int(down L F) channels over all layers together, so that layers differ; here "
        "each layer has as many, as in the paper. On Llama 7B at o=0.052 that is 32 heads rather than 53, 45.6M trained "
        "values rather than 56.6M; channels differ by 5 of 7045. It permutes weights until the chosen rows are contiguous; "
        "here rows are gathered, which trains the same values. Its helper for grouped queries counts the wrong heads; this "
        "chooses by group."
    ),
    defaults={
        "o": ("-", "0.052 for efficiency, 0 for tasks"),
        "down": ("-", "0.02 for efficiency, 0.03 for tasks"),
        "v": ("-", 0),
        "up": ("-", 0),
        "score": ("random", "random"),
    },
    check="choices and three steps on a decoder against float64 NumPy, and against training a slice of the permuted model",
)


@register("s2ft", paper="Yang et al. 2024, arXiv:2412.06289", card=CARD)
def s2ft(
    o: float = 0.052,
    down: float = 0.02,
    v: float = 0.0,
    up: float = 0.0,
    score: scores.Score = RANDOM,
    largest: bool = True,
) -> Method:
    """Train a few heads and channels of each layer: their rows of the output and of the down projection.

    o, down, v, up: fractions, rounded down to whole heads and channels (at least one; 0 for none), of heads in the output and
    value projections, of channels in down and in up with gate; coupled weights choose alike. Each layer has as many, as in
    the paper; the code draws over all layers together, 53 heads of Llama 7B at the default where this trains 32. score:
    random as in the paper's main runs, or any other, summed over the rows of a head or channel; ``largest=False`` takes the
    other end. Query heads that share values are chosen by the group where v trains. The paper and its code permute coupled
    weights until the chosen rows are contiguous; here the rows are gathered, which trains the same values without touching
    the model, and the backward pass costs and keeps the slices alone. The released helper for grouped queries counts the
    wrong heads; this does not. Weights inside layers, without experts.
    """
    names = {"attn/o": o, "attn/v": v, "mlp/down": down, "mlp/up": up, "mlp/gate": up}
    for name, fraction in names.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"the fraction of {name} is {fraction}; it lies in [0, 1]")
    modules = "|".join(name for name, fraction in names.items() if fraction)
    if not modules:
        raise ValueError("s2ft with o, v, down and up all 0 trains nothing")
    choice = HeadsAndChannels(o, v, down, up, score, largest)
    select = Select((rf"(^|/)({modules})/w$",), linear_only=True, score=choice, granularity=SIDES, budget=CHOSEN)
    return Method(select, InPlace())
