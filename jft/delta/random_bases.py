"""`RandomBases`: a delta that is a sum of random matrices with scales between them, stored as a key and the scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jft.delta.changed import COLUMNS, ROWS, Change, Leaf
from jft.delta.encoding import Encoding
from jft.delta.low_rank import LowRank
from jft.delta.numeric import wide
from jft.delta.registry import register

Array = jax.Array


@register("random_bases", data=("key", "gamma", "lam"), static=("across", "axis"))
@dataclasses.dataclass(frozen=True, eq=False)
class RandomBases(Encoding, Change):
    """``delta = sum over n of B_n diag(lam_n) A diag(gamma_n)``, or its transpose, with random A and B_n that are not stored.

    A ``[r, d]`` and B_n ``[across, r]`` are uniform in ``+-sqrt(3)``, of variance 1, and drawn anew from ``key`` wherever
    they are used (:func:`uniform`): the same on any number of devices. key: uint32 ``[*lead, 2]``, one for each matrix.
    gamma ``[*lead, N, d]``, lam ``[*lead, N, r]``, any scale already in ``lam``. axis: along which axis of the weight
    ``[*lead, I, O]`` gamma runs: its columns (-1: d = O, across = I) or its rows (-2: d = I, across = O; the transpose).

    The rank of delta is up to N r. Sums stay apart, each with its own key, until they are no smaller than the weight.
    Albert et al. 2025, arXiv:2502.00987.
    """

    key: Array
    gamma: Array
    lam: Array
    across: int
    axis: int = COLUMNS
    factors = ("gamma", "lam")
    leaves: ClassVar[dict[str, Leaf]] = {
        "key": Leaf((..., None)),
        # Diagonals, not matrices: optimizers of matrices leave them to another. They are small: only leading axes are sharded.
        "gamma": Leaf((..., None, None), matrices=None),
        "lam": Leaf((..., None, None), matrices=None),
    }

    def __post_init__(self) -> None:
        key, gamma, lam = (tuple(x.shape) for x in (self.key, self.gamma, self.lam))
        consistent = len(gamma) > 1 and len(lam) > 1 and gamma[:-1] == lam[:-1] and key == (*gamma[:-2], 2)
        if not consistent or self.key.dtype != jnp.uint32 or self.axis not in (ROWS, COLUMNS) or self.across < 1:
            raise ValueError(
                f"random bases need a key [..., 2] of uint32, gamma [..., N, d] and lam [..., N, r] with equal leading axes, "
                f"an axis of -2 or -1 and an extent across it, not {self.key.dtype} {key}, {gamma}, {lam}, {self.axis} and "
                f"{self.across}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, _, along = self.gamma.shape
        return (*lead, *((along, self.across) if self.axis == ROWS else (self.across, along)))

    @property
    def dtype(self) -> Any:
        return self.lam.dtype

    @property
    def bases(self) -> tuple[Array, Array]:
        """A ``[*lead, r, d]`` and B ``[*lead, across, N, r]``, float32."""
        n, rank = self.lam.shape[-2:]
        draw = lambda key: (uniform(key, 0, (rank, self.gamma.shape[-1])), uniform(key, 1, (self.across, n, rank)))
        # Each matrix has a key, and its draw must not depend on the others.
        for _ in self.key.shape[:-1]:
            draw = jax.vmap(draw)
        return draw(self.key)

    def low_rank(self) -> LowRank:
        """The same as a product of two matrices of N r columns and rows."""
        dtype = wide(self.lam).dtype
        a, b = (x.astype(dtype) for x in self.bases)
        right = self.lam[..., :, None].astype(dtype) * a[..., None, :, :] * self.gamma[..., :, None, :].astype(dtype)
        factors = LowRank(b.reshape(*b.shape[:-2], -1), right.reshape(*right.shape[:-3], -1, right.shape[-1]))
        return factors if self.axis == COLUMNS else factors.transposed()

    def _by(self, use: Callable[..., Array], *arguments: Array) -> Array:
        """``use`` of :meth:`low_rank`, whose matrices are drawn again on the way back rather than kept until then."""
        # Products are kept, the draws are not. Barriers against merging the two draws are not needed under a scan over layers,
        # where models use these.
        rematerialized = jax.checkpoint(
            lambda change, *arguments: use(change.low_rank(), *arguments),
            prevent_cse=False,
            policy=jax.checkpoint_policies.dots_saveable,
        )
        return rematerialized(self, *arguments)

    def dense(self) -> Array:
        return self._by(LowRank.dense)

    def whole(self, dtype: Any) -> Array:
        return self._by(lambda factors: factors.whole(dtype))

    def product(self, x: Array) -> Array:
        return self._by(LowRank.product, x)

    def grouped_product(self, x: Array, sizes: Array) -> Array:
        return self._by(LowRank.grouped_product, x, sizes)

    def rows(self, ids: Array) -> Array:
        return self._by(LowRank.rows, ids)

    def transposed(self) -> RandomBases:
        return self._with(axis=ROWS if self.axis == COLUMNS else COLUMNS)

    def scaled(self, c: Any) -> RandomBases:
        # One factor alone, or the scale would enter twice.
        return self._with(lam=wide(self.lam) * c)

    def dot_dense(self, value: Array) -> Array:
        # Outside of training: there is no way back for which to draw again.
        return self.low_rank().dot_dense(value)

    def take(self, rows: Array, columns: Array) -> Array:
        return self.low_rank().take(rows, columns)


def uniform(key: Array, stream: int, shape: tuple[int, ...]) -> Array:
    """Float32 of ``shape``, uniform in ``+-sqrt(3)``: ``((b + 1/2) / 2**22 - 1) sqrt(3)`` of 23 random bits b each.

    The bits are the upper ones of the two words of Threefry-2x32 at each index, one xor the other, under the key that it
    makes of ``key`` (uint32 ``[2]``) and ``stream``: files depend on it, and it depends on no setting of JAX.
    """
    # The flag changes the bits, and users may set it either way.
    with jax.threefry_partitionable(True):
        stream_key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), stream)
        bits = jax.random.bits(stream_key, shape, jnp.uint32)
    # 23 bits and a half are exact in float32, and symmetric about zero.
    return (((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1) * jnp.float32(math.sqrt(3))
