"""Tangent space: models linearized at their base, ``f(theta0) + J(theta0) tau``, and what can be done with them."""

from jft.tangent.forward import entered, forward, pair, together
from jft.tangent.lean import Lean
from jft.tangent.linearized import Linearized, linearize

__all__ = ["Lean", "Linearized", "entered", "forward", "linearize", "pair", "together"]
