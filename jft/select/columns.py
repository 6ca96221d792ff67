"""Budgets for each column of a matrix `[I, O]`: for the weights into one output neuron."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jft.select.budget import Budget
from jft.select.threshold import top_each

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PerColumn(Budget):
    """The budget again for each column of each matrix ``[I, O]``: a density or a count of the weights into one neuron.

    It is what Wanda's scores are compared in (Sun et al. 2023, arXiv:2306.11695). Scores must be of entries of matrices; ties
    go to earlier rows.
    """

    amounts: ClassVar[tuple[str, ...]] = ("density", "count")

    def masks(self, scores: Mapping[str, Array], largest: bool, leads: Mapping[str, int]) -> dict[str, Array]:
        """Their masks. Raises ``ValueError`` for vectors, and where a column has fewer entries than the count."""
        rows = {p: rows_of(p, x, leads[p]) for p, x in scores.items()}
        counts = {p: self.units(rows[p], 1, f"each column of {p}") for p in scores}
        return {p: top_of_columns(x, counts[p], largest) for p, x in scores.items()}

    def share(self, shape: tuple[int, ...]) -> int:
        """How many entries of a matrix of the last two axes of ``shape`` are selected."""
        return self.units(shape[-2], 1, "each column") * shape[-1]


def rows_of(path: str, score: Array, lead: int) -> int:
    """I of the scores of matrices ``[*lead, I, O]``. Raises ``ValueError`` where they are of something else."""
    if score.ndim - lead != 2:
        raise ValueError(
            f"{path} with scores of shape {score.shape} holds no matrices, so it has no columns; select matrices"
        )
    return score.shape[-2]


def top_of_columns(score: Array, count: Any, largest: bool = True) -> Array:
    """The mask of the ``count`` best entries of each column of ``score[*lead, I, O]``, sharded like it.

    count: one number, or integers of shape ``[*lead]``, those of all columns of a matrix.
    """
    # `top_each` takes leading axes as the groups.
    transposed = jnp.swapaxes(score, -1, -2)
    counts: Any = np.broadcast_to(np.asarray(count)[..., None], transposed.shape[:-1])
    mask = jnp.swapaxes(top_each(transposed, counts, transposed.ndim - 1, largest), -1, -2)
    # The transposes may have left the mask with another sharding.
    return mask if isinstance(mask, jax.core.Tracer) else jax.device_put(mask, score.sharding)
