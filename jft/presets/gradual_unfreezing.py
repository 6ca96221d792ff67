"""Gradual unfreezing of ULMFiT: from the top down, one more layer in each epoch, embeddings last."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jft import tree
from jft.methods import Card
from jft.methods.layer_schedules import Staged
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.layers import Choice, Last

# Modules before the layers: embeddings of tokens, patches, positions and segments, and the norm of their sum.
EMBEDDINGS = re.compile(r"(^|/)(patch|cls|types|relative|\w*embed\w*|\w*position\w*)(/|$)", re.IGNORECASE)


def _layer(path: str, shape: Sequence[int]) -> tuple[str, int | None, int] | None:
    """``(stack, number or None where the leaf stacks them, layers it shows)`` of a leaf in a layer; None outside."""
    if (numbered := tree.layer_of(path)) is not None:
        # A numbered layer i shows that the stack has at least i + 1 layers.
        return numbered[0].removesuffix(str(numbered[1])), numbered[1], numbered[1] + 1
    stack = tree.stack_of(path)
    return None if stack is None else (stack, None, shape[0])


def depths(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """``{stack: layers}`` of weights by path, whose layers are stacked (``layers/..``) or numbered (``blocks/3/..``)."""
    lengths: dict[str, int] = {}
    for path, shape in shapes.items():
        if (layer := _layer(path, shape)) is not None:
            lengths[layer[0]] = max(layer[2], lengths.get(layer[0], 0))
    if not lengths:
        raise ValueError("this model's paths carry no layers (layers/..., blocks/3/...); select by pattern instead")
    return lengths


@dataclasses.dataclass(frozen=True)
class FromTheTop(Choice):
    """The last layers of every stack with what stands behind them; once no layer is left, the embeddings.

    last: ``Last(count)``, with embeddings where count is beyond the layers of every stack, or ``Last(share=...)``, with them
    at a share of 1.
    """

    last: Last

    def __str__(self) -> str:
        return str(self.last)

    def __call__(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...] | None]:
        lengths = depths(shapes)
        # Compared over all stacks: an encoder with two towers unfreezes its embeddings when the deeper one is through.
        all_in = self.last.count > max(lengths.values()) or self.last.share[0] == self.last.share[1]
        table: dict[str, tuple[int, ...] | None] = {}
        for path, shape in shapes.items():
            layer = _layer(path, shape)
            if layer is None:
                if all_in or not EMBEDDINGS.search(path):
                    table[path] = None
                continue
            stack, number, _ = layer
            inside = self.last.of(lengths[stack])
            if number is None and inside:
                table[path] = inside
            # A numbered layer has leaves of its own, which train whole.
            elif number in inside:
                table[path] = None
        return table


@dataclasses.dataclass(frozen=True)
class Unfreezing(Staged):
    """``first`` layers, then ``by`` more in each stage, then the embeddings; with ``stages``, an equal share in each.

    depth: the layers of the deepest stack, once they are known (:meth:`fitted`): without ``every`` and ``stages`` there
    are as many stages of equal length as it takes.
    """

    first: int = 1
    by: int = 1
    depth: int = 0

    def __post_init__(self) -> None:
        """Refuse stages that are given twice, and layers that go with neither."""
        if min(self.every, self.stages) < 0 or (self.every and self.stages):
            raise ValueError(f"every={self.every} and stages={self.stages}: give one of them, at least 1, or none")
        if self.first < 0 or self.by < 1:
            raise ValueError(f"first={self.first} and by={self.by} layers; at least 0 and 1")
        if self.stages and (self.first, self.by) != (1, 1):
            raise ValueError(
                f"first={self.first} and by={self.by} count layers, and stages={self.stages} gives each stage an equal share "
                "of them; leave out stages, or first and by"
            )

    def fitted(self, shapes: Mapping[str, Any]) -> Unfreezing:
        return dataclasses.replace(self, depth=max(depths({p: x.shape for p, x in shapes.items()}).values()))

    def stage(self, step: int, steps: int) -> int:
        if self.stages:
            return step * self.stages // steps
        # The last stage has more than all layers: the embeddings as well.
        last = -(-(self.depth + 1 - self.first) // self.by)
        if self.every:
            # Beyond the last stage nothing is left to unfreeze; the same stage means no reselection.
            return min(step // self.every, last) if self.depth else step // self.every
        if not self.depth:
            raise ValueError(
                "how many stages there are depends on the model; give every or stages, or use jft.finetune"
            )
        return step * (last + 1) // steps

    def select(self, select: Any, stage: int) -> Any:
        return dataclasses.replace(select, layers=FromTheTop(self.last(stage)))

    def last(self, stage: int) -> Last:
        """The layers of ``stage``."""
        return Last(share=(stage + 1, self.stages)) if self.stages else Last(self.first + stage * self.by)


CARD = Card(
    formula="stage s trains what stands behind the layers and the last first + s by of L layers; embeddings once that is "
    "more than L",
    follows="the paper: the last layer first, one more each epoch, the embeddings last",
    check="the layers of every stage by hand, and runs over them against float64 Adam",
    departs="a stage is an epoch in the paper: every=steps of an epoch; the default cuts the run into equal stages, one for "
    "each layer and one for the embeddings. The task head is the paper's last layer and is alone in its first epoch (first=0 "
    "here); it trains from the start with the last layer. Learning rates that fall with depth and the slanted triangular "
    "schedule are not part of this",
    defaults={"every": ("an epoch", "-"), "first": (1, "-"), "by": (1, "-")},
)


@register("gradual_unfreezing", paper="Howard and Ruder 2018, arXiv:1801.06146", card=CARD)
def gradual_unfreezing(
    every: int = 0,
    stages: int = 0,
    first: int = 1,
    by: int = 1,
) -> Method:
    """Train the last layer, then one more in each stage from the top down, the embeddings last.

    every: steps of a stage (the paper's is an epoch); 0 for as many equal stages as the model has layers, and one more for the
    embeddings. ``first`` layers train in the first stage and ``by`` more in each. stages: that many equal stages instead,
    with an equal share of the layers in each, all of them and the embeddings in the last; ``first`` and ``by`` are then
    refused. What stands behind the layers (final norm, head) trains from the start. What trains goes on with its values and
    moments. No backward pass runs below what trains. The paper's learning rates that fall with depth and its slanted
    triangular schedule are not part of this.
    """
    schedule = Unfreezing(every, stages, first=first, by=by)
    return Method(Select(layers=FromTheTop(schedule.last(0))), InPlace(), schedule=schedule)
