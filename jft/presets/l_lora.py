"""L-LoRA: a low-rank change that the model is linear in."""

from __future__ import annotations

from jft.methods.low_rank import LowRankFixed
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("l_lora", paper="Tang et al. 2023, arXiv:2310.04742")
def l_lora(rank: int = 16, alpha: float | None = None) -> Method:
    """Train a low-rank change of every matrix inside the layers, of the model linearized in its factors at their start.

    There ``b`` is zero, so that the derivative in ``a`` is: tau is ``(alpha / rank) a0 b``, with ``a0`` as LoRA draws it, and
    outputs are linear in what trains. alpha: default ``rank``. ``lora`` with ``forward="linearized"`` trains both factors:
    linear in tau, not in them.
    """
    how = LowRankFixed(rank, float(rank if alpha is None else alpha))
    return Method(Select(linear_only=True), how, forward="linearized")
