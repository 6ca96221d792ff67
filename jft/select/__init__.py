"""What to fine-tune: scores, the units they are pooled into, and exact budgets found without sorting or gathering."""

from jft.select.budget import Everything, Flops, Globally, PerLayer, PerLeaf, PerMatrix, choose
from jft.select.columns import PerColumn
from jft.select.flops import plan_flops
from jft.select.granularity import (
    Block,
    Channel,
    Column,
    Entry,
    Expert,
    Granularity,
    Head,
    Layer,
    Matrix,
    Name,
    Row,
    spread,
)
from jft.select.threshold import top, top_each, top_together

__all__ = [
    "Block",
    "Channel",
    "Column",
    "Entry",
    "Everything",
    "Expert",
    "Flops",
    "Globally",
    "Granularity",
    "Head",
    "Layer",
    "Matrix",
    "Name",
    "PerColumn",
    "PerLayer",
    "PerLeaf",
    "PerMatrix",
    "Row",
    "choose",
    "plan_flops",
    "spread",
    "top",
    "top_each",
    "top_together",
]
