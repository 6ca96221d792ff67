"""Fine-tuning methods: what is selected, how it trains, and the registry of published presets."""

from jft.methods import presets as presets
from jft.methods import presets_entries as presets_entries
from jft.methods import presets_layers as presets_layers
from jft.methods import presets_linearized as presets_linearized
from jft.methods import presets_low_rank as presets_low_rank
from jft.methods import presets_masked as presets_masked
from jft.methods import presets_sparse as presets_sparse
from jft.methods import presets_structured as presets_structured
from jft.methods import presets_updates as presets_updates
from jft.methods.layers import SomeLayers
from jft.methods.low_rank import LowRank, LowRankFixed
from jft.methods.parametrise import InPlace, InPlaceSelected, Parametrisation
from jft.methods.plan import Method, Plan, Select
from jft.methods.registry import Entry, entries, method, register

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
