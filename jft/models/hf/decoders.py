"""Decoders that descend from Llama: Llama, Mistral, Qwen, Gemma, OLMo, Phi-3, Mixtral."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jft.models.decoder import DecoderConfig
from jft.models.hf import config_json, decoders_legacy
from jft.models.hf.decoder_tables import llama_table, mixtral_table, phi3_table
from jft.models.hf.mapping import Family, Source
from jft.models.moe import Experts

# Buffers, tied copies of the embedding, heads of other tasks: no parameter of a decoder.
_IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight", r"score\.weight")


def _config(c: Mapping[str, Any], family: str, **fields: Any) -> DecoderConfig:
    """The config from the fields that all families have; ``fields`` are the family's."""
    width, heads = config_json.require(c, "hidden_size"), config_json.require(c, "num_attention_heads")
    common = dict(
        vocab=config_json.require(c, "vocab_size"),
        width=width,
        layers=config_json.require(c, "num_hidden_layers"),
        heads=heads,
        # null means the same as absent: one key head per query head.
        kv_heads=c.get("num_key_value_heads") or heads,
        head_size=c.get("head_dim") or width // heads,
        hidden=config_json.require(c, "intermediate_size"),
        max_positions=c["max_position_embeddings"],
        norm_eps=c["rms_norm_eps"],
        # Gemma 2 and 3 name it ``hidden_activation``.
        activation=config_json.activation(c.get("hidden_activation") or c.get("hidden_act") or "silu"),
        tied=bool(c.get("tie_word_embeddings", False)),
        init_std=c.get("initializer_range", 0.02),
        special_tokens=config_json.special_tokens(c),
    )
    biases = dict(qkv_bias=bool(c.get("attention_bias", False)), out_bias=bool(c.get("attention_bias", False)))
    # Not where the family reads its own: Gemma 3 nests the fields, which this would refuse.
    common |= dict(rope=config_json.rope(c, rope_theta=10_000.0)) if "rope" not in fields else {}
    return DecoderConfig(family=family, **{**common, **biases, **fields})


def _fields(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """The inverse of :func:`_config`."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config_json.activation_name(config.activation),
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        "attention_bias": config.qkv_bias,
        **(config_json.rope_fields(config.rope) if config.rope is not None else {}),
        **config_json.special_token_fields(config),
    }


def _layer_windows(c: Mapping[str, Any], sliding: Callable[[int], bool]) -> tuple[int | None, ...] | None:
    """``layer_types`` of newer files, or the family's rule of which layers slide."""
    # Qwen writes a window and switches it off by a second field, which other families do not have.
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if window is None:
        return None
    layers = range(c["num_hidden_layers"])
    types = c.get("layer_types") or ["sliding_attention" if sliding(i) else "full_attention" for i in layers]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types {sorted(unknown)} are not supported; only sliding_attention and full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _window_fields(config: DecoderConfig) -> dict[str, Any]:
    """``sliding_window`` and ``layer_types``; one window only, as ``config.json`` has no room for more."""
    windows: Any = config.windows or (None,) * config.layers
    # A second width is lost here, and then refused by ``config_json.exact``.
    width = next((w for w in windows if w is not None), None)
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return {"sliding_window": width, "layer_types": types}


def _one_window(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": _window_fields(config)["sliding_window"]}


def _qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    return {"use_sliding_window": config.windows is not None, **_window_fields(config)}


def _every_window(c: Mapping[str, Any]) -> int | None:
    return c.get("sliding_window") if c.get("use_sliding_window", True) else None


def _moe(c: Mapping[str, Any], hidden: str, normalise: bool) -> Experts:
    # Mixtral's name, then that of the later families.
    count = c.get("num_local_experts") or c.get("num_experts")
    if count is None:
        raise ValueError(f"config.json of this {c.get('model_type')} lacks 'num_experts'")
    return Experts(count, config_json.require(c, "num_experts_per_tok"), config_json.require(c, hidden), normalise)


def _expert_fields(config: DecoderConfig) -> dict[str, Any]:
    if config.experts is None:
        raise ValueError(f"a {config.family} checkpoint needs experts; this model has none")
    fields = {"num_experts_per_tok": config.experts.per_token, "norm_topk_prob": config.experts.normalise}
    # Both names: a reader takes the one of its family.
    return fields | {"num_experts": config.experts.count, "num_local_experts": config.experts.count}


def _llama(c: dict) -> DecoderConfig:
    config_json.refuse(c)
    return _config(c, "llama", mlp_bias=bool(c.get("mlp_bias", False)))


def _mistral(c: dict) -> DecoderConfig:
    config_json.refuse(c, attention_bias=False)
    return _config(c, "mistral", windows=_every_window(c))


def _qwen2(c: dict) -> DecoderConfig:
    config_json.refuse(c)
    # The layers below ``max_window_layers`` are those without a window, whatever the name suggests.
    windows = _layer_windows(c, lambda i: i >= c["max_window_layers"])
    return _config(c, "qwen2", qkv_bias=True, out_bias=False, windows=windows)


def _qwen3(c: dict) -> DecoderConfig:
    config_json.refuse(c)
    windows = _layer_windows(c, lambda i: i >= c["max_window_layers"])
    return _config(c, "qwen3", qk_norm="head", windows=windows)


def _gemma(c: dict) -> DecoderConfig:
    config_json.refuse(c, use_bidirectional_attention=False)
    # Gemma 1 files say "gelu" and mean its tanh approximation; transformers reads them so too.
    c = (
        {**c, "hidden_activation": "gelu_pytorch_tanh"}
        if c.get("hidden_act") == "gelu"
        else {**c, "hidden_activation": None}
    )
    return _config(c, "gemma", embed_scale=True, norm_offset=1.0)


def _gemma2(c: dict) -> DecoderConfig:
    config_json.refuse(c, use_bidirectional_attention=False)
    softcaps = dict(attention_softcap=c["attn_logit_softcapping"], logit_softcap=c["final_logit_softcapping"])
    return _config(c, "gemma2", windows=_layer_windows(c, lambda i: i % 2 == 0), **softcaps, **_gemma_fields(c))


def _gemma3(c: dict) -> DecoderConfig:
    config_json.refuse(c, use_bidirectional_attention=False, attn_logit_softcapping=None)
    # Five local layers to one global; the field became private before ``layer_types`` replaced it.
    pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    windows = _layer_windows(c, lambda i: (i + 1) % pattern != 0)
    # transformers 5 nests the parameters of the two kinds of layers; older files speak of the global ones and a base.
    nested = c.get("rope_parameters") or {}
    flat = {key: value for key, value in c.items() if key not in ("rope_parameters", "rope_scaling", "rope_theta")}
    theta, local = c.get("rope_theta") or 1_000_000.0, c.get("rope_local_base_freq") or 10_000.0
    full = {**(nested.get("full_attention") or {}), **(c.get("rope_scaling") or {})}
    ropes = dict(
        rope=config_json.rope({**flat, "rope_parameters": full}, rope_theta=theta),
        local_rope=config_json.rope({**flat, "rope_parameters": nested.get("sliding_attention")}, rope_theta=local),
    )
    cap = c.get("final_logit_softcapping")
    return _config(c, "gemma3_text", windows=windows, qk_norm="head", logit_softcap=cap, **ropes, **_gemma_fields(c))


def _gemma_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    scale = float(c["query_pre_attn_scalar"]) ** -0.5
    return dict(embed_scale=True, norm_offset=1.0, norm_place="both", attention_scale=scale)


def _olmo2(c: dict) -> DecoderConfig:
    config_json.refuse(c)
    return _config(c, "olmo2", norm_place="post", qk_norm="full")


def _phi3(c: dict) -> DecoderConfig:
    config_json.refuse(c, attention_bias=False)
    c = dict(c)
    for key in ("rope_scaling", "rope_parameters"):
        # Phi-3 files called LongRoPE "su", and for a while "yarn".
        if c.get(key):
            kind = c[key].get("rope_type") or c[key].get("type") or "default"
            c[key] = {**c[key], "rope_type": "longrope" if kind in ("su", "yarn") else kind}
    # Plain Phi-3 files have the field as well, where it says nothing of the rotary embedding.
    if not (c.get("rope_scaling") or (c.get("rope_parameters") or {}).get("rope_type") == "longrope"):
        c.pop("original_max_position_embeddings", None)
    return _config(c, "phi3", windows=_every_window(c))


def _mixtral(c: dict) -> DecoderConfig:
    config_json.refuse(c, attention_bias=False)
    # Mixtral's default, which is not Llama's 1e4.
    rope = config_json.rope(c, rope_theta=1_000_000.0)
    experts = _moe(c, "intermediate_size", True)
    return _config(c, "mixtral", windows=_every_window(c), rope=rope, experts=experts)


def _qwen3_moe(c: dict) -> DecoderConfig:
    config_json.refuse(c)
    # Layers of two kinds would have to be two stacks.
    if c.get("mlp_only_layers") or c.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            "qwen3_moe with some layers dense is not supported (mlp_only_layers="
            f"{c.get('mlp_only_layers')!r}, decoder_sparse_step={c.get('decoder_sparse_step')!r}); all must be sparse"
        )
    experts = _moe(c, "moe_intermediate_size", bool(c.get("norm_topk_prob", False)))
    return _config(c, "qwen3_moe", windows=_every_window(c), qk_norm="head", experts=experts)


def _olmoe(c: dict) -> DecoderConfig:
    config_json.refuse(c)
    experts = _moe(c, "intermediate_size", bool(c.get("norm_topk_prob", False)))
    return _config(c, "olmoe", qk_norm="full", clip_qkv=c.get("clip_qkv"), experts=experts)


def _gemma_out(config: DecoderConfig) -> dict[str, Any]:
    # The power is not exact: 256 must come back as 256, and as the integer that transformers writes.
    scalar = round((config.attention_scale or config.head_size**-0.5) ** -2, 6)
    return {
        "hidden_activation": config_json.activation_name(config.activation),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "use_bidirectional_attention": None,
        **_window_fields(config),
    }


def _gemma3_out(config: DecoderConfig) -> dict[str, Any]:
    if config.rope is None or config.local_rope is None:
        raise ValueError("a gemma3_text checkpoint needs rope and local_rope")
    parameters = {
        "full_attention": config_json.rope_parameters(config.rope),
        "sliding_attention": config_json.rope_parameters(config.local_rope),
    }
    legacy = {"rope_theta": config.rope.theta, "rope_local_base_freq": config.local_rope.theta}
    return {**_gemma_out(config), **legacy, "rope_scaling": None, "rope_parameters": parameters}


def _phi3_out(config: DecoderConfig) -> dict[str, Any]:
    rope = config.rope
    fields = {**_one_window(config), "partial_rotary_factor": rope.fraction if rope else 1.0}
    original = rope.original_positions if rope and rope.original_positions else config.max_positions
    return fields | {"original_max_position_embeddings": original}


@dataclasses.dataclass(frozen=True)
class _Spec:
    """One family: transformers' class, the defaults its ``config.json`` may leave out, and how it reads and writes."""

    name: str
    read: Callable[[dict], DecoderConfig]
    defaults: Mapping[str, Any]
    write: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    table: Callable[[DecoderConfig], dict[str, Source]] = llama_table

    def family(self) -> Family:
        def from_hf(c: dict) -> DecoderConfig:
            return self.read({**self.defaults, **c})

        def to_hf(config: DecoderConfig) -> dict[str, Any]:
            return {**_fields(config, f"{self.name}ForCausalLM"), **self.write(config)}

        return Family(from_hf, config_json.exact(to_hf, from_hf), self.table, _IGNORED)


# Defaults are those of transformers' config classes: files leave out what equals them.
_SPECS = {
    "llama": _Spec(
        "Llama",
        _llama,
        dict(max_position_embeddings=2048, rms_norm_eps=1e-6),
        lambda config: {"mlp_bias": config.mlp_bias},
    ),
    "mistral": _Spec(
        "Mistral",
        _mistral,
        dict(max_position_embeddings=131072, rms_norm_eps=1e-6, num_key_value_heads=8, sliding_window=4096),
        _one_window,
    ),
    "qwen2": _Spec(
        "Qwen2",
        _qwen2,
        dict(
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            use_sliding_window=False,
            sliding_window=4096,
            max_window_layers=28,
        ),
        _qwen_windows,
    ),
    "qwen3": _Spec(
        "Qwen3",
        _qwen3,
        dict(
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            head_dim=128,
            use_sliding_window=False,
            sliding_window=4096,
            max_window_layers=28,
        ),
        _qwen_windows,
    ),
    "gemma": _Spec(
        "Gemma",
        _gemma,
        dict(
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            head_dim=256,
            num_key_value_heads=16,
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
        ),
    ),
    "gemma2": _Spec(
        "Gemma2",
        _gemma2,
        dict(
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            head_dim=256,
            num_key_value_heads=4,
            hidden_activation="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            final_logit_softcapping=30.0,
            attn_logit_softcapping=50.0,
        ),
        _gemma_out,
    ),
    "gemma3_text": _Spec(
        "Gemma3",
        _gemma3,
        dict(
            max_position_embeddings=131072,
            rms_norm_eps=1e-6,
            head_dim=256,
            num_key_value_heads=4,
            hidden_activation="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            query_pre_attn_scalar=256,
            sliding_window=4096,
        ),
        _gemma3_out,
    ),
    "olmo2": _Spec("Olmo2", _olmo2, dict(max_position_embeddings=2048, rms_norm_eps=1e-5)),
    "phi3": _Spec(
        "Phi3",
        _phi3,
        dict(max_position_embeddings=4096, rms_norm_eps=1e-5, original_max_position_embeddings=4096),
        _phi3_out,
        phi3_table,
    ),
    "mixtral": _Spec(
        "Mixtral",
        _mixtral,
        dict(max_position_embeddings=131072, rms_norm_eps=1e-5, num_key_value_heads=8),
        lambda config: {**_one_window(config), **_expert_fields(config)},
        mixtral_table,
    ),
    "qwen3_moe": _Spec(
        "Qwen3Moe",
        _qwen3_moe,
        dict(
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            num_key_value_heads=4,
            use_sliding_window=False,
            sliding_window=4096,
        ),
        lambda config: {
            "use_sliding_window": config.windows is not None,
            "moe_intermediate_size": config.experts.hidden if config.experts else None,
            **_one_window(config),
            **_expert_fields(config),
        },
    ),
    "olmoe": _Spec(
        "Olmoe",
        _olmoe,
        dict(max_position_embeddings=4096, rms_norm_eps=1e-5),
        lambda config: {"clip_qkv": config.clip_qkv, **_expert_fields(config)},
    ),
}

FAMILIES: dict[str, Family] = {name: spec.family() for name, spec in _SPECS.items()} | decoders_legacy.FAMILIES
