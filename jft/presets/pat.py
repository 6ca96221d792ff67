"""PAT: operators on what writes to the residual stream, and one mask of its channels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta
from jft.delta.changed import COLUMNS
from jft.dot import dot, grouped_dot, take
from jft.methods.card import Card
from jft.methods.parametrise import Parametrisation
from jft.methods.penalties import absolute
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.reparametrised import straight_through
from jft.methods.select import Select
from jft.methods.update_rules import Rule
from jft.tree import Patterns, patterns

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparsifiedWeight:
    """The structured weight ``w (1 + a b) diag(scale)``, never formed: a ``[..., O, r]``, b ``[..., r, O]``."""

    w: Any
    a: Array
    b: Array
    scale: Array

    def __jft_dot__(self, x: Array) -> Array:
        y = dot(x, self.w)
        return (y + dot(dot(y, self.a), self.b)) * self.scale.astype(y.dtype)

    def __jft_grouped_dot__(self, x: Array, sizes: Array) -> Array:
        y = grouped_dot(x, self.w, sizes)
        # total_repeat_length: under jit the number of rows must not depend on ``sizes``.
        expert = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
        moved = grouped_dot(grouped_dot(y, self.a, sizes), self.b, sizes)
        return (y + moved) * self.scale[expert].astype(y.dtype)

    def __jft_take__(self, ids: Array) -> Array:
        # Rows of the table, not the table: the operator acts on the tokens that are there.
        y = take(self.w, ids, self.a.dtype)
        return (y + dot(dot(y, self.a), self.b)) * self.scale

    def __jft_transpose__(self) -> Array:
        return jnp.swapaxes(_formed(self.w, self.a, self.b, self.scale), -1, -2)


def _formed(w: Array, a: Array, b: Array, scale: Array) -> Array:
    w = w.astype(jnp.float32)
    return (w + (w @ a) @ b) * scale[..., None, :]


@dataclasses.dataclass(frozen=True)
class Sparsified(Parametrisation):
    """``w (1 + a b) diag(mask * s)``: a Hybrid Sparsification Module on what a weight writes to the residual stream.

    PAT, Liu et al. 2024, arXiv:2408.14721: a light operator (a starts Kaiming-uniform, b at zero), times a channel mask that
    *all* modules share, times a scale of its own (``scaled``; the paper's identity loss pulls the operator to be orthogonal and
    leaves scaling to s): penalty ``identity * mean((a^T a - 1)^2)`` for each module. The module goes with ``embed/table``,
    ``attn/o/w`` and ``mlp/down/w``; after training its weight is plain again and masked channels are zero in it, so that
    :func:`jft.methods.width.prune_width` takes them out without changing the logits.

    The mask is soft, ``sigmoid(T m) + bias`` of m that starts at 0, where it is 1; :class:`Hardening` raises T and takes the
    bias from 1/2 to 0. Once that is over, it is ``1[m >= 0]`` in evaluation and in the result; until then, they have the soft
    one. The authors' merging script drops s; here it is merged. Neither mask nor scale decays.

    Kept: w. Trained, float32: ``a`` [*lead, O, rank], ``b`` [*lead, rank, O], ``scale`` (from 1) [*lead, O]; and in the
    first weight, for all, ``mask`` m [O] and ``phase`` [3]: T, the bias, and 1 while m learns from data, which no gradient
    moves.
    """

    rank: int = 200
    identity: float = 1.0
    scaled: bool = True
    lender: str | None = None
    # A step with a key is one of training, where the mask is soft to the end.
    random = True
    exact = True
    shares = ("mask", "phase")

    def init(
        self, key: Array, w: Array, at: Array | None = None, base: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if w.ndim < 2 or self.rank < 1:
            raise ValueError(f"a weight of shape {w.shape} has no operator of rank {self.rank} on its output channels")
        *lead, _, width = w.shape
        # Kaiming-uniform for ``width`` inputs: the operator reads output channels.
        bound = 1 / math.sqrt(width)
        trained = {
            "a": jax.random.uniform(key, (*lead, width, self.rank), jnp.float32, -bound, bound),
            "b": jnp.zeros((*lead, self.rank, width), jnp.float32),
        }
        if self.scaled:
            trained["scale"] = jnp.ones((*lead, width), jnp.float32)
        if self.lender is None:
            trained |= {"mask": jnp.zeros(width, jnp.float32), "phase": jnp.asarray([1.0, 0.5, 1.0], jnp.float32)}
        return w, trained

    def factor(self, trained: dict[str, Array], key: Array | None = None) -> Array:
        """What each output channel is multiplied by, ``[*lead, O]``."""
        # The phase is in the trained values so that a checkpoint holds it; the rule writes it, the optimizer must not.
        temperature, bias, learns = jax.lax.stop_gradient(trained["phase"])
        m, (*lead, width, _) = trained["mask"], trained["a"].shape
        if m.shape != (width,):
            raise ValueError(
                f"the mask has {m.shape[0]} channels and a weight here {width}; include only what writes to the residual stream"
            )
        # Late in the hardening data no longer moves m; the budget's penalty reads m itself and still does.
        m = jnp.where(learns > 0, m, jax.lax.stop_gradient(m))
        soft = jax.nn.sigmoid(jnp.maximum(temperature * m, -10.0)) + bias
        final = (m >= 0).astype(m.dtype) if key is None else soft
        mask = jnp.where(learns > 0, soft, final)
        return mask * (trained["scale"] if self.scaled else jnp.ones((*lead, width), m.dtype))

    def bind(self, kept: Array, trained: dict[str, Array], structured: bool, key: Array | None = None) -> Any:
        parts = (kept, trained["a"], trained["b"], self.factor(trained, key))
        return SparsifiedWeight(*parts) if structured else _formed(*parts).astype(kept.dtype)

    def encode(self, base: Array | None, kept: Array, trained: dict[str, Array]) -> delta.Encoding:
        formed = _formed(kept, trained["a"], trained["b"], self.factor(trained))
        return delta.Dense(formed - kept.astype(jnp.float32))

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        """b and the scale's distance from 1 are the distance from the base."""
        channel = delta.Leaf((..., COLUMNS), decays=False, matrices=None, origin=1.0)
        trained = {"a": delta.Leaf((..., COLUMNS, None), origin=None), "b": delta.Leaf((..., None, COLUMNS))}
        if self.scaled:
            trained["scale"] = channel
        if self.lender is None:
            trained["mask"] = dataclasses.replace(channel, axes=(COLUMNS,), origin=None)
            # rate 0: whatever an optimizer makes of a zero gradient, the phase stays what the rule wrote.
            trained["phase"] = dataclasses.replace(channel, axes=(None,), origin=None, rate=0.0)
        return delta.Leaf(), trained

    def penalty(self, kept: Array, trained: dict[str, Array]) -> Array | None:
        """``identity * mean((a^T a - 1)^2)``, summed over modules."""
        if not self.identity:
            return None
        gram = jnp.einsum("...or,...os->...rs", trained["a"], trained["a"])
        return self.identity * jnp.sum(jnp.mean(jnp.square(gram - jnp.eye(self.rank)), axis=(-1, -2)))


def _lender(trained: Mapping[str, Any]) -> str:
    """The path that holds the mask."""
    for path, values in trained.items():
        if isinstance(values, Mapping) and "mask" in values:
            return path
    raise ValueError("no weight here has a channel mask; this goes with train=Sparsified()")


def phase(made: Array, steps: Array) -> Array:
    """``[T, bias, learns]`` after ``made`` updates, where the mask hardens over G = ``steps``, at least 2.

    ``T = 1 / (1 - log(made) / log(G) + 1e-6)``, from 1; ``bias = max(1/2 - made / G, 0)``; from ``0.8 G`` on T stays, and data
    no longer move m, which the budget still does (the code of Liu et al. 2024, arXiv:2408.14721; the paper is silent).
    """
    length = jnp.maximum(jnp.floor(steps), 2.0)
    stop = jnp.floor(0.8 * length)
    made = made.astype(jnp.float32)
    spent = jnp.log(jnp.clip(made, 1.0, jnp.maximum(stop, 1.0))) / jnp.log(length)
    return jnp.stack([1 / (1 - spent + 1e-6), jnp.maximum(0.5 - made / length, 0.0), (made < stop).astype(jnp.float32)])


@dataclasses.dataclass(frozen=True)
class Hardening(Rule):
    """The mask's :func:`phase` of every step, over a ``share`` of the run's updates.

    Memory: updates made, and those of the run it began as; a run that is taken up with more of them keeps its phases.
    """

    share: float = 1 / 3

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0 < self.share <= 1:
            raise ValueError(f"harden is {self.share}; it is the share of the run's steps, above 0 and up to 1")

    def init(self, trained: Any) -> dict[str, Array]:
        # inf until the run's length is known: the mask then stays at its first phase.
        return {"made": jnp.zeros((), jnp.int32), "steps": jnp.full((), jnp.inf, jnp.float32)}

    def start(self, memory: dict[str, Array], steps: int) -> dict[str, Array]:
        return {**memory, "steps": jnp.full((), steps, jnp.float32)}

    def values(self, plan: Any, kept: Any, trained: Any, memory: dict[str, Array]) -> tuple[Any, Any]:
        made, path = memory["made"] + 1, _lender(trained)
        # After the update, so that the next forward pass has the phase of its own step.
        held = {**trained[path], "phase": phase(made, self.share * memory["steps"])}
        return {**trained, path: held}, {**memory, "made": made}


def open_channels(trained: Mapping[str, Any]) -> np.ndarray:
    """The channels whose mask is open, sorted: what :func:`jft.methods.width.prune_width` keeps."""
    return np.flatnonzero(np.asarray(trained[_lender(trained)]["mask"]) >= 0)


@dataclasses.dataclass(frozen=True)
class ChannelBudget:
    """``weight * |open channels / count - 1| + spread * (mean (m - 1/2)^2 of m > 0 + mean (m + 1/2)^2 of the rest)``.

    count: ``fraction`` of the channels. Channels with m >= 0 are open; counting them passes straight through, so every channel
    is pushed alike until ``count`` are; the second term keeps open and closed channels apart. PAT's code has weight 10 and
    spread 1 (Liu et al. 2024, arXiv:2408.14721).
    """

    fraction: float
    weight: float = 10.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a fraction that is none."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it is that of the channels that stay, above 0 and up to 1")

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Array:
        m = trained[_lender(trained)]["mask"]
        count = max(1, round(self.fraction * m.shape[0]))
        excess = absolute(jnp.sum(straight_through((m >= 0).astype(m.dtype), m)) / count - 1)
        # A comparison, without derivative: which side a channel is on is fixed in this term.
        above = (m > 0).astype(m.dtype)
        away = jnp.float32(0)
        for on, middle in ((above, 0.5), (1 - above, -0.5)):
            away += jnp.sum(on * jnp.square(m - middle)) / jnp.maximum(jnp.sum(on), 1)
        return self.weight * excess + self.spread * away


CARD = Card(
    formula=(
        "y = x w (1 + a b) * c * s on what writes to the residual stream, with one mask for all, c = sigmoid(T m) + bias, m "
        "from 0. Over G steps T = 1/(1 - ln t/ln G) and bias = max(1/2 - t/G, 0); from 0.8 G T stays and data no longer "
        "move m; in the result c = 1[m >= 0]. Loss + 10 |open/count - 1| + mean (m -+ 1/2)^2 + sum over modules of "
        "mean((aᵀa - 1)^2)."
    ),
    follows="paper: modules, shared mask, identity loss; code: the mask's schedule and start, budget, rank, weights",
    check=(
        "forward, gradients, budget and schedule in float64 NumPy from the code's formulas; the gradient norm of a step has "
        "one mask; over a run its mean stays above 0.4, 18 +- 2 of 24 channels stay, and the rest come out without a trace"
    ),
    code="kriskrisliu/PAT_Pruning-Aware-Tuning@bc540950, DimDownModule.py",
    departs=(
        "The released run trains LoRA (rank 20, alpha 4) on every linear layer besides; here the operators train alone. s is "
        "merged (the merging script drops it). t counts updates (code: one fewer). Where the output head is the embedding "
        "table, operator and mask act on the head as well (code: on the embedding alone, so a tied model changes when merged)."
    ),
    defaults={
        "fraction": ("3072 of 4096", "-"),
        "rank": ("-", 200),
        "identity": ("-", 1.0),
        "harden": ("-", "10000 of about 30000 steps"),
    },
)


@register("pat", paper="Liu et al. 2024, arXiv:2408.14721", card=CARD)
def pat(
    fraction: float = 0.75,
    rank: int = 200,
    identity: float = 1.0,
    harden: float = 1 / 3,
    include: Patterns = (r"^embed/table$", r"attn/o/w$", r"mlp/down/w$"),
) -> Method:
    """Train light operators on what writes to the residual stream and one mask of its channels, which are then removed.

    fraction: of the channels that stay (the paper: 3072 of 4096 in a LLaMA2-7B). rank: of the operators. identity: weight of
    the loss that keeps them near orthogonal; 0 leaves out the scales too, as in the code. harden: the share of the run's steps
    over which the soft mask becomes binary (the released command: 10000 of about 30000). include: what writes to the
    residual stream; it is part of the method, so other patterns replace these.

    Afterwards :func:`jft.methods.width.prune_width` of the :func:`open_channels` gives the smaller model. The paper trains LoRA
    beside. In a model whose output head is its embedding table the operator acts on the head too; a copy of the table as a
    head of its own (``tied=False``) is left alone.
    """
    train = Sparsified(rank, identity, scaled=bool(identity))
    return Method(Select(patterns(include)), train, penalties=(ChannelBudget(fraction),), rule=Hardening(harden))
