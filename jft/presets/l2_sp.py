"""L2-SP: decay to the pretrained values."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.patterns import HEADS
from jft.methods.penalties import L2SP
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("l2_sp", paper="Li, Grandvalet and Davoine 2018, arXiv:1802.01483")
def l2_sp(weight: float = 0.01) -> Method:
    """Train every weight but the head's, drawn to its pretrained value by ``weight / 2`` times the squared distance.

    A new head trains with ``also="^classifier/"``, and is then drawn to its first value as well.
    """
    return Method(Select(exclude=HEADS), InPlace(), penalties=(L2SP(weight),))
