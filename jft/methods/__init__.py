"""Fine-tuning methods: what is selected, how it trains, and the registry of published presets."""

from jft.methods.card import Card
from jft.methods.layers import SomeLayers
from jft.methods.low_rank import LowRank, LowRankFixed, WithLowRank
from jft.methods.parametrise import InPlace, InPlaceSelected, Parametrisation
from jft.methods.penalties import L2SP, L1ToBase, Nuclear
from jft.methods.plan import Method, Plan
from jft.methods.registry import Entry, entries, method, register
from jft.methods.schedules import After, Refresh
from jft.methods.select import Select

__all__ = [
    "L2SP",
    "After",
    "Card",
    "Entry",
    "InPlace",
    "InPlaceSelected",
    "L1ToBase",
    "LowRank",
    "LowRankFixed",
    "Method",
    "Nuclear",
    "Parametrisation",
    "Plan",
    "Refresh",
    "Select",
    "SomeLayers",
    "WithLowRank",
    "entries",
    "method",
    "register",
]
