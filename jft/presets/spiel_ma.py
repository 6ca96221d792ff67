"""SpIEL-MA: entries that drop, and grow by the momentum of SM3."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import DropAndGrow
from jft.methods.select import Select
from jft.select import budget, scores


@register("spiel_ma", paper="Ansell et al. 2024, arXiv:2401.16405")
def spiel_ma(
    density: float = 0.01,
    every: int = 20,
    first: float = 0.2,
    batches: int = 5,
) -> Method:
    """As spiel_ag, growing by the momentum that SM3 keeps in one number per row and column: ``row * column``."""
    select = Select(linear_only=True, score=scores.Random(), budget=budget.PerMatrix(density=density))
    return Method(select, InPlace(), schedule=DropAndGrow(every, first, batches, "sm3"))
