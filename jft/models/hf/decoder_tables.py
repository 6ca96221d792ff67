"""Tensor names of Llama's descendants."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from jft.models.decoder import DecoderConfig
from jft.models.hf.mapping import Source
from jft.models.hf.sources import sources

# A bare backbone is saved without the wrapper's prefix.
_PREFIXES = ("model.", "")
_NORMS = {
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
_MODULES = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "mlp/router": "mlp.gate",
    "mlp/experts/gate": "mlp.experts.{expert}.gate_proj",
    "mlp/experts/up": "mlp.experts.{expert}.up_proj",
    "mlp/experts/down": "mlp.experts.{expert}.down_proj",
}
_MIXTRAL_MODULES = {
    "mlp/router": "block_sparse_moe.gate",
    "mlp/experts/gate": "block_sparse_moe.experts.{expert}.w1",
    "mlp/experts/up": "block_sparse_moe.experts.{expert}.w3",
    "mlp/experts/down": "block_sparse_moe.experts.{expert}.w2",
}
# The others are fused: ``phi3_table`` adds them.
_PHI3_MODULES = {name: module for name, module in _MODULES.items() if name in ("attn/o", "mlp/down")}


def llama_table(config: DecoderConfig, modules: Mapping[str, str] = _MODULES) -> dict[str, Source]:
    """Llama's names, with the norms where the config puts them; ``modules`` for what is called otherwise."""
    layer = {**modules, **_NORMS[config.norm_place]}
    names = {f"layers/{path}": f"layers.{{layer}}.{name}" for path, name in layer.items()}
    names |= {"embed": "embed_tokens", "final_norm": "norm", "head": "=lm_head"}
    table = sources(config, names, _PREFIXES)
    return table | _fused_experts(config, table) if config.experts else table


def _fused_experts(config: DecoderConfig, table: Mapping[str, Source]) -> dict[str, Source]:
    """The experts' sources, which may also stand as transformers 5 holds them in memory: fused, gate above up."""
    assert config.experts is not None
    E, D, F = config.experts.count, config.width, config.experts.hidden
    out = {}
    for part, name, rows, start in (
        ("gate", "gate_up_proj", (2 * F, D), 0),
        ("up", "gate_up_proj", (2 * F, D), F),
        ("down", "down_proj", (D, F), 0),
    ):
        path = f"layers/mlp/experts/{part}/w"
        names = [f"{prefix}layers.{{layer}}.mlp.experts.{name}" for prefix in _PREFIXES]
        view = functools.partial(_rows, start=start, stop=start + (F if part != "down" else D))
        fused = Source(names[0], (E, *rows), view, tuple(names[1:]))
        out[path] = dataclasses.replace(table[path], other=fused)
    return out


def mixtral_table(config: DecoderConfig) -> dict[str, Source]:
    """Mixtral names its experts w1, w3 and w2; the router stands under ``mlp`` where the experts are fused."""
    table = llama_table(config, {**_MODULES, **_MIXTRAL_MODULES})
    router = table["layers/mlp/router/w"]
    newer = tuple(f"{prefix}layers.{{layer}}.mlp.gate.weight" for prefix in _PREFIXES)
    return table | {"layers/mlp/router/w": dataclasses.replace(router, aliases=router.aliases + newer)}


def phi3_table(config: DecoderConfig) -> dict[str, Source]:
    """Phi-3 keeps q, k and v in one matrix and gate and up in another, one below the other."""
    D, K, F = config.width, config.head_size, config.hidden
    sizes = (config.heads * K, config.kv_heads * K, config.kv_heads * K)
    table = llama_table(config, _PHI3_MODULES)
    for module, paths, rows in (
        ("self_attn.qkv_proj", ("attn/q", "attn/k", "attn/v"), sizes),
        ("mlp.gate_up_proj", ("mlp/gate", "mlp/up"), (F, F)),
    ):
        names = [f"{prefix}layers.{{layer}}.{module}.weight" for prefix in _PREFIXES]
        for i, path in enumerate(paths):
            view = functools.partial(_rows, start=sum(rows[:i]), stop=sum(rows[: i + 1]))
            table[f"layers/{path}/w"] = Source(names[0], (sum(rows), D), view, tuple(names[1:]))
    return table


def _rows(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    # torch stores [out, in].
    return np.swapaxes(x[..., start:stop, :], -1, -2)
