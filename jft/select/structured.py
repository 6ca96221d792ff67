"""Helpers for scores of parts that several weights share: attention heads, MLP channels, experts, slots of a memory.

Each gives one number for every unit of a weight (a row, a column, an expert), not for every entry. Those that choose by
themselves, so that coupled weights choose the same, give 1 for the chosen units and 0 for the rest: they go with the budget
:class:`jft.select.budget.Beyond` 0.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jft.select.budget import Beyond
from jft.select.calibration import Calibration
from jft.select.granularity import Column, Row, spread

Array = jax.Array
# The budget of a score that is 1 for chosen units, and the axis of heads and channels in each weight.
CHOSEN = Beyond(0.0)
SIDES = (
    (r"attn/o/w$|mlp/down/w$", Row()),
    (r"attn/(q|k|v)/w$|mlp/(up|gate)/w$", Column()),
)


def attention(calibration: Calibration, path: str) -> tuple[int, int]:
    """Query heads, and heads of keys and values, of the attention that the weight at ``path`` belongs to."""
    config = getattr(getattr(calibration.model, "config", None), "backbone", getattr(calibration.model, "config", None))
    # CLIP has two towers, each with its number of heads.
    tower = getattr(config, path.split("/")[0], None)
    config = tower if hasattr(tower, "heads") else config
    heads = getattr(config, "heads", None)
    if not heads:
        raise ValueError(f"how many heads {path} has is known for jft's own models alone")
    return heads, getattr(config, "kv_heads", None) or heads


def floor_count(ratio: float, of: int) -> int:
    """``floor(ratio of)``, at least one."""
    # 0.29 * 100 is a little below 29 in binary.
    return min(of, max(1, math.floor(ratio * of + 1e-9)))


def spread_heads(mask: Array, extent: int) -> Array:
    """A mask of heads as 1 and 0 for each of ``extent`` rows or columns."""
    return spread(mask, extent // mask.shape[-1]).astype(jnp.float32)
