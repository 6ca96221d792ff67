"""What fine-tuning changed, as values to do arithmetic with: encodings, task vectors, the file format."""

from jft.delta.encoding import Dense, Encoding, Sum, kinds, register, rule
from jft.delta.low_rank import LowRank
from jft.delta.rows import Rows

__all__ = ["Dense", "Encoding", "LowRank", "Rows", "Sum", "kinds", "register", "rule"]
