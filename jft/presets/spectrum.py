"""Spectrum: of every kind of matrix those with the most signal over noise, by random matrix theory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from jft import tree
from jft.compiled import program_cache
from jft.methods import Card, InPlace, Method, Select, register
from jft.select.budget import Budget
from jft.select.calibration import Calibration
from jft.select.granularity import Matrix
from jft.select.scores import Scores

Array = jax.Array
IQR = 1.349  # the interquartile range of a normal distribution of standard deviation 1
AROUND = (r"(^|/)(table|cls)$|(^|/)(patch|head|classifier)/",)


@dataclasses.dataclass(frozen=True)
class SignalToNoise:
    """``(sum of s_i > edge) / (sum of s_i <= edge) / s_1`` of the singular values ``s_1 >= s_2 >= ...`` of each matrix.

    edge ``= sigma (1 + sqrt(d / D))``, the Marchenko-Pastur edge of a D x d matrix with d <= D, for sigma the interquartile
    range of the singular values over 1.349. Where none is at or below the edge the divisor is 1; a matrix of zeros scores
    infinity. The division by s_1 weighs most: a strong part of rank 3 in noise scores below noise alone. One number for each
    matrix, ``[*lead]``, float32. Matrices that stack experts, and vectors, are refused.
    """

    def __call__(self, calibration: Calibration) -> Scores:
        ratios = {}
        for path in calibration.paths:
            w, lead = calibration.params[path], calibration.lead(path)
            if w.ndim - lead != 2 or lead > 1:
                what = "stacks matrices of experts" if lead > 1 else "holds no matrices"
                raise ValueError(
                    f"{path} of shape {w.shape} {what}, which spectrum does not rank; leave it out (exclude={path!r})"
                )
            ratios[path] = _ratios(lead)(w)
        return ratios


@program_cache
def _ratios(lead: int) -> jax.stages.Wrapped:
    # One layer after the other, so that float32 copies and factors of one only are held.
    return jax.jit(lambda w: jax.lax.map(signal_to_noise, w) if lead else signal_to_noise(w))


def signal_to_noise(w: Array) -> Array:
    """The ratio of one matrix ``[I, O]``; see :class:`SignalToNoise`."""
    s = jnp.linalg.svd(w.astype(jnp.float32), compute_uv=False)
    low, high = jnp.quantile(s, jnp.asarray([0.25, 0.75]))
    edge = (high - low) / IQR * (1 + (min(w.shape) / max(w.shape)) ** 0.5)
    above = s > edge
    signal, noise = jnp.sum(jnp.where(above, s, 0)), jnp.sum(jnp.where(above, 0, s))
    # The inner where keeps the division by a noise of 0 out of matrices that have none.
    return jnp.where(s[0] > 0, signal / jnp.where(jnp.all(above), 1.0, noise) / s[0], jnp.inf)


@dataclasses.dataclass(frozen=True)
class PerType(Budget):
    """The budget again for each kind of weight, those of all layers together, stacked or numbered in their paths."""

    def groups(self, leads: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
        kinds: dict[str, list[str]] = {}
        for path in leads:
            layer = tree.layer_of(path)
            # Layers that are numbered are taken together by their path without the number.
            kind = path if layer is None else layer[0].rstrip("0123456789") + path[len(layer[0]) :]
            kinds.setdefault(kind, []).append(path)
        for paths in kinds.values():
            # 0 leading axes: the layers of a kind compete with each other.
            yield paths, 0


CARD = Card(
    formula="snr(W) = sum(s_i > e) / sum(s_i <= e) / s_1 with singular values s, e = sigma (1 + sqrt(d / D)) for W of D x d, "
    "sigma = (q75(s) - q25(s)) / 1.349; of each type of matrix (q_proj of all layers, say) the floor(density * layers) with "
    "the largest snr train in full, once chosen, from the base alone",
    follows="the code throughout: sigma, interpolated quantiles, the division by s_1, the divisor 1 where nothing is noise, "
    "rounding, and the embedding and output head that always train; the paper names the ratio, the Marchenko-Pastur edge and "
    "the two shares",
    check="snr of every matrix and the chosen layers against float64 NumPy; three steps of Adam on them",
    code="cognitivecomputations/spectrum@0ed1756, spectrum.py",
    departs="at least one matrix of each type trains, where the code takes none of types with fewer than 1 / density layers; "
    "norms stay frozen: the code ranks vectors too, all alike, and so takes those of the first layers, under 0.01 % of the "
    "weights (also='norm' trains all); experts are refused, which the code ranks each with its like of the other layers",
    defaults={"density": ("0.25 and 0.5", 0.5), "around": ("-", True)},
)


@register("spectrum", paper="Hartford et al. 2024, arXiv:2406.06623", card=CARD)
def spectrum(density: float = 0.5, around: bool = True) -> Method:
    """Train the matrices with the highest signal-to-noise ratio, the best of each type over all layers.

    density: which share of the layers of each type, rounded down, at least one (the paper's Spectrum-25 and Spectrum-50).
    around: the embedding and the output head train as well, as they do in the lists that the authors' code writes; False
    for a model without. The scores are those of the base's singular values; no data is read.
    """
    select = Select(linear_only=True, score=SignalToNoise(), granularity=Matrix(), budget=PerType(density=density))
    return Method(select, InPlace(), also=AROUND if around else ())
