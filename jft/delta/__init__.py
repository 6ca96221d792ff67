"""What fine-tuning changed, as values to do arithmetic with: encodings, task vectors, the file format."""

from jft.delta import file

# Importing an encoding registers it: only those that are imported here can be read from files.
from jft.delta.bit_mask import BitMask
from jft.delta.blocks import BlockLayout, Blocks
from jft.delta.changed import Change, Changed, Leaf, Matrices
from jft.delta.diagonal import DiagonalBlocks
from jft.delta.encoding import Dense, Encoding, Sum
from jft.delta.entries import Entries, EntryLayout
from jft.delta.experts import ExpertLayout
from jft.delta.gate import Gate
from jft.delta.low_rank import LowRank
from jft.delta.manifest import BaseMismatch, derive, describe, describe_base
from jft.delta.n_m import NM
from jft.delta.product import Product
from jft.delta.quantized import Quantized
from jft.delta.random_bases import RandomBases
from jft.delta.registry import kinds, register, rule
from jft.delta.rows import Rows
from jft.delta.selected import Layout, Selected
from jft.delta.signs import Signs
from jft.delta.slices import SliceLayout, Slices
from jft.delta.task_vector import TaskVector, apply, revert
from jft.delta.ternary import Ternary

__all__ = [
    "NM",
    "BaseMismatch",
    "BitMask",
    "BlockLayout",
    "Blocks",
    "Change",
    "Changed",
    "Dense",
    "DiagonalBlocks",
    "Encoding",
    "Entries",
    "EntryLayout",
    "ExpertLayout",
    "Gate",
    "Layout",
    "Leaf",
    "LowRank",
    "Matrices",
    "Product",
    "Quantized",
    "RandomBases",
    "Rows",
    "Selected",
    "Signs",
    "SliceLayout",
    "Slices",
    "Sum",
    "TaskVector",
    "Ternary",
    "apply",
    "derive",
    "describe",
    "describe_base",
    "file",
    "kinds",
    "register",
    "revert",
    "rule",
]
