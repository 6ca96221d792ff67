"""Presets that train whole parts inside weights: heads, channels, blocks, experts, slots of a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jft.methods.parametrise import InPlace
from jft.methods.patterns import patterns
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.methods.schedules import Refresh
from jft.select import budget, granularity, memory, scores, structured
from jft.select.granularity import How
from jft.select.heads import rolled

Names = Sequence[str] | str
CHOSEN = budget.Beyond(0.0)
RANDOM = scores.Random()
SIDES = (
    (r"attn/o/w$|mlp/down/w$", granularity.Row()),
    (r"attn/(q|k|v)/w$|mlp/(up|gate)/w$", granularity.Column()),
)


@register("s2ft", paper="Yang et al. 2024, arXiv:2412.06289")
def s2ft(
    o: float = 0.05,
    down: float = 0.02,
    v: float = 0.0,
    up: float = 0.0,
    score: scores.Score = RANDOM,
    largest: bool = True,
    exclude: Names = (),
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
    select = Select(
        (rf"(^|/)({wanted})/w$",), patterns(exclude), linear_only=True, score=choice, granularity=SIDES, budget=CHOSEN
    )
    return Method(select, InPlace())


@register("smt", paper="He et al. 2024, arXiv:2405.15525")
def smt(
    attention: float = 0.0084,
    mlp: float = 0.0084,
    block: tuple[int, int] = (256, 256),
    batches: int = 100,
    pool: How = "abs_mean",
    exclude: Names = (),
) -> Method:
    """Train the blocks of the matrices inside layers whose gradient, summed over 100 batches, is largest.

    attention, mlp: the fraction of the blocks of each kind, which compete over all layers; 0 for none. pool: of the summed
    gradient over a block, ``abs_mean`` as in its code. The code sums gradients over 100 steps of full fine-tuning and goes
    on from there; here they are all taken at the base, which needs no optimizer state of the whole model. Its mode for
    channels, whose gradient lands in the wrong rows, is not offered: take block_sparse with a row as the block.
    """
    parts = tuple((rf"(^|/){name}/", fraction) for name, fraction in (("attn", attention), ("mlp", mlp)) if fraction)
    if not parts:
        raise ValueError("smt with attention and mlp both 0 trains nothing")
    select = Select(
        ("|".join(pattern for pattern, _ in parts),),
        patterns(exclude),
        linear_only=True,
        score=scores.Accumulated(batches),
        granularity=granularity.Block(*block),
        pool=pool,
        budget=budget.ByPattern(tuple((name, budget.Globally(density=fraction)) for name, fraction in parts)),
    )
    return Method(select, InPlace())


@register("esft", paper="Wang et al. 2024, arXiv:2407.01906")
def esft(
    p: float | None = None, kind: Literal["token", "gate"] = "token", batches: int = 8, exclude: Names = ()
) -> Method:
    """Train the experts of each layer that the data uses most; the router, other experts and the rest are frozen.

    kind: an expert's score is the share of ``batches``' tokens that go to it (ESFT-Token), or its mean gate value
    (ESFT-Gate), each layer's scores summing to 1. p: the best are taken until their scores reach it; default 0.2 for
    tokens and 0.1 for gates. One stored script of the authors sums scores over layers instead; that is not followed. The
    backward pass multiplies the chosen experts' matrices alone. For their options that train all else too: ``also``.
    """
    share = (0.2 if kind == "token" else 0.1) if p is None else p
    select = Select(
        (r"/experts/",),
        patterns(exclude),
        score=structured.ExpertUse(share, kind, batches),
        granularity=granularity.Expert(),
        budget=CHOSEN,
    )
    return Method(select, InPlace())


@register("precise_sft", paper="Zhang et al. 2024, arXiv:2409.01659")
def precise_sft(
    heads: float = 0.05,
    mlps: int = 0,
    batches: int = 1,
    counterfactual: Callable[[Any], Any] | None = rolled,
    freeze: bool = True,
    exclude: Names = (),
) -> Method:
    """Train the few attention heads that carry the right answers: their columns of q, k, v and rows of o.

    heads: how many, of all layers together, as a fraction or a number. Each is scored by how far the right answer's logit
    falls over ``batches`` when the head says what it says on ``counterfactual(batch)``, only along paths through no other
    head (``freeze``; see :func:`jft.select.heads.patching`). The paper makes counterfactuals by hand, from prompts without
    the arithmetic; the default is another example of the batch. mlps: whole MLPs trained as well, the best by the same
    measure; every layer then pays for its MLP's gradient, with those that are not chosen as padding.
    """
    include = r"attn/(q|k|v|o)/w$" + (r"|mlp/(up|gate|down)/w$" if mlps else "")
    choice = structured.PatchedHeads(heads, mlps, batches, counterfactual, freeze)
    select = Select((include,), patterns(exclude), linear_only=True, score=choice, granularity=SIDES, budget=CHOSEN)
    return Method(select, InPlace())


@register("sparse_memory", paper="Lin et al. 2025, arXiv:2510.15103")
def sparse_memory(
    slots: int = 512, background: memory.Accesses | str | None = None, batches: int = 1, every: int = 0
) -> Method:
    """Train the slots of a memory that the new data reads and other data does not; everything else is frozen.

    slots: how many rows of the table, those with the best TF-IDF. background: what other data reads
    (:func:`jft.select.memory.slot_counts` over, say, 1000 batches of pretraining data, or its ``.npz`` file); without it the
    most read are taken. The paper scores every batch by itself: ``every=1``, which with ``batches=1`` looks at the batch
    that comes next; 0 chooses once, from the first ``batches``. It forgets least with plain SGD (``optimizer={"name":
    "sgd", "momentum": 0}``), which also leaves a changing selection nothing to carry over; Adam's moments carry over.
    """
    select = Select(
        (r"(^|/)memory/table$",),
        score=structured.Slots(background, batches),
        granularity=granularity.Row(),
        budget=budget.Globally(count=slots),
    )
    return Method(select, InPlace(), schedule=Refresh(every) if every else None)
