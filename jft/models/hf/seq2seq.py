"""T5 checkpoints, of both versions."""

from __future__ import annotations

from typing import Any

from jft.models.hf.config_json import activation, activation_name
from jft.models.hf.mapping import Family, Source
from jft.models.hf.sources import Sources, present
from jft.models.t5 import T5Config


def _from_hf(raw: dict[str, Any]) -> T5Config:
    gated, _, name = raw.get("feed_forward_proj", "relu").rpartition("-")
    if gated not in ("", "gated"):
        raise ValueError(f"config.json: feed_forward_proj = {raw['feed_forward_proj']!r} is not supported")
    # v1.1 said "tie_word_embeddings: false"; transformers reads that as "do not scale" and saves it under the other name.
    # Whether there is a head of its own, the tensor names tell.
    scale = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings") is not False)
    start = raw.get("decoder_start_token_id") or 0
    if not 0 <= start < raw.get("vocab_size", 32128):
        raise ValueError(
            f"decoder_start_token_id is {start}, no row of the embedding of {raw.get('vocab_size', 32128)}"
        )
    return T5Config(
        vocab=raw.get("vocab_size", 32128),
        width=raw.get("d_model", 512),
        head=raw.get("d_kv", 64),
        heads=raw.get("num_heads", 8),
        hidden=raw.get("d_ff", 2048),
        layers=raw.get("num_layers", 6),
        decoder_layers=raw.get("num_decoder_layers") or raw.get("num_layers", 6),
        buckets=raw.get("relative_attention_num_buckets", 32),
        max_distance=raw.get("relative_attention_max_distance", 128),
        # "gated-gelu" has always meant the tanh approximation, "gated-silu" and others what they say
        activation="gelu_tanh" if gated and name == "gelu" else activation(name),
        gated=bool(gated),
        tied=scale,
        scale_outputs=scale,
        eps=raw.get("layer_norm_epsilon", 1e-6),
        # T5 starts its decoder with the padding id, 0.
        start=start,
    )


def _to_hf(config: T5Config) -> dict[str, Any]:
    # After "gated-", "gelu" is the tanh form, so the exact one goes by its other name.
    gated = {"gelu_tanh": "gelu", "gelu": "gelu_python"} if config.gated else {}
    name = gated.get(config.activation, activation_name(config.activation))
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab,
        "d_model": config.width,
        "d_kv": config.head,
        "num_heads": config.heads,
        "d_ff": config.hidden,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_layers,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": f"gated-{name}" if config.gated else name,
        "tie_word_embeddings": config.scale_outputs,
        "scale_decoder_outputs": config.scale_outputs,
        "layer_norm_epsilon": config.eps,
        "decoder_start_token_id": config.start,
        "is_encoder_decoder": True,
    }


def _table(config: T5Config) -> dict[str, Source]:
    out, inner = Sources(prefixes=("", "transformer.")), config.heads * config.head
    # One embedding, which files may repeat on either side.
    out.leaf(
        "embed/table",
        "shared.weight",
        (config.vocab, config.width),
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    )
    for side in ("encoder", "decoder"):
        attention = {"attn": "layer.0.SelfAttention"} | (
            {"cross": "layer.1.EncDecAttention"} if side == "decoder" else {}
        )
        for sublayer, (block, name) in enumerate(attention.items()):
            path, stem = f"{side}/layers/{block}", f"{side}.block.{{layer}}"
            for part in ("q", "k", "v"):
                out.linear(f"{path}/{part}", f"{stem}.{name}.{part}", config.width, inner, bias=False)
            out.linear(f"{path}/o", f"{stem}.{name}.o", inner, config.width, bias=False)
            out.norm(f"{path}_norm", f"{stem}.layer.{sublayer}.layer_norm", config.width, bias=False)
        _mlp(out, side, f"{side}.block.{{layer}}.layer.{len(attention)}", config)
        out.norm(f"{side}/final_norm", f"{side}.final_layer_norm", config.width, bias=False)
        # Stored in the first block; all blocks of a side share it.
        relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
        out.table(f"{side}/relative", relative, config.buckets, config.heads)
    if not config.tied:
        out.linear("head", "lm_head", config.width, config.vocab, bias=False)
    return out.table_of


def _mlp(out: Sources, side: str, name: str, config: T5Config) -> None:
    path, dense = f"{side}/layers/mlp", f"{name}.DenseReluDense"
    inputs = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
    for part, tensor in inputs.items():
        out.linear(f"{path}/{part}", f"{dense}.{tensor}", config.width, config.hidden, bias=False)
    out.linear(f"{path}/down", f"{dense}.wo", config.hidden, config.width, bias=False)
    out.norm(f"{path}_norm", f"{name}.layer_norm", config.width, bias=False)


FAMILIES = {
    "t5": Family(
        _from_hf,
        _to_hf,
        _table,
        (
            r"lm_head\.weight",
            r"(transformer\.)?(encoder|decoder)\.embed_tokens\.weight",
            r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # never used
            r"classification_head\..*",
        ),
        refine=present("lm_head.weight", "tied", absent=True),
    )
}
