"""The backward pass as a chain of tensors, nearest to the loss first, with the FLOPs of each."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from jft import tree
from jft.models.core import Hooks, is_jft_model
from jft.select.calibration import Calibration

# Modules of a layer as the gradient meets them; those of one row read the same input, so that it passes them together.
LAYER = (
    ("mlp_post_norm",),
    ("mlp/down", "mlp/experts/down"),
    ("mlp/up", "mlp/gate", "mlp/experts/up", "mlp/experts/gate", "mlp/router"),
    ("mlp_norm",),
    ("attn_post_norm",),
    ("attn/o",),
    ("attn/q_norm", "attn/k_norm"),
    ("attn/q", "attn/k", "attn/v"),
    ("attn_norm",),
)
BEFORE = (("classifier",), ("head",), ("pooler",), ("final_norm",))
# Modules before the layers in the forward pass come last here.
AFTER = (("embed_norm",), ("patch", "cls", "positions", "types", "embed"))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One weight, of one layer where it is stacked (else 0): FLOPs of its gradient, and of passing beyond it."""

    path: str
    layer: int
    weight: int
    passing: int


@dataclasses.dataclass(frozen=True)
class _Length:
    """The positions of each row, as the first site inside the layers sees them."""

    model: Any

    def __call__(self, params: Any, batch: Any) -> Any:
        def value(name: str, h: Any, state: Any) -> tuple[Any, Any]:
            # Shapes are static; as an array, since that is what `sums` adds up.
            return h, jnp.full((), h.shape[1] if h.ndim > 2 else 1, jnp.float32) if name.endswith("layers/in") else None

        reads = self.model.apply(params, batch, Hooks(value=value))[1]
        return jnp.max(reads["layers/in"])


def chain(calibration: Calibration) -> list[Tensor]:
    """All weights of a model with one stack of layers, from the loss down; FLOPs are those of one row of the data.

    A product ``[I, O]`` costs ``2 T I O`` for its weight and as many for its input, T positions; attention, passed by
    whatever lies beyond its output projection, four products of ``2 T^2 H K``; an expert's matrices count as the share of
    tokens that each gets. What is added or multiplied position by position costs its size times T.

    Raises ``ValueError`` for models whose layers are no single stack, or that have weights of unknown position.
    """
    config = getattr(getattr(calibration.model, "config", None), "backbone", getattr(calibration.model, "config", None))
    stacks = tree.stacks(calibration.params)
    if not is_jft_model(calibration.model) or list(stacks) != ["layers"]:
        raise ValueError("the cost of a backward pass is known for jft's models with one stack of layers alone")
    # Read inside the model: patches and class tokens add to the length of the batch.
    length = int(calibration.sums(_Length(calibration.model), 1))
    mixture = getattr(config, "experts", None)
    # On average over experts, whatever the router does with this batch.
    share = mixture.per_token / mixture.count if mixture else 1.0
    out = [t for row in BEFORE for t in _row(calibration, row, "", None, length, share)]
    for layer in reversed(range(stacks["layers"])):
        for row in LAYER:
            out += _row(calibration, row, "layers/", layer, length, share)
    out += [t for row in AFTER for t in _row(calibration, row, "", None, length, share)]
    # A weight left out would train at no cost.
    unknown = sorted(set(calibration.params) - {t.path for t in out})
    if unknown:
        raise ValueError(
            f"where the backward pass meets {unknown[0]} is not known; GreenTrainer's costs leave no room for it"
        )
    return out


def _row(
    calibration: Calibration, names: tuple[str, ...], prefix: str, layer: int | None, T: int, share: float
) -> list[Tensor]:
    """The tensors of modules that read the same input; passing them is paid by the last."""
    parts = "|".join(map(re.escape, names))
    paths = [p for p in calibration.params if re.fullmatch(rf"{prefix}({parts})(/(w|b|scale|bias|table))?", p)]
    paths.sort(key=lambda p: p.endswith("/w"))  # a bias is met before its matrix
    out, passing = [], 0
    for path in paths:
        shape = calibration.params[path].shape[0 if layer is None else 1 :]
        size = tree.size(calibration.params[path]) // (1 if layer is None else calibration.params[path].shape[0])
        is_product = path.endswith("/w")
        cost = round((2 if is_product else 1) * T * size * (share if "/experts/" in path else 1.0))
        # A lookup: its gradient adds T rows, and nothing is multiplied.
        if path.endswith("table"):
            cost = T * shape[-1]
        # The input's gradient is a product of the same size as the weight's.
        passing += cost if is_product else 0
        # Four products of 2 T^2 H K, where H K are the rows of the output projection.
        passing += 8 * T * T * shape[-2] if path.endswith("attn/o/w") else 0
        out.append(Tensor(path, layer or 0, cost, 0))
    # Modules of one row read the same input: its gradient is passed once, after the last of them.
    return [*out[:-1], dataclasses.replace(out[-1], passing=passing)] if out else []


def forward(tensors: list[Tensor]) -> int:
    """FLOPs of the forward pass of such a chain: its products, and half of what attention costs in the backward pass."""
    total = 0
    for t in tensors:
        total += t.weight if t.path.endswith("/w") else 0
        product = t.weight if t.path.endswith("attn/o/w") else 0
        # Beyond its input's gradient the output projection passes four products of the attention; forward has two.
        total += (t.passing - product) // 2 if product else 0
    return total
