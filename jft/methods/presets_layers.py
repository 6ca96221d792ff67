"""Presets that train whole layers and matrices: which ones is a matter of depth, of a draw, of a score, or of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jft.methods.layer_schedules import Decided, Redraw, Unfreezing
from jft.methods.layer_search import Correlation, Greedy, Green, RangeSearch
from jft.methods.parametrise import InPlace
from jft.methods.patterns import patterns
from jft.methods.plan import Method, Select
from jft.methods.registry import register
from jft.methods.soft_mask import SoftMask
from jft.select.budget import PerLeaf
from jft.select.granularity import Layer
from jft.select.layers import Between, Halves, Last, LastOf, Spaced
from jft.select.probe import Per
from jft.select.scores import Fisher

Names = Sequence[str] | str
INSIDE = (r"(^|/)(layers?|blocks?|h)(/|_)",)


def _by_score(score: Any, k: int, include: Names, exclude: Names, **how: Any) -> Select:
    """The ``k`` layers of each stack with the best scores."""
    chosen = {"granularity": Layer(), "budget": PerLeaf(count=k), **how}
    return Select(patterns(include), patterns(exclude), score=score, **chosen)


@register("uniform_layers", paper="Wang et al. 2024, arXiv:2412.12785")
def uniform_layers(fraction: float = 0.25, ends: bool = False, include: Names = ("",), exclude: Names = ()) -> Method:
    """Train all weights of a quarter of the layers, spaced evenly over the depth.

    The k layers are ``floor(i L / k)``, or with ``ends`` spread from the first to the last. The paper tunes the language
    model of a vision-language model so, together with the projector between them: ``also`` its pattern. Its pruning of
    layers outside the choice afterwards is not part of this.
    """
    return Method(Select(patterns(include), patterns(exclude), layers=Spaced(fraction, ends)), InPlace())


@register("gradual_unfreezing", paper="Howard and Ruder 2018, arXiv:1801.06146")
def gradual_unfreezing(
    every: int = 0,
    stages: int = 4,
    first: int = 1,
    by: int = 1,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train the last layer, then one more at a time, from the top down.

    every: steps of a stage (the paper's is an epoch), ``first`` layers in the first and ``by`` more in each; 0 for ``stages``
    of equal length with equal shares of the layers, all of them in the last. What trains goes on with its values and moments.
    No backward pass runs below what trains. Embeddings stay frozen; the paper's last stage has them as well. A task head
    trains from the start with ``also="^classifier/"``. Its learning rates that fall with depth and its slanted triangular
    schedule are not part of this.
    """
    schedule = Unfreezing(every, 0 if every else stages, first=first, by=by)
    start = Last(first) if every else Last(share=(1, stages))
    return Method(Select(patterns(include), patterns(exclude), layers=start), InPlace(), schedule=schedule)


@register("layers_by_score", paper="Zhang et al. 2025, arXiv:2504.12585")
def layers_by_score(
    k: int = 1,
    target: Callable[..., Any] | str | None = None,
    batches: int = 8,
    pool: Literal["mean", "last"] = "mean",
    largest: bool = True,
    score: Callable[..., Any] | None = None,
    include: Names = INSIDE,
    exclude: Names = (),
) -> Method:
    """Train all weights of the k layers whose activations go most with a number known of each example.

    target: that number, the name of an entry of the batches (the paper's is the prior log-probability of the answer), or
    ``target(outputs, batch) -> [B]``; None is the model's own log-likelihood of the right answer. The score is the root mean
    square correlation of what enters each layer with it (:func:`jft.select.activations.correlation`): the abstract does not
    give the paper's own. score: any other, ``score(probe) -> {"layers": [L]}``. Found once, from the first ``batches``.
    """
    score = score or Correlation(target, batches, pool=pool)
    return Method(_by_score(score, k, include, exclude, largest=largest), InPlace())


@register("subtuning", paper="Kaplun et al. 2023, arXiv:2302.06354")
def subtuning(
    steps: int = 100,
    metric: str = "loss",
    tolerance: float = 0.0,
    most: int = 0,
    shortlist: int = 0,
    include: Names = INSIDE,
    exclude: Names = (),
) -> Method:
    """Train the layers that a greedy search by validation finds: one more at a time, while tuning gets better by it.

    Each candidate set is trained from the base for ``steps`` and evaluated on the run's ``eval_data``, by ``loss`` or
    ``accuracy``; the first round is the finetuning profile. The search ends where the gain is below ``tolerance``, or with
    ``most`` layers (0: no limit): up to ``L (L + 1) / 2`` short runs, or with ``shortlist`` n about ``L + n^2 / 2``. The
    paper's variant that cross-validates is not offered. The head always trains: ``also="^classifier/"``.
    """
    search = Greedy(steps, metric, tolerance, most, shortlist)
    return Method(Select(patterns(include), patterns(exclude), layers=search), InPlace())


@register("surgical_fisher", paper="Lodha et al. 2023, arXiv:2310.17041")
def surgical_fisher(
    k: int = 1,
    examples: int = 1024,
    per: Per = "example",
    pool: Literal["sum", "mean"] = "sum",
    include: Names = INSIDE,
    exclude: Names = (),
) -> Method:
    """Train all weights of the k layers with the most empirical Fisher information.

    Per layer the mean of squared gradients of single examples is summed over its weights (``mean``: per weight), once, at the
    base. per: ``batch`` squares gradients of whole batches instead, cheaper, and another quantity; ``examples`` then counts
    batches. The task head trains with ``also="^classifier/"``.
    """
    return Method(_by_score(Fisher(examples, per), k, include, exclude, pool=pool), InPlace())


@register("green_trainer", paper="Huang et al. 2023, arXiv:2309.13192")
def green_trainer(
    fraction: float = 0.5,
    every: int = 0,
    batches: int = 1,
    of: Literal["step", "backward"] = "step",
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train the tensors that lower the loss most within a fraction of the FLOPs of a full step.

    Importance is ``-sum(g * dw)``, dw what the optimizer makes of one step; the choice is exact but for the rounding of costs
    to a thousandth of the budget. every: steps between decisions (the paper's epoch), with moments of what stays carried
    over and what is dropped kept as it is; 0 decides once. of: whether ``fraction`` counts the forward pass, as the paper's
    rho does. A tensor is one weight of one layer. Models with one stack of layers.
    """
    green = Green(fraction, batches, of)
    schedule = Decided(green, every) if every else None
    return Method(Select(patterns(include), patterns(exclude), layers=green), InPlace(), schedule=schedule)


@register("half_finetuning", paper="Hui et al. 2024, arXiv:2404.18466")
def half_finetuning(
    every: int = 0,
    stages: int = 1,
    draw: int = 0,
    outside: bool = False,
    include: Names = ("",),
    exclude: Names = (),
) -> Method:
    """Train half of the matrices of every layer, drawn at random: of attention, of the MLP and of the norms each half.

    2 of the 4 attention matrices; 2 of the 3 of a gated MLP in half of the layers and 1 in the others; half of the norms. A
    new draw for each stage: of ``every`` steps, or ``stages`` of equal length. draw: the number of the random draws, which
    are otherwise the same in every run. A stage of the paper is a whole run (SFT, then DPO): give each another ``draw``.
    outside: train embeddings and head as well. The paper's baseline that sets half of a tuned model back is
    :func:`jft.merge.half_reset`.
    """
    several = bool(every) or stages > 1
    schedule = Redraw(every, 0 if every else stages) if several else None
    select = Select(patterns(include), patterns(exclude), layers=Halves(draw, outside=outside))
    return Method(select, InPlace(), schedule=schedule)


@register("cofitune", paper="Zhang et al. 2024, arXiv:2404.10306")
def cofitune(
    depth: tuple[float, float] = (0.25, 0.5),
    modules: Names = (r"mlp/(up|down)/",),
    search: int = 0,
    metric: str = "loss",
    groups: Sequence[Sequence[str]] = ((r"attn/",), (r"mlp/up/",), (r"mlp/down/",), (r"mlp/(up|down)/",)),
    soft_mask: bool = True,
    batches: int = 8,
    dropout: float = 0.1,
) -> Method:
    """Train the MLP's up and down projections of the second quarter of the layers, gently where units matter to the base.

    depth, modules: what trains, by depth from 0 to 1 and by pattern; the defaults are the paper's example. search: steps
    for each candidate of a search instead, over halves, then quarters of the depth, then ``groups`` of modules, by evaluation
    on the run's ``eval_data`` (give it both the new skill and the old ones: the paper scores their sum). soft_mask: gradients
    are scaled by 1 minus the importance of their unit, found over ``batches`` of the training data
    (:class:`jft.methods.soft_mask.SoftMask`); the paper takes it from two passes with dropout. Models here have none, so
    its noise is put on the embeddings and on what each block adds.
    """
    rule = SoftMask(batches, dropout) if soft_mask else None
    if search:
        found = RangeSearch(search, metric, modules=tuple(map(tuple, groups)))
        return Method(Select((r"(attn|mlp)/(q|k|v|o|up|gate|down)/",), layers=found), InPlace(), rule=rule)
    return Method(Select(patterns(modules), layers=Between(*depth)), InPlace(), rule=rule)


@register("locft_bf", paper="Yang et al. 2025, arXiv:2509.22072")
def locft_bf(layers: Sequence[int] = (-1,), modules: Names = (r"mlp/down/",)) -> Method:
    """Train one module of one layer, on mini-batches over all edits.

    The breadth-first half of the method is how jft trains anyway: epochs of shuffled mini-batches over the whole set of
    edits, in place of each edit to convergence. layers, modules: the location, which the paper finds for each model by
    comparison; its abstract does not name it, and the default is only an example. The loss is on the target tokens.
    """
    return Method(Select(patterns(modules), layers=tuple(layers)), InPlace())


@register("skip_tuning", paper="Wu et al. 2024, arXiv:2412.11509")
def skip_tuning(vision: int = 4, text: int = 4, projections: bool = True) -> Method:
    """Train the last layers of both towers of a CLIP, and what stands behind them.

    vision, text: how many layers of each. projections: final norms and projections as well. Nothing runs backwards below;
    the speed of the paper comes from not running the rest forwards either: ``prefix, suffix = jft.models.suffix.split(model,
    {"vision/layers": V - vision, "text/layers": T - text})``, ``prefix(params, batch)`` once for each example, and
    ``finetune(suffix, params, ...)`` on what it gave; and from comparing each batch with few classes
    (:func:`jft.select.classes.likely_classes`). The parameters, and the task vector, are those of the whole model.
    """
    return Method(Select(layers=LastOf((("vision", vision), ("text", text)), projections)), InPlace())
