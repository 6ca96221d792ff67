"""BERT, RoBERTa and DistilBERT checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jft.models.encoder import EncoderConfig
from jft.models.hf.config_json import activation, activation_name, refuse
from jft.models.hf.mapping import Family, Source
from jft.models.hf.sources import Sources, present

# heads of other tasks, and buffers that old checkpoints carry
_IGNORED = (r".*position_ids", r".*token_type_ids", r"cls\..*", r"lm_head\..*", r"qa_outputs\..*", r"vocab_.*")
_BERT = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "layers": "encoder.layer.{layer}",
    "attn/q": "attention.self.query",
    "attn/k": "attention.self.key",
    "attn/v": "attention.self.value",
    "attn/o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
    "pooler": "pooler.dense",
}
_DISTIL = _BERT | {
    "layers": "transformer.layer.{layer}",
    "attn/q": "attention.q_lin",
    "attn/k": "attention.k_lin",
    "attn/v": "attention.v_lin",
    "attn/o": "attention.out_lin",
    "attn_norm": "sa_layer_norm",
    "mlp/up": "ffn.lin1",
    "mlp/down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}


def _table(names: dict[str, str], prefix: str) -> Callable[[EncoderConfig], dict[str, Source]]:
    def table(config: EncoderConfig) -> dict[str, Source]:
        out = Sources(prefixes=(f"{prefix}.", ""), old_norms=True)
        for leaf, rows in (("embed", config.vocab), ("positions", config.positions), ("types", config.types)):
            if rows:
                out.table(leaf, names[leaf], rows, config.width)
        out.norm("embed_norm", names["embed_norm"], config.width)
        out.block("layers", names["layers"], names, config.width, config.hidden)
        if config.pooler:
            out.linear("pooler", names["pooler"], config.width, config.width)
        return out.table_of

    return table


def _from_bert(family: str) -> Callable[[dict[str, Any]], EncoderConfig]:
    def from_hf(raw: dict[str, Any]) -> EncoderConfig:
        refuse(raw, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
        # RoBERTa counts positions from its padding id + 1, a habit of fairseq.
        padding = raw.get("pad_token_id")
        offset = (1 if padding is None else padding) + 1 if family == "roberta" else 0
        return EncoderConfig(
            family=family,
            vocab=raw.get("vocab_size", 50265 if family == "roberta" else 30522),
            width=raw.get("hidden_size", 768),
            layers=raw.get("num_hidden_layers", 12),
            heads=raw.get("num_attention_heads", 12),
            hidden=raw.get("intermediate_size", 3072),
            positions=raw.get("max_position_embeddings", 512),
            position_offset=offset,
            types=raw.get("type_vocab_size", 2),
            activation=activation(raw.get("hidden_act", "gelu")),
            eps=raw.get("layer_norm_eps", 1e-12),
            # A guess, which the tensor names correct (``refine``).
            pooler=family == "bert",
        )

    return from_hf


def _to_bert(architecture: str) -> Callable[[EncoderConfig], dict[str, Any]]:
    def to_hf(config: EncoderConfig) -> dict[str, Any]:
        out = {
            "architectures": [architecture],
            "model_type": config.family,
            "vocab_size": config.vocab,
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": config.hidden,
            "max_position_embeddings": config.positions,
            "type_vocab_size": config.types,
            "hidden_act": activation_name(config.activation),
            "layer_norm_eps": config.eps,
        }
        roberta = config.family == "roberta"
        # transformers derives the offset from the padding id.
        return out | ({"pad_token_id": config.position_offset - 1} if roberta else {})

    return to_hf


def _from_distil(raw: dict[str, Any]) -> EncoderConfig:
    return EncoderConfig(
        family="distilbert",
        vocab=raw.get("vocab_size", 30522),
        width=raw.get("dim", 768),
        layers=raw.get("n_layers", 6),
        heads=raw.get("n_heads", 12),
        hidden=raw.get("hidden_dim", 3072),
        positions=raw.get("max_position_embeddings", 512),
        types=0,
        activation=activation(raw.get("activation", "gelu")),
        # Fixed in transformers' code: the config has no field for it.
        eps=1e-12,
        pooler=False,
    )


def _to_distil(config: EncoderConfig) -> dict[str, Any]:
    if config.eps != 1e-12:
        raise ValueError(f"distilbert checkpoints have a norm epsilon of 1e-12; this model has {config.eps}")
    return {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": config.vocab,
        "dim": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "hidden_dim": config.hidden,
        "max_position_embeddings": config.positions,
        "activation": activation_name(config.activation),
    }


def _head(output: str, dense: str = "") -> Callable[[EncoderConfig, int], dict[str, Source]]:
    def classifier(config: EncoderConfig, classes: int) -> dict[str, Source]:
        out = Sources()
        out.linear("classifier", output, config.width, classes)
        if dense:
            out.linear("classifier/dense", dense, config.width, config.width)
        return out.table_of

    return classifier


FAMILIES = {
    "bert": Family(
        _from_bert("bert"),
        _to_bert("BertModel"),
        _table(_BERT, "bert"),
        (*_IGNORED, r"(bert\.)?pooler\..*"),
        _head("classifier"),
        "BertForSequenceClassification",
        present("pooler.dense.weight", "pooler"),
    ),
    "roberta": Family(
        _from_bert("roberta"),
        _to_bert("RobertaModel"),
        _table(_BERT, "roberta"),
        (*_IGNORED, r"(roberta\.)?pooler\..*"),
        _head("classifier.out_proj", "classifier.dense"),
        "RobertaForSequenceClassification",
        present("pooler.dense.weight", "pooler"),
    ),
    "distilbert": Family(
        _from_distil,
        _to_distil,
        _table(_DISTIL, "distilbert"),
        _IGNORED,
        _head("classifier", "pre_classifier"),
        "DistilBertForSequenceClassification",
    ),
}
