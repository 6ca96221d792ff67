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
from jft.methods.parametrise import Parametrisation
from jft.methods.patterns import Patterns, patterns
from jft.methods.penalties import absolute
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.reparametrised import straight_through
from jft.methods.select import Select
from jft.methods.update_rules import Rule

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
        expert = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
        moved = grouped_dot(grouped_dot(y, self.a, sizes), self.b, sizes)
        return (y + moved) * self.scale[expert].astype(y.dtype)

    def __jft_take__(self, ids: Array) -> Array:
        y = take(self.w, ids, self.a.dtype)
        return (y + dot(dot(y, self.a), self.b)) * self.scale

    def __jft_transpose__(self) -> Array:
        return jnp.swapaxes(_formed(self.w, self.a, self.b, self.scale), -1, -2)


def _formed(w: Array, a: Array, b: Array, scale: Array) -> Array:
    w = w.astype(jnp.float32)
    return (w + (w @ a) @ b) * scale[..., None, :]


@dataclasses.dataclass(frozen=True)
class Sparsified(Parametrisation):
    """``w (1 + a b) diag(1[m >= 0] * s)``: a Hybrid Sparsification Module on what a weight writes to the residual stream.

    PAT, Liu et al. 2024, arXiv:2408.14721: a light operator (a starts Kaiming-uniform, b at zero), times a channel mask that
    *all* modules share, times a scale of its own (``scaled``; the paper's identity loss pulls the operator to be orthogonal and
    leaves scaling to s): penalty ``identity * mean((a^T a - 1)^2)`` for each module. The module goes with ``embed/table``,
    ``attn/o/w`` and ``mlp/down/w``; after training its weight is plain again and masked channels are zero in it, so that
    :func:`jft.methods.width.prune_width` takes them out without changing the logits.

    A parametrisation sees one weight only, so each holds a copy of m, all equal; :func:`tie` sums their gradients, after
    which every optimizer that acts elementwise keeps them equal. :class:`ChannelBudget` closes channels.

    The mask is binary from the start, passed straight through, and all open (m = 1/2). In the paper's code it becomes binary
    in time: ``sigmoid(T m) + bias`` from m = 0, T growing and the bias of 1/2 vanishing over the run. The code's merging script
    drops s; here it is merged.

    Kept: w. Trained, float32: ``a`` [*lead, O, rank], ``b`` [*lead, rank, O], ``mask`` and ``scale`` (from 1) [*lead, O].
    """

    rank: int = 200
    identity: float = 1.0
    scaled: bool = True
    exact = True

    def init(
        self, key: Array, w: Array, at: Array | None = None, base: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if w.ndim < 2 or self.rank < 1:
            raise ValueError(f"a weight of shape {w.shape} has no operator of rank {self.rank} on its output channels")
        *lead, _, width = w.shape
        bound = 1 / math.sqrt(width)
        trained = {
            "a": jax.random.uniform(key, (*lead, width, self.rank), jnp.float32, -bound, bound),
            "b": jnp.zeros((*lead, self.rank, width), jnp.float32),
            "mask": jnp.full((*lead, width), 0.5, jnp.float32),
        }
        return w, trained | ({"scale": jnp.ones((*lead, width), jnp.float32)} if self.scaled else {})

    def factor(self, trained: dict[str, Array]) -> Array:
        """What each output channel is multiplied by."""
        m = trained["mask"]
        there = straight_through((m >= 0).astype(m.dtype), m)
        return there * trained["scale"] if self.scaled else there

    def bind(self, kept: Array, trained: dict[str, Array], structured: bool, key: Array | None = None) -> Any:
        parts = (kept, trained["a"], trained["b"], self.factor(trained))
        return SparsifiedWeight(*parts) if structured else _formed(*parts).astype(kept.dtype)

    def encode(self, base: Array | None, kept: Array, trained: dict[str, Array]) -> delta.Encoding:
        formed = _formed(kept, trained["a"], trained["b"], self.factor(trained))
        return delta.Dense(formed - kept.astype(jnp.float32))

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        """b and the scale's distance from 1 are the distance from the base."""
        channel = delta.Leaf((..., COLUMNS), matrices=None, origin=None)
        trained = {
            "a": delta.Leaf((..., COLUMNS, None), origin=None),
            "b": delta.Leaf((..., None, COLUMNS)),
            "mask": channel,
        }
        return delta.Leaf(), trained | ({"scale": dataclasses.replace(channel, origin=1.0)} if self.scaled else {})

    def penalty(self, kept: Array, trained: dict[str, Array]) -> Array | None:
        """``identity * mean((a^T a - 1)^2)``, summed over modules."""
        if not self.identity:
            return None
        gram = jnp.einsum("...or,...os->...rs", trained["a"], trained["a"])
        return self.identity * jnp.sum(jnp.mean(jnp.square(gram - jnp.eye(self.rank)), axis=(-1, -2)))


def _masks(trained: Mapping[str, Any]) -> dict[str, Array]:
    masks = {p: t["mask"] for p, t in trained.items() if isinstance(t, Mapping) and "mask" in t}
    if not masks:
        raise ValueError("no weight here has a channel mask; this goes with train=Sparsified()")
    return masks


def tie(gradient: Mapping[str, Any]) -> dict[str, Any]:
    """``gradient`` with that of every channel mask replaced by the sum of all: the copies of one mask stay equal."""
    masks = _masks(gradient)
    total = sum(m.reshape(-1, m.shape[-1]).sum(0) for m in masks.values())
    return {p: {**t, "mask": jnp.broadcast_to(total, masks[p].shape)} if p in masks else t for p, t in gradient.items()}


@dataclasses.dataclass(frozen=True)
class Tied(Rule):
    """:func:`tie` of every gradient: all copies of the channel mask stay one."""

    def gradient(self, plan: Any, kept: Any, trained: Any, gradient: Any, memory: Any) -> tuple[Any, Any]:
        return tie(gradient), memory


def open_channels(trained: Mapping[str, Any]) -> np.ndarray:
    """The channels whose mask is open, sorted: what :func:`jft.methods.width.prune_width` keeps."""
    mask = np.asarray(next(iter(_masks(trained).values())))
    return np.flatnonzero(mask.reshape(-1, mask.shape[-1])[0] >= 0)


@dataclasses.dataclass(frozen=True)
class ChannelBudget:
    """``weight * |open channels / count - 1| + spread * (mean (m - 1/2)^2 of open m + mean (m + 1/2)^2 of closed m)``.

    count: ``fraction`` of the channels. Counting passes straight through, so every channel is pushed alike until ``count`` are
    open; the second term keeps open and closed channels apart. PAT's code has weight 10 and spread 1 (Liu et al. 2024,
    arXiv:2408.14721). It acts on one copy of the mask; see :func:`tie`.
    """

    fraction: float
    weight: float = 10.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a fraction that is none."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it is that of the channels that stay, above 0 and up to 1")

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Array:
        mask = next(iter(_masks(trained).values()))
        m = mask.reshape(-1, mask.shape[-1])[0]
        there = (m >= 0).astype(m.dtype)
        count = max(1, round(self.fraction * m.shape[0]))
        excess = absolute(jnp.sum(straight_through(there, m)) / count - 1)
        away = jnp.float32(0)
        for on, middle in ((there, 0.5), (1 - there, -0.5)):
            away += jnp.sum(on * jnp.square(m - middle)) / jnp.maximum(jnp.sum(on), 1)
        return self.weight * excess + self.spread * away


@register("pat", paper="Liu et al. 2024, arXiv:2408.14721")
def pat(
    fraction: float = 0.75,
    rank: int = 200,
    identity: float = 1.0,
    include: Patterns = (r"^embed/table$", r"attn/o/w$", r"mlp/down/w$"),
) -> Method:
    """Train light operators on what writes to the residual stream and one mask of its channels, which are then removed.

    fraction: of the channels that stay (the paper: 3072 of 4096 in a LLaMA2-7B). rank: of the operators. identity: weight of
    the loss that keeps them near orthogonal. include: what writes to the residual stream; it is part of the method, so
    other patterns replace these. Afterwards :func:`jft.methods.width.prune_width` of the open channels gives the smaller
    model. The paper trains LoRA beside.
    """
    train = Sparsified(rank, identity)
    return Method(Select(patterns(include)), train, penalties=(ChannelBudget(fraction),), rule=Tied())
