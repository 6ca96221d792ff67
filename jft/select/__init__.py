"""What to fine-tune: scores, the units they are pooled into, and exact budgets found without sorting or gathering."""

from jft.select.budget import Everything, Flops, Globally, PerLayer, PerLeaf, PerMatrix, choose, plan_flops
from jft.select.threshold import top, top_each, top_together
from jft.select.unit import Unit
from jft.select.units import Block, Channel, Column, Entry, Expert, Head, Layer, Matrix, Name, Row, spread

__all__ = [
    "Block",
    "Channel",
    "Column",
    "Entry",
    "Everything",
    "Expert",
    "Flops",
    "Globally",
    "Head",
    "Layer",
    "Matrix",
    "Name",
    "PerLayer",
    "PerLeaf",
    "PerMatrix",
    "Row",
    "Unit",
    "choose",
    "plan_flops",
    "spread",
    "top",
    "top_each",
    "top_together",
]
