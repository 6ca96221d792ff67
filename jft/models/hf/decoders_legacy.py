"""Decoders before Llama: GPT-2 and GPT-NeoX (Pythia)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jft.models.decoder import DecoderConfig
from jft.models.hf import config_json
from jft.models.hf.mapping import Family, Source, identity
from jft.models.hf.sources import sources

_GPT2_MODULES = {
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attn/o": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
_NEOX_MODULES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn/o": "attention.dense",
    "mlp/up": "mlp.dense_h_to_4h",
    "mlp/down": "mlp.dense_4h_to_h",
}


def _columns(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    return x[..., start:stop]


def _gpt2_table(config: DecoderConfig) -> dict[str, Source]:
    """GPT-2 stores ``[in, out]`` matrices, with q, k and v side by side."""
    D, prefixes = config.width, ("transformer.", "")
    names = {f"layers/{path}": f"h.{{layer}}.{name}" for path, name in _GPT2_MODULES.items()}
    names |= {"embed": "wte", "positions": "wpe", "final_norm": "ln_f", "head": "=lm_head"}
    table = sources(config, names, prefixes)
    for path, source in table.items():
        if path.startswith("layers/") and path.endswith("/w"):
            # GPT-2's Conv1D stores [in, out], as jft does.
            table[path] = Source(source.name, source.shape[::-1], identity, source.aliases)
    for i, part in enumerate("qkv"):
        view = functools.partial(_columns, start=i * D, stop=(i + 1) * D)
        for leaf, name, shape in (("w", "weight", (D, 3 * D)), ("b", "bias", (3 * D,))):
            spellings = [f"{prefix}h.{{layer}}.attn.c_attn.{name}" for prefix in prefixes]
            table[f"layers/attn/{part}/{leaf}"] = Source(spellings[0], shape, view, tuple(spellings[1:]))
    return table


def _gpt2(c: dict) -> DecoderConfig:
    config_json.refuse(c, add_cross_attention=False)
    scale_scores = c.get("scale_attn_weights", True)
    width = config_json.require(c, "n_embd")
    return DecoderConfig(
        family="gpt2",
        vocab=config_json.require(c, "vocab_size"),
        width=width,
        layers=config_json.require(c, "n_layer"),
        heads=config_json.require(c, "n_head"),
        hidden=c.get("n_inner") or 4 * width,
        max_positions=c.get("n_positions", 1024),
        norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=config_json.activation(c.get("activation_function", "gelu_new")),
        gated=False,
        mlp_bias=True,
        qkv_bias=True,
        out_bias=True,
        attention_scale=None if scale_scores else 1.0,
        scale_by_layer=bool(c.get("scale_attn_by_inverse_layer_idx", False)),
        rope=None,
        tied=bool(c.get("tie_word_embeddings", True)),
        init_std=c.get("initializer_range", 0.02),
        init_residual=True,
        special_tokens=config_json.special_tokens(c),
    )


def _gpt2_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        # The name in GPT-2's own files.
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
        "scale_attn_weights": config.attention_scale != 1.0,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        **config_json.special_token_fields(config),
    }


def _third(x: np.ndarray, heads: int, index: int) -> np.ndarray:
    """Query, key or value of each head: ``[H * 3 * K, D]`` to ``[D, H, K]``, or ``[H * 3 * K]`` to ``[H, K]``."""
    # Head by head: q, k and v of the first, then of the second.
    parts = x.reshape(heads, 3, -1, *x.shape[1:])[:, index]
    return np.moveaxis(parts, -1, 0) if x.ndim == 2 else parts


def _merge_heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-2], -1)


def _neox_table(config: DecoderConfig) -> dict[str, Source]:
    """GPT-NeoX interleaves q, k and v head by head in one matrix."""
    D, prefixes = config.width, ("gpt_neox.", "")
    names = {f"layers/{path}": f"layers.{{layer}}.{name}" for path, name in _NEOX_MODULES.items()}
    names |= {"embed": "embed_in", "final_norm": "final_layer_norm", "head": "=embed_out"}
    table = sources(config, names, prefixes)
    # Some checkpoints name the head as the other decoders do.
    if "head/w" in table:
        head = table["head/w"]
        table["head/w"] = Source(head.name, head.shape, head.view, ("lm_head.weight",))
    leaves = (
        (("w", "weight", (3 * D, D)), ("b", "bias", (3 * D,))) if config.qkv_bias else (("w", "weight", (3 * D, D)),)
    )
    for i, part in enumerate("qkv"):
        view: Callable[[np.ndarray], np.ndarray] = functools.partial(_third, heads=config.heads, index=i)
        for leaf, name, shape in leaves:
            spellings = [f"{prefix}layers.{{layer}}.attention.query_key_value.{name}" for prefix in prefixes]
            path = f"layers/attn/{part}/{leaf}"
            table[path] = Source(spellings[0], shape, view, tuple(spellings[1:]), _merge_heads)
    return table


def _neox(c: Mapping[str, Any]) -> DecoderConfig:
    config_json.refuse(c)
    bias = bool(c.get("attention_bias", True))
    # Fields of older files; ``rope_parameters`` prevails where there is one.
    defaults = dict(rope_theta=c.get("rotary_emb_base", 10_000.0), partial_rotary_factor=c.get("rotary_pct", 0.25))
    return DecoderConfig(
        family="gpt_neox",
        vocab=config_json.require(c, "vocab_size"),
        width=config_json.require(c, "hidden_size"),
        layers=config_json.require(c, "num_hidden_layers"),
        heads=config_json.require(c, "num_attention_heads"),
        hidden=config_json.require(c, "intermediate_size"),
        max_positions=c.get("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=c.get("layer_norm_eps", 1e-5),
        parallel=bool(c.get("use_parallel_residual", True)),
        activation=config_json.activation(c.get("hidden_act", "gelu")),
        gated=False,
        mlp_bias=True,
        qkv_bias=bias,
        out_bias=bias,
        rope=config_json.rope(c, **defaults),
        tied=bool(c.get("tie_word_embeddings", False)),
        init_std=c.get("initializer_range", 0.02),
        special_tokens=config_json.special_tokens(c),
    )


def _neox_fields(config: DecoderConfig) -> dict[str, Any]:
    if config.rope is None:
        raise ValueError("a gpt_neox checkpoint needs rope")
    parameters = config_json.rope_parameters(config.rope)
    # NeoX's default is 0.25, so a full rotation has to be said.
    parameters["partial_rotary_factor"] = config.rope.fraction
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "hidden_act": config_json.activation_name(config.activation),
        "attention_bias": config.qkv_bias,
        "rotary_pct": config.rope.fraction,
        "rotary_emb_base": config.rope.theta,
        "rope_parameters": parameters,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        **config_json.special_token_fields(config),
    }


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        _gpt2,
        config_json.exact(_gpt2_fields, _gpt2),
        _gpt2_table,
        # ``attn.bias`` is the causal mask, a buffer.
        (r".*\.attn\.(masked_)?bias", r"lm_head\.weight", r"score\.weight"),
    ),
    "gpt_neox": Family(
        _neox,
        config_json.exact(_neox_fields, _neox),
        _neox_table,
        (
            r".*\.attention\.(masked_)?bias",
            r".*rotary_emb\.inv_freq",
            r"lm_head\.weight",
            r"embed_out\.weight",
            r"score\.weight",
        ),
    ),
}
