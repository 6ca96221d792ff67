"""ViT and CLIP checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np

from jft.models.clip import ClipConfig, TextConfig
from jft.models.hf.config_json import activation, activation_name, refuse
from jft.models.hf.mapping import Family, Source
from jft.models.hf.sources import Sources, present
from jft.models.vision import VisionConfig

_VIT = {
    "attn/q": "attention.attention.query",
    "attn/k": "attention.attention.key",
    "attn/v": "attention.attention.value",
    "attn/o": "attention.output.dense",
    "attn_norm": "layernorm_before",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "layernorm_after",
}
_CLIP = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.out_proj",
    "attn_norm": "layer_norm1",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
    "mlp_norm": "layer_norm2",
}


def _kernel(x: np.ndarray) -> np.ndarray:
    """``[D, C, p, p] -> [p, p, C, D]``: the order in which :func:`jft.models.vision.patches` lays out a patch."""
    return x.transpose(2, 3, 1, 0)


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _token(x: np.ndarray) -> np.ndarray:
    # Stored with the axes of a batch and of a token.
    return x[0, 0]


def _row(x: np.ndarray) -> np.ndarray:
    return x[0]


def _patch(out: Sources, path: str, name: str, config: VisionConfig) -> None:
    shape = (config.width, config.channels, config.patch, config.patch)
    out.leaf(f"{path}/w", f"{name}.weight", shape, view=_kernel, out=_flat)
    if config.patch_bias:
        out.leaf(f"{path}/b", f"{name}.bias", (config.width,))


def _square(raw: dict[str, Any], key: str, default: int) -> int:
    """A side length, in the file one number or equal height and width."""
    value = raw.get(key, default)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ValueError(f"config.json: {key} = {value} is not supported; images and patches are square")
    return sides.pop()


def _vit_from_hf(raw: dict[str, Any]) -> VisionConfig:
    width = raw.get("hidden_size", 768)
    refuse(raw, pooler_act="tanh", pooler_output_size=width)
    return VisionConfig(
        image=_square(raw, "image_size", 224),
        patch=_square(raw, "patch_size", 16),
        channels=raw.get("num_channels", 3),
        width=width,
        layers=raw.get("num_hidden_layers", 12),
        heads=raw.get("num_attention_heads", 12),
        hidden=raw.get("intermediate_size", 3072),
        activation=activation(raw.get("hidden_act", "gelu")),
        eps=raw.get("layer_norm_eps", 1e-12),
        qkv_bias=raw.get("qkv_bias", True),
        # a guess, which the tensor names correct: only the bare model is saved with one
        pooler="ViTModel" in (raw.get("architectures") or ()),
    )


def _vit_to_hf(config: VisionConfig) -> dict[str, Any]:
    # CLIP's towers are of this class too, and no ViT file can express them.
    if config.embed_norm or not config.patch_bias:
        raise ValueError("a ViT checkpoint has no norm before its layers and a bias on its patches; this model differs")
    return {"architectures": ["ViTModel"], "model_type": "vit", "qkv_bias": config.qkv_bias, **_tower(config)}


def _tower(config: VisionConfig) -> dict[str, Any]:
    if config.selection is not None:
        raise ValueError(
            "a checkpoint cannot say that tokens are selected; save jft.models.token_merging.with_selection(model, None)"
        )
    return {
        "image_size": config.image,
        "patch_size": config.patch,
        "num_channels": config.channels,
        **_sizes(config),
    }


def _sizes(config: VisionConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.eps,
    }


def _vit_table(config: VisionConfig) -> dict[str, Source]:
    out, rows = Sources(prefixes=("vit.", "")), config.side**2 + 1
    _patch(out, "patch", "embeddings.patch_embeddings.projection", config)
    out.leaf("cls", "embeddings.cls_token", (1, 1, config.width), view=_token)
    out.leaf("positions/table", "embeddings.position_embeddings", (1, rows, config.width), view=_row)
    out.block("layers", "encoder.layer.{layer}", _VIT, config.width, config.hidden, config.qkv_bias)
    out.norm("final_norm", "layernorm", config.width)
    if config.pooler:
        out.linear("pooler", "pooler.dense", config.width, config.width)
    return out.table_of


def _vit_head(config: VisionConfig, classes: int) -> dict[str, Source]:
    out = Sources()
    out.linear("classifier", "classifier", config.width, classes)
    return out.table_of


def _clip_from_hf(raw: dict[str, Any]) -> ClipConfig:
    # old configs repeat each tower's under *_config_dict, which then prevails
    vision, text = (
        {**(raw.get(f"{t}_config") or {}), **(raw.get(f"{t}_config_dict") or {})} for t in ("vision", "text")
    )
    return ClipConfig(
        vision=VisionConfig(
            image=_square(vision, "image_size", 224),
            patch=_square(vision, "patch_size", 32),
            channels=vision.get("num_channels", 3),
            width=vision.get("hidden_size", 768),
            layers=vision.get("num_hidden_layers", 12),
            heads=vision.get("num_attention_heads", 12),
            hidden=vision.get("intermediate_size", 3072),
            activation=activation(vision.get("hidden_act", "quick_gelu")),
            eps=vision.get("layer_norm_eps", 1e-5),
            # So in every CLIP checkpoint; the config has no fields for these two.
            patch_bias=False,
            embed_norm=True,
            family="clip_vision_model",
        ),
        text=TextConfig(
            vocab=text.get("vocab_size", 49408),
            width=text.get("hidden_size", 512),
            layers=text.get("num_hidden_layers", 12),
            heads=text.get("num_attention_heads", 8),
            hidden=text.get("intermediate_size", 2048),
            positions=text.get("max_position_embeddings", 77),
            activation=activation(text.get("hidden_act", "quick_gelu")),
            eps=text.get("layer_norm_eps", 1e-5),
            eos=text.get("eos_token_id", 49407),
        ),
        projection=raw.get("projection_dim", 512),
    )


def _clip_to_hf(config: ClipConfig) -> dict[str, Any]:
    vision, text = config.vision, config.text
    if vision.patch_bias or not vision.embed_norm or not vision.qkv_bias or vision.pooler:
        raise ValueError(
            "a CLIP checkpoint's image tower has no patch bias and no pooler, a norm before its layers, and biases"
        )
    projection_field = {"projection_dim": config.projection}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **projection_field,
        "vision_config": {"model_type": "clip_vision_model", **_tower(vision), **projection_field},
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab,
            "max_position_embeddings": text.positions,
            "eos_token_id": text.eos,
            **_sizes(text),
            **projection_field,
        },
    }


def _clip_table(config: ClipConfig) -> dict[str, Source]:
    out, vision, text = Sources(), config.vision, config.text
    _patch(out, "vision/patch", "vision_model.embeddings.patch_embedding", vision)
    out.leaf("vision/cls", "vision_model.embeddings.class_embedding", (vision.width,))
    out.table("vision/positions", "vision_model.embeddings.position_embedding", vision.side**2 + 1, vision.width)
    out.norm("vision/embed_norm", "vision_model.pre_layrnorm", vision.width)  # so spelled in every checkpoint
    out.block("vision/layers", "vision_model.encoder.layers.{layer}", _CLIP, vision.width, vision.hidden)
    out.norm("vision/final_norm", "vision_model.post_layernorm", vision.width)
    out.table("text/embed", "text_model.embeddings.token_embedding", text.vocab, text.width)
    out.table("text/positions", "text_model.embeddings.position_embedding", text.positions, text.width)
    out.block("text/layers", "text_model.encoder.layers.{layer}", _CLIP, text.width, text.hidden)
    out.norm("text/final_norm", "text_model.final_layer_norm", text.width)
    out.linear("vision_projection", "visual_projection", vision.width, config.projection, bias=False)
    out.linear("text_projection", "text_projection", text.width, config.projection, bias=False)
    out.leaf("logit_scale", "logit_scale", ())
    return out.table_of


FAMILIES = {
    "vit": Family(
        _vit_from_hf,
        _vit_to_hf,
        _vit_table,
        (r"(vit\.)?embeddings\.mask_token", r"decoder\..*", r"(vit\.)?pooler\..*"),
        _vit_head,
        "ViTForImageClassification",
        present("pooler.dense.weight", "pooler"),
    ),
    "clip": Family(_clip_from_hf, _clip_to_hf, _clip_table, (r".*position_ids",)),
}
