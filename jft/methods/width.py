"""A narrower decoder: channels of the residual stream that hold nothing, taken out of every weight."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.models.core import Model
from jft.models.decoder import DecoderConfig

READS = re.compile(r"(^|/)(q|k|v|gate|up|router|head)/w$")
WRITES = re.compile(r"(^|/)((o|down)/(w|b)|table)$")
NORMS = re.compile(r"(^|/)(attn_norm|attn_post_norm|mlp_norm|mlp_post_norm|final_norm)/scale$")


def prune_width(model: Model, params: Any, channels: Any) -> tuple[Model, dict]:
    """The decoder with only the residual channels ``channels`` (distinct indices in [0, width)), in that order.

    Heads, their size and the MLPs' hidden size stay; embeddings, output head, norms and every matrix that reads or writes the
    residual stream lose rows or columns. Where the removed channels are zero in all that writes to the stream (embeddings,
    ``o`` and ``down``), the logits stay the same: an rms norm over D' of D channels has ``mean * D / D'``, so its scale is
    multiplied by ``sqrt(D / D')`` and ``norm_eps`` by ``D / D'`` (norms of heads share ``norm_eps``, so with ``qk_norm`` it
    stays, and the logits are equal up to the weight of that eps). Otherwise the result is a pruned model, to be tuned further.

    Raises ``ValueError`` for models that are no decoder, that subtract a mean (layer norms: the mean of fewer channels is
    another), or for channels that are none.
    """
    config = model.config
    keep = _checked(config, channels)
    ratio = config.width / len(keep)
    grown = math.sqrt(ratio)
    out: dict[str, Any] = {}
    for path, x in tree.flatten(params).items():
        if NORMS.search(path):
            # Some models store the scale minus 1 (norm_offset); the factor is for the scale itself.
            scale = (config.norm_offset + x[..., keep].astype(jnp.float32)) * grown - config.norm_offset
            out[path] = scale.astype(x.dtype)
        elif READS.search(path):
            out[path] = x[..., keep, :]
        elif WRITES.search(path):
            out[path] = x[..., keep]
        else:
            out[path] = x
    if config.embed_scale:
        _rescale_embedding(config, out, grown)
    eps = config.norm_eps if config.qk_norm != "none" else config.norm_eps * ratio
    narrow = dataclasses.replace(config, width=len(keep), norm_eps=eps)
    return dataclasses.replace(model, config=narrow), tree.unflatten(out)


def _rescale_embedding(config: DecoderConfig, out: dict[str, Any], grown: float) -> None:
    """Embeddings are multiplied by the square root of the width, which has shrunk."""
    table = out["embed/table"]
    out["embed/table"] = (table.astype(jnp.float32) * grown).astype(table.dtype)
    # The table is the output head too, whose logits must not grow: the norm in front of it takes the factor back.
    if config.tied:
        scale = out["final_norm/scale"]
        smaller = (config.norm_offset + scale.astype(jnp.float32)) / grown - config.norm_offset
        out["final_norm/scale"] = smaller.astype(scale.dtype)


def _checked(config: Any, channels: Any) -> np.ndarray:
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"only decoders can be made narrower, not {type(config).__name__}")
    if config.norm != "rms":
        raise ValueError(
            "a layer norm subtracts the mean of all channels, so removing some changes it; only rms norms go"
        )
    # On the host: the channels become shapes.
    keep = np.asarray(channels)
    distinct = keep.ndim == 1 and keep.size and keep.dtype.kind in "iu" and len(np.unique(keep)) == keep.size
    if not distinct or keep.min() < 0 or keep.max() >= config.width:
        raise ValueError(f"channels must be distinct integers in 0..{config.width - 1}, at least one; got {channels!r}")
    return keep
