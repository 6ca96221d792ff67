"""TR-PTS: as many connections of every neuron as its layer's share of the Fisher information earns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores
from jft.select.calibration import Per
from jft.select.columns import rows_of, top_of_columns

Array = jax.Array

CARD = Card(
    formula="w_l: how many of the largest top * n entries of F (the mean squared gradient) lie in layer l. C_l = max(1, "
    "floor(w_l / min(w) * minimum)), at most the inputs of a neuron. Of every neuron (column) of layer l the C_l entries with "
    "the largest F train.",
    follows="paper, as two summaries of it give the equation of C_l; its repository holds no code",
    departs="The paper's text was not at hand: a layer is read as a transformer block, whose matrices share one C_l; C_l is "
    "rounded down; min(w) is over layers that hold some of the top entries, others get 1. The M of its top M % and C_min are "
    "not known. Tokens are selected by the vision model (VisionConfig(selection=...)), not here.",
    defaults={"top": ("M %, unknown", "-"), "minimum": ("C_min, unknown", "-"), "per": ("example", "-")},
    check="entries and three Adam steps against float64 NumPy: counts by layer, then a sort of every column",
)


@dataclasses.dataclass(frozen=True)
class ByContribution:
    """The entries of TR-PTS: ``C_l`` of each column, by how much of the global ``top`` lies in layer l (see :data:`CARD`)."""

    top: float
    minimum: int

    def __post_init__(self) -> None:
        """Refuse what is no number of connections."""
        # True is an int in Python, and no count.
        if isinstance(self.minimum, bool) or not isinstance(self.minimum, int) or self.minimum < 1:
            raise ValueError(f"minimum is {self.minimum!r}; give how many connections a neuron has at least, from 1")

    def masks(self, found: Mapping[str, Array], largest: bool, leads: Mapping[str, int]) -> dict[str, Array]:
        """``{path: mask}`` of scores of matrices by path."""
        rows = {p: rows_of(p, x, leads[p]) for p, x in found.items()}
        counts = self._counts(found, largest, leads)
        return {p: top_of_columns(x, np.minimum(counts[p], rows[p]), largest) for p, x in found.items()}

    def share(self, shape: tuple[int, ...]) -> int:
        """How many entries of a matrix are selected where all layers contribute the same."""
        return min(self.minimum, shape[-2]) * shape[-1]

    def _counts(self, found: Mapping[str, Array], largest: bool, leads: Mapping[str, int]) -> dict[str, np.ndarray]:
        """C_l of each matrix, of the shape of its leading axes."""
        over = budget.choose(found, dict.fromkeys(found, 1), leads, budget.Globally(density=self.top), largest)
        # On the host in int64: the product below would overflow int32 for large matrices.
        held = {p: np.asarray(jnp.sum(m, axis=(-2, -1), dtype=jnp.uint32), np.int64) for p, m in over.items()}
        layers = []  # of each group of paths: the weight of each of its layers
        for paths, lead in budget.PerLayer(density=self.top).groups(leads):
            layers.append((paths, sum(held[p].sum(axis=tuple(range(lead, held[p].ndim))) for p in paths)))
        # Layers that hold none of the top are left out, or the ratio would be infinite.
        least = min(int(w[w > 0].min()) for _, w in layers if (w > 0).any())
        out = {}
        for paths, weight in layers:
            connections = np.maximum(1, weight * self.minimum // least)
            for p in paths:
                # Experts of a layer have the layer's number each.
                inner = (1,) * (held[p].ndim - np.ndim(connections))
                out[p] = np.broadcast_to(np.reshape(connections, np.shape(connections) + inner), held[p].shape)
        return out


@register("tr_pts", paper="Luo et al. 2025, arXiv:2507.22872", card=CARD)
def tr_pts(
    top: float = 0.005,
    minimum: int = 1,
    count: int = 1024,
    per: Per = "example",
) -> Method:
    """Train, of every neuron of the matrices inside the layers, the connections with the largest Fisher information.

    top: the fraction of all entries, those with the most information, that is counted by layer: layer l, a transformer block,
    holds ``w_l`` of them. minimum: a neuron (an output column of ``[I, O]``) of the layer that holds the fewest has so many
    connections, one of layer l ``C_l = max(1, w_l / min(w) * minimum)`` rounded down, at most I. So no neuron is without one,
    and ``top`` is not the density: a layer with hundreds of times as many as the last trains whole; see how much a plan trains,
    or take a larger ``top``, whose layers differ less. count, per: as in ``fish_mask``. Layers of one stack are padded to
    the one that selects most.

    The parameter half of TR-PTS. The other, tokens dropped by the attention of [CLS], is an option of the vision model:
    ``VisionConfig(selection=TokenSelection(...))``. The head trains by ``also=``.
    """
    limit = ByContribution(top, minimum)
    return Method(Select(linear_only=True, score=scores.Fisher(count, per), budget=limit), InPlace())
