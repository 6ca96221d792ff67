"""The kinds of value that ``config.json`` of a checkpoint may hold, in all families, and the sizes that its weights allow.

Names mean the same in every family, so one table does for all; a key that it does not have is not read, or refused by its
family. Null is what it says only where families leave a key out that way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jft.models.hf import heads, registry
from jft.models.hf.checkpoint import Entry, LoadError
from jft.strict_json import COUNT, FLAG, FRACTION, NULL, OBJECT, POSITIVE, SIZE, TEXT, Kind, check, listed, need

TOKEN = Kind("a token id", lambda x: type(x) is int and -1 <= x < 2**31)
PIXELS = Kind("a number of pixels up to 65536", lambda x: type(x) is int and 0 < x <= 65536)
DEVIATION = Kind("a finite number, 0 or more", lambda x: POSITIVE.test(x) or (type(x) in (int, float) and x == 0))

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
EXPERTS = ("num_local_experts", "num_experts")
# Each is an extent of some tensor, or divides one.
EXTENTS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "n_embd", "n_head", "n_inner", "dim", "n_heads", "hidden_dim", "d_model", "d_kv", "d_ff", "num_heads",
    "num_channels", "projection_dim",
)  # fmt: skip
# What the weights do not bound, or not by an extent of their own.
POSITIONS = (
    "max_position_embeddings", "n_positions", "num_experts_per_tok", "decoder_sparse_step", "sliding_window_pattern",
    "_sliding_window_pattern", "original_max_position_embeddings", "relative_attention_num_buckets",
    "relative_attention_max_distance",
)  # fmt: skip
NULLABLE = (
    "num_decoder_layers", "num_local_experts", "num_experts", "num_key_value_heads", "head_dim", "n_inner",
    "sliding_window_pattern", "_sliding_window_pattern", "original_max_position_embeddings", "num_experts_per_tok",
)  # fmt: skip
_SIZES = {name: SIZE | NULL if name in NULLABLE else SIZE for name in (*LAYERS, *EXPERTS, *EXTENTS, *POSITIONS)}
_ROPE = {
    **dict.fromkeys(
        ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"),
        POSITIVE | NULL,
    ),
    **dict.fromkeys(("mscale", "mscale_all_dim"), DEVIATION | NULL),
    **dict.fromkeys(("short_factor", "long_factor"), listed(POSITIVE) | NULL),
    **dict.fromkeys(("rope_type", "type"), TEXT | NULL),
    "partial_rotary_factor": FRACTION | NULL,
    "truncate": FLAG | NULL,
    "original_max_position_embeddings": SIZE | NULL,
}
SCHEMA: dict[str, Kind] = {
    **_ROPE,
    **_SIZES,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "query_pre_attn_scalar"), POSITIVE),
    **dict.fromkeys(("rope_local_base_freq", "attn_logit_softcapping", "final_logit_softcapping"), POSITIVE | NULL),
    "clip_qkv": POSITIVE | NULL,
    "rotary_emb_base": POSITIVE,
    "rotary_pct": FRACTION,
    "initializer_range": DEVIATION,
    **dict.fromkeys(
        (
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "use_sliding_window",
            "norm_topk_prob",
            "qkv_bias",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "use_parallel_residual",
            "scale_decoder_outputs",
        ),
        FLAG | NULL,
    ),
    **dict.fromkeys(("sliding_window", "max_window_layers", "type_vocab_size"), COUNT | NULL),
    "type_vocab_size": COUNT,
    **dict.fromkeys(("image_size", "patch_size"), PIXELS | listed(PIXELS)),
    **dict.fromkeys(
        ("model_type", "hidden_act", "hidden_activation", "activation_function", "activation"), TEXT | NULL
    ),
    "feed_forward_proj": TEXT,
    **dict.fromkeys(("architectures", "layer_types"), listed(TEXT) | NULL),
    "mlp_only_layers": listed(COUNT) | NULL,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKEN | listed(TOKEN) | NULL),
    "decoder_start_token_id": TOKEN | NULL,
    **dict.fromkeys(("id2label", "label2id", heads.KEY), OBJECT | NULL),
}
_TOWERS = ("vision_config", "text_config", "vision_config_dict", "text_config_dict")
_ROPES = ("rope_parameters", "rope_scaling")
_KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
HEAD = {"classes": SIZE, "pool": TEXT, "dense": TEXT}


def _sections(description: Mapping[str, Any], schema: Mapping[str, Kind], where: str) -> Any:
    """``(section, its schema, where it is)`` of a description and of the sections in it."""
    yield description, schema, where
    inner = dict.fromkeys(_TOWERS, SCHEMA) | dict.fromkeys(_ROPES, _ROPE) | dict.fromkeys(_KINDS_OF_LAYERS, _ROPE)
    for name, of in inner.items():
        section = description.get(name)
        if section is not None:
            check({name: section}, {name: OBJECT}, where, LoadError)
            yield from _sections(section, of, f"{where}: {name}")


def check_kinds(description: Mapping[str, Any], where: object) -> None:
    """:class:`LoadError`, naming the key, for a value of a ``config.json`` of another kind than :data:`SCHEMA` says.

    Of a model type that jft does not know, whose keys may mean something else, only that one is looked at.
    """
    check(description, {"model_type": SCHEMA["model_type"]}, where, LoadError)
    if description.get("model_type") not in registry.families():
        return
    for section, schema, place in _sections(description, SCHEMA, str(where)):
        check(section, schema, place, LoadError)
    head = description.get(heads.KEY)
    if head is not None:
        need(head, HEAD, f"{where}: {heads.KEY}", LoadError)


def check_sizes(description: Mapping[str, Any], entries: Mapping[str, Entry], where: object) -> None:
    """:class:`LoadError` for a size of ``config.json`` beyond what the weights hold.

    Every layer and expert has a tensor or a row of one. Before a model is described by these sizes, for which 10**9 layers take
    all memory; the shapes of all tensors are compared after it.
    """
    # Values of the largest tensor, not its longest axis: of extents a config may have some that its family does not read.
    largest = max((math.prod(entry.shape) for entry in entries.values()), default=1)
    most = dict.fromkeys(LAYERS, len(entries)) | dict.fromkeys(EXPERTS, max(largest, len(entries)))
    most |= dict.fromkeys(EXTENTS, largest)
    for section, _, place in _sections(description, SCHEMA, str(where)):
        for name, limit in most.items():
            if isinstance(section.get(name), int) and section[name] > limit:
                raise LoadError(
                    f"{place}: {name} is {section[name]}, more than the weights hold ({len(entries)} tensors of at most "
                    f"{largest} values); config.json and the weights do not belong together"
                )
