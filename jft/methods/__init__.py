"""Fine-tuning methods: what is selected, how it trains, and the registry of published presets."""

from jft.methods.layers import SomeLayers
from jft.methods.low_rank import LowRank, LowRankFixed
from jft.methods.parametrise import InPlace, InPlaceSelected, Parametrisation
from jft.methods.plan import Method, Plan
from jft.methods.registry import Entry, entries, method, register
from jft.methods.select import Select

__all__ = [
    "Entry",
    "InPlace",
    "InPlaceSelected",
    "LowRank",
    "LowRankFixed",
    "Method",
    "Parametrisation",
    "Plan",
    "Select",
    "SomeLayers",
    "entries",
    "method",
    "register",
]
