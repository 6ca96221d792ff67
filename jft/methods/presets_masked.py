"""Presets of gated, masked and regularised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jft.methods.channels import ChannelBudget, Sparsified, Tied
from jft.methods.diagonal import BlockDiagonal
from jft.methods.gates import Gates, HardConcrete, Taps
from jft.methods.low_rank import LowRank, WithLowRank
from jft.methods.masks import AgreementDropout, Masked, TopMask
from jft.methods.mixout import Mixout
from jft.methods.parametrise import InPlace
from jft.methods.patterns import patterns
from jft.methods.penalties import L2SP, L1ToBase, SharedLayers
from jft.methods.plan import Method, Select
from jft.methods.projection import Projection
from jft.methods.registry import register

Patterns = Sequence[str] | str
HEADS = (r"(^|/)(head|classifier)/",)


@register("diff_pruning", paper="Guo, Rush and Kim 2021, arXiv:2012.07463")
def diff_pruning(
    weight: float = 1.25e-7,
    group: bool = True,
    counted: Literal["product", "sum"] = "product",
    alpha_rate: float = 1e4,
    init_alpha: float = 5.0,
    density: float = 0.005,
    project_at: float = 0.5,
    include: Patterns = ("",),
    exclude: Patterns = HEADS,
) -> Method:
    """Train a change of every weight but the head's, and the gates that an expected-L0 penalty closes entry by entry.

    weight: of the expected number of changed entries. group: one gate more for each matrix and vector. counted: how the two
    kinds of gate enter the penalty, ``product`` as in the paper or ``sum`` as in its code. alpha_rate: learning rate of gates
    over that of the change (the paper: 0.1 over 1e-5). After a share ``project_at`` of the steps the change is cut down to
    the ``density`` of entries that are largest, and these train on with the support fixed; ``density=1`` never does that. A
    new head trains with ``also="^classifier/"``.
    """
    train = HardConcrete(weight, init_alpha=init_alpha, group=group, counted=counted, alpha_rate=alpha_rate)
    schedule = Projection(density, project_at) if density < 1 else None
    return Method(Select(patterns(include), patterns(exclude)), train, schedule=schedule)


@register("taps", paper="Wallingford et al. 2022, arXiv:2203.16708")
def taps(
    weight: float = 1.0,
    threshold: float = 0.1,
    init_score: float = 0.15,
    include: Patterns = ("",),
    exclude: Patterns = (),
) -> Method:
    """Train a change of every matrix inside the layers, and a score of each that decides whether it is used.

    weight: lambda of ``lambda / L sum |s|``: the larger, the fewer layers become the task's own (the paper sweeps it). A layer
    is one matrix, as in the paper. threshold and init_score are those of its code.
    """
    train = Taps(threshold, init_score)
    select = Select(patterns(include), patterns(exclude), linear_only=True)
    return Method(select, train, penalties=(SharedLayers(weight),))


@register("masking", paper="Zhao et al. 2020, arXiv:2004.12406")
def masking(
    sparsity: float = 0.05,
    threshold: float = 5e-3,
    margin: float = 5e-3,
    include: Patterns = ("",),
    exclude: Patterns = (),
) -> Method:
    """Train which weights of the matrices inside the layers are there; their values stay. One bit for each is stored.

    sparsity: the fraction masked at random at the start (the paper's best is about 0.05). threshold, margin: scores start at
    ``threshold`` plus or minus ``margin``. The paper also masks the pooler and the classifier: ``include`` them.
    """
    return Method(
        Select(patterns(include), patterns(exclude), linear_only=True), Masked(None, sparsity, threshold, margin)
    )


@register("mask_finetuning", paper="Zhang et al. 2025, arXiv:2503.22764")
def mask_finetuning(
    keep: float = 0.9,
    layers: Sequence[int] | None = None,
    std: float | None = 0.02,
    include: Patterns = ("",),
    exclude: Patterns = (),
) -> Method:
    """Train which 90% of each matrix stay, in an already tuned model.

    keep: the fraction of each matrix that stays. layers: which ones are masked (the paper: 4 to 7 for mathematics, 20 to 23
    for code, 0 to 3 for instructions, of a LLaMA2-7B); None for all. std: of the initial scores, see
    :class:`jft.methods.masks.TopMask`.
    """
    chosen = None if layers is None else tuple(layers)
    select = Select(patterns(include), patterns(exclude), linear_only=True, layers=chosen)
    return Method(select, TopMask(None, keep, std))


@register("r_amt", paper="Wu et al. 2023, arXiv:2307.15049")
def r_amt(l2: float = 1e-4, dropout: float = 1.0, include: Patterns = ("attn/",), exclude: Patterns = ()) -> Method:
    """Train which weights of the attention's projections are there, all of them at the start.

    Scores start at 1e-2 with a threshold of 5e-3. l2: weight of the scores' norms. dropout: strength of the gradient dropout
    by agreement with the gradient toward the base's own predictions (:class:`jft.methods.masks.AgreementDropout`), which
    costs a second backward pass; 0 leaves it out, the paper's "AMT".
    """
    train = Masked(None, 0.0, 5e-3, 5e-3, strict=True, l2=l2)
    rule = AgreementDropout(dropout) if dropout else None
    return Method(Select(patterns(include), patterns(exclude), linear_only=True), train, rule=rule)


@register("finegates", paper="Svirsky, Refael and Lindenbaum 2024, arXiv:2412.12951")
def finegates(
    weight: float = 1e-3,
    rows: bool = True,
    columns: bool = True,
    sigma: float = 0.5,
    noise: float | None = None,
    squash: bool = False,
    open: float | None = None,
    rank: int = 0,
    include: Patterns = ("",),
    exclude: Patterns = (),
) -> Method:
    """Train stochastic gates on the input and output channels of frozen matrices; what closes is removed.

    weight: of the expected number of open gates, or with ``open`` of the distance from that open fraction. squash and open
    are the form of the authors' later code (``noise=0.1``): see :class:`jft.methods.gates.Gates`. rank: of a low-rank change
    beside the gated weight, which the gates do not touch; 0 for none.
    """
    gates = Gates(rows, columns, weight, sigma, noise, squash=squash, open=open)
    train = WithLowRank(gates, LowRank(rank, float(rank))) if rank else gates
    return Method(Select(patterns(include), patterns(exclude), linear_only=True), train)


@register("diablo", paper="Gurses et al. 2025, arXiv:2506.03230")
def diablo(blocks: int = 64, include: Patterns = ("",), exclude: Patterns = ()) -> Method:
    """Train the diagonal blocks of every matrix inside the layers.

    blocks: N of them for each matrix, of ``I / N x O / N``; N must divide both sides.
    """
    return Method(Select(patterns(include), patterns(exclude), linear_only=True), BlockDiagonal(blocks))


@register("mixout", paper="Lee, Cho and Kang 2020, arXiv:1909.11299")
def mixout(
    p: float = 0.9,
    unit: Literal["neuron", "weight"] = "neuron",
    include: Patterns = ("",),
    exclude: Patterns = HEADS,
) -> Method:
    """Train every weight but the head's, in steps that put part of each matrix back to its pretrained values.

    p: the probability of that. unit: whether all weights that leave a neuron go back together, or each by itself. A new head
    has no pretrained values; it trains with ``also="^classifier/"``.
    """
    return Method(Select(patterns(include), patterns(exclude)), Mixout(p, unit))


@register("l2_sp", paper="Li, Grandvalet and Davoine 2018, arXiv:1802.01483")
def l2_sp(weight: float = 0.01, include: Patterns = ("",), exclude: Patterns = HEADS) -> Method:
    """Train every weight but the head's, drawn to its pretrained value by ``weight / 2`` times the squared distance.

    A new head trains with ``also="^classifier/"``, and is then drawn to its first value as well.
    """
    return Method(Select(patterns(include), patterns(exclude)), InPlace(), penalties=(L2SP(weight),))


@register("l1_to_base", paper="Ansell et al. 2022, arXiv:2110.07560")
def l1_to_base(weight: float = 0.1, mean: bool = True, include: Patterns = ("",), exclude: Patterns = HEADS) -> Method:
    """Train every weight but the head's, drawn to its pretrained value by ``weight`` times the mean absolute distance.

    The regulariser of lottery-ticket sparse fine-tuning, by itself. mean: their mean, or with False their sum.
    """
    return Method(Select(patterns(include), patterns(exclude)), InPlace(), penalties=(L1ToBase(weight, mean),))


@register("pat", paper="Liu et al. 2024, arXiv:2408.14721")
def pat(
    fraction: float = 0.75,
    rank: int = 200,
    identity: float = 1.0,
    include: Patterns = (r"^embed/table$", r"attn/o/w$", r"mlp/down/w$"),
) -> Method:
    """Train light operators on what writes to the residual stream and one mask of its channels, which are then removed.

    fraction: of the channels that stay (the paper: 3072 of 4096 in a LLaMA2-7B). rank: of the operators. identity: weight of
    the loss that keeps them near orthogonal. Afterwards :func:`jft.methods.width.prune_width` of the open channels gives the
    smaller model. The paper trains LoRA beside.
    """
    train = Sparsified(rank, identity)
    return Method(Select(patterns(include)), train, penalties=(ChannelBudget(fraction),), rule=Tied())
