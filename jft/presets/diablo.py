"""DiaBlo: the diagonal blocks of every matrix train."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta
from jft.methods.card import Card
from jft.methods.parametrise import Additive
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Additive):
    """``y = x w + x blockdiag(D_1, ..., D_N)``: N trained blocks of ``I/N x O/N`` on the diagonal of each ``w[I, O]``.

    DiaBlo, Gurses et al. 2025, arXiv:2506.03230 (N of 64 and 128). D starts at zero, and the product is one batched small
    product beside the frozen one: ``I * O / N`` trained values for a matrix. N must divide I and O (the released code pads
    with rows that have no input instead). Kept: w. Trained: float32 ``[*lead, N, I/N, O/N]``.
    """

    blocks: int = 64

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return delta.Leaf(), delta.DiagonalBlocks.leaves

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Array, Array]:
        # A vector gets no rows, so that the error below, with advice, is the one raised.
        *lead, rows, columns = w.shape if w.ndim > 1 else (0, 0)
        if not rows or self.blocks < 1 or rows % self.blocks or columns % self.blocks:
            raise ValueError(
                f"a weight of shape {w.shape} has no {self.blocks} diagonal blocks of one size; choose a number that divides "
                "its rows and its columns, or narrow select.include"
            )
        shape = (*lead, self.blocks, rows // self.blocks, columns // self.blocks)
        return w, jnp.zeros(shape, jnp.float32)

    def change(self, kept: Array, trained: Array) -> delta.Change:
        return delta.DiagonalBlocks(trained)


CARD = Card(
    formula="y = x w + x blockdiag(D_1, ..., D_N), D from 0, each D_i of I/N x O/N",
    follows="paper and code",
    check="forward, gradients, three steps and the encoding, float64 NumPy",
    code="ziyangjoy/DiaBlo@83ffb6cd, diablo/block_linear.py, train.py",
    departs=(
        "No dropout on what goes into the blocks (code: 0.05). All matrices inside the layers (code: q, k, v, up and down). N "
        "has to divide both sides (code: pads)."
    ),
    defaults={"blocks": ("64 and 128", 64)},
)


@register("diablo", paper="Gurses et al. 2025, arXiv:2506.03230", card=CARD)
def diablo(blocks: int = 64) -> Method:
    """Train the diagonal blocks of every matrix inside the layers.

    blocks: N of them for each matrix, of ``I / N x O / N``; N must divide both sides.
    """
    return Method(Select(linear_only=True), BlockDiagonal(blocks))
