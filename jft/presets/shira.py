"""SHiRA: as many entries of each matrix as a LoRA of some rank has, by one of five masks."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jft import tree
from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores
from jft.select.calibration import Calibration

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Cross:
    """The diagonal first, then whole rows and columns in random order: ``max(u_i, v_j)``, u and v uniform (SHiRA's struct).

    A diagonal has full rank, rows and columns a low one (Bhardwaj et al. 2024, arXiv:2406.13175, who do not say how many
    of them). Where the columns are more than the rows the diagonal begins anew, so that every row and column is on it.
    Vectors are refused.
    """

    def __call__(self, calibration: Calibration) -> dict[str, Array]:
        key = tree.key_for(calibration.key, "rows and columns")
        out = {}
        for path in calibration.paths:
            w = calibration.params[path]
            if w.ndim - calibration.lead(path) != 2:
                raise ValueError(
                    f"{path} of shape {w.shape} holds no matrices, so Cross cannot score it; select matrices"
                )
            # The output's sharding is the weight's: scores are made where they are compared.
            run = jax.jit(_cross, static_argnums=1, out_shardings=getattr(w, "sharding", None))
            out[path] = run(tree.key_for(key, path), w.shape)
        return out


def _cross(key: Array, shape: tuple[int, ...]) -> Array:
    *lead, rows, columns = shape
    one, two = jax.random.split(key)
    u = jax.random.uniform(one, (*lead, rows), jnp.float32)
    v = jax.random.uniform(two, (*lead, columns), jnp.float32)
    size = min(rows, columns)
    diagonal = jnp.arange(rows)[:, None] % size == jnp.arange(columns) % size
    # 2 is above every draw from [0, 1), so the diagonal comes first.
    return jnp.where(diagonal, 2.0, jnp.maximum(u[..., :, None], v[..., None, :]))


CARD = Card(
    formula="rank * (I + O) entries of each matrix train: at random (rand), the largest |w| (wm), |g| (grad) or |g w| (snip), "
    "or the diagonal with whole rows and columns at random (struct); g the mean gradient of `batches` at theta0.",
    follows="paper: the five masks; peft: the number of entries, rank 32 and rand by default",
    code="huggingface/peft@0.21.2, src/peft/tuners/shira",
    departs="How many rows and columns struct has the paper does not say: as the number of entries allows, the last in part. "
    "Other random numbers than peft's. How much data grad and snip see the paper does not say: one batch.",
    defaults={"rank": ("-", 32), "mask": ("-", "random"), "batches": ("-", "-")},
    check="entries and three Adam steps of wm, grad, snip against float64 NumPy, counts and shape of rand and struct; peft's "
    "outputs and gradients on the same entries",
)


@register("shira", paper="Bhardwaj et al. 2024, arXiv:2406.13175", card=CARD)
def shira(
    rank: int = 32,
    mask: Literal["struct", "rand", "wm", "grad", "snip"] = "rand",
    batches: int = 1,
) -> Method:
    """Train ``rank * (I + O)`` entries of each matrix inside the layers, as many as LoRA of that rank would.

    mask: the paper's five. ``struct``, the diagonal and then whole rows and columns drawn at random, the last of them in
    part, so that the number is exact; ``rand``; ``wm``, the largest weights; ``grad``, the largest gradients; ``snip``, the
    largest ``|gradient * weight|``; these two by the mean gradient of ``batches``, of which others take none.
    peft has ``rand`` alone. Raises ``ValueError`` for an unknown mask, and for more batches where none is read.
    """
    masks: dict[str, scores.Score] = {
        "struct": Cross(),
        "rand": scores.Random(),
        "wm": scores.Magnitude(),
        "grad": scores.Gradient(batches),
        "snip": scores.Snip(batches),
    }
    if mask not in masks:
        raise ValueError(f"mask {mask!r} is unknown; choose one of {', '.join(masks)}")
    if batches != 1 and mask not in ("grad", "snip"):
        raise ValueError(
            f"mask {mask!r} reads no data, and batches is {batches}; leave batches out, or take grad or snip"
        )
    return Method(Select(linear_only=True, score=masks[mask], budget=budget.PerMatrix(rank=rank)), InPlace())
