"""What searches for layers share: the candidates, and which of two evaluations is better."""

from __future__ import annotations

from collections.abc import Mapping

from jft import tree
from jft.models.core import is_jft_model
from jft.select.calibration import Calibration

HIGHER_IS_BETTER = ("accuracy",)


def stacks(calibration: Calibration) -> dict[str, int]:
    """The stacks of layers that have candidates, and how many layers each has."""
    if not is_jft_model(calibration.model):
        raise ValueError(
            "layers are told apart in jft's own models, whose weights are stacked; select by pattern instead"
        )
    lengths = tree.stacks({p: calibration.params[p] for p in calibration.paths})
    if not lengths:
        raise ValueError(f"none of the candidates is in a layer: {', '.join(calibration.paths[:3])}")
    return lengths


def better(metric: str, metrics: Mapping[str, float]) -> float:
    """A metric of an evaluation, such that more is better."""
    if metric not in metrics:
        raise ValueError(f"evaluation gives {', '.join(metrics)}, not {metric!r}")
    return metrics[metric] if metric in HIGHER_IS_BETTER else -metrics[metric]
