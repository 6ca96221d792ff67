"""Precise SFT: the attention heads that carry the right answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.calibration import Calibration
from jft.select.heads import patching, rolled
from jft.select.scores import Scores
from jft.select.structured import CHOSEN, SIDES, attention, floor_count, spread_heads
from jft.select.threshold import top

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PatchedHeads:
    """1 for the columns of q, k, v and rows of o of the heads that carry the right answers most, by path patching.

    heads: how many, of all layers together, as a fraction (rounded down, at least one) or a number. mlps: likewise how many
    whole MLPs. counterfactual, freeze: see :func:`jft.select.heads.patching`. Keys and values that several query heads
    read are chosen with any of them.
    """

    heads: float
    mlps: int = 0
    batches: int = 1
    counterfactual: Callable[[Any], Any] | None = rolled
    freeze: bool = True

    def __call__(self, calibration: Calibration) -> Scores:
        effects = patching(calibration, self.batches, self.counterfactual, freeze=self.freeze, mlps=bool(self.mlps))
        of_heads = {name: x for name, x in effects.items() if name.endswith("/o")}
        total = sum(x.size for x in of_heads.values())
        # A value below 1 is a fraction of the heads, from 1 up a number of them.
        wanted = int(self.heads) if self.heads >= 1 else floor_count(self.heads, total)
        chosen = top(of_heads, wanted)
        of_mlps = {name: x for name, x in effects.items() if name not in of_heads}
        if of_mlps:
            chosen |= top(of_mlps, self.mlps)
        return {p: self._unit(calibration, p, chosen) for p in calibration.paths}

    def _unit(self, calibration: Calibration, path: str, chosen: Mapping[str, Array]) -> Array:
        module, name, _ = path.rsplit("/", 2)
        shape = calibration.params[path].shape
        if module.endswith("mlp"):
            # Times 1.0: scores are floats, and the mask is bool.
            return jnp.broadcast_to(chosen[f"{module}/down"], (shape[0], shape[1 if name == "down" else 2])) * 1.0
        mask, extent = chosen[f"{module}/o"], shape[1 if name == "o" else 2]
        count, groups = attention(calibration, path)
        # Keys and values of a group train where any of its query heads was chosen.
        if name in "kv" and groups < count:
            mask = jnp.any(mask.reshape(len(mask), groups, -1), axis=-1)
        return spread_heads(mask, extent)


CARD = Card(
    formula=(
        "A head's score is the mean over targets of logit(right answer) - the same with the head's output replaced by that on "
        "a counterfactual prompt, all other heads held at their own; the best train: their columns of q, k, v and rows of o"
    ),
    follows="Paper: path patching, heads of all layers compared, fewer than 5% of them, their slices. No public code.",
    departs=(
        "The paper writes counterfactuals by hand, prompts without the arithmetic; the default is the next example of the "
        "batch. It says neither how many heads nor how many MLPs of a model train; here it is a fraction, and no MLP."
    ),
    defaults={"heads": ("<5%", "-"), "freeze": (True, "-")},
    check="heads and MLPs by one forward pass for each, and steps of their slices against float64 NumPy",
)


@register("precise_sft", paper="Zhang et al. 2024, arXiv:2409.01659", card=CARD)
def precise_sft(
    heads: float = 0.05,
    mlps: int = 0,
    batches: int = 1,
    counterfactual: Callable[[Any], Any] | None = rolled,
    freeze: bool = True,
) -> Method:
    """Train the few attention heads that carry the right answers: their columns of q, k, v and rows of o.

    heads: how many, of all layers together, as a fraction or a number. Each is scored by how far the right answer's logit
    falls over ``batches`` when the head says what it says on ``counterfactual(batch)``, only along paths through no other
    head (``freeze``; see :func:`jft.select.heads.patching`). The paper makes counterfactuals by hand, from prompts without
    the arithmetic; the default is another example of the batch. mlps: whole MLPs trained as well, the best by the same
    measure; every layer then pays for its MLP's gradient, with those that are not chosen as padding.
    """
    include = r"attn/(q|k|v|o)/w$" + (r"|mlp/(up|gate|down)/w$" if mlps else "")
    choice = PatchedHeads(heads, mlps, batches, counterfactual, freeze)
    select = Select((include,), linear_only=True, score=choice, granularity=SIDES, budget=CHOSEN)
    return Method(select, InPlace())
