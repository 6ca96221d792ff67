"""Reading and writing ``config.json``: activations, special tokens and rotary embeddings, and features that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jft.models.decoder import DecoderConfig
from jft.models.rope import Rope

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def require(c: Mapping[str, Any], key: str) -> Any:
    """``c[key]``, or a ValueError that says what is missing."""
    if c.get(key) is None:
        raise ValueError(f"config.json of this {c.get('model_type', 'model')} lacks {key!r}")
    return c[key]


def refuse(c: Mapping[str, Any], **allowed: Any) -> None:
    """``ValueError`` where a key is set to anything but its allowed value (or absent, or None)."""
    # Quantised weights have other tensors and shapes, in every family.
    for key, value in {"quantization_config": None, **allowed}.items():
        if c.get(key) is not None and c[key] != value:
            kind = c.get("model_type", "model")
            raise ValueError(f"config.json of this {kind}: {key} = {c[key]!r} is not supported; only {value!r} is")


def activation(name: str) -> str:
    """The jft name of a Hugging Face activation."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_name(name: str) -> str:
    """The Hugging Face name of a jft activation."""
    # The other names are the same in both libraries.
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else name


def special_tokens(c: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The special token ids that ``config.json`` sets, hashable."""
    freeze = lambda v: tuple(v) if isinstance(v, list) else v
    return tuple((key, freeze(c[key])) for key in _TOKENS if c.get(key) is not None)


def special_token_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`special_tokens`; ids that are not set are null, whatever transformers' default is."""
    thaw = lambda v: list(v) if isinstance(v, tuple) else v
    return dict.fromkeys(_TOKENS) | {key: thaw(value) for key, value in config.special_tokens}


_ROPE_FIELDS = {
    "rope_theta": "theta",
    "partial_rotary_factor": "fraction",
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "low_freq_factor": "low_frequency",
    "high_freq_factor": "high_frequency",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "short_factor": "short",
    "long_factor": "long",
}
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope(c: Mapping[str, Any], **defaults: Any) -> Rope:
    """The rotary embedding of a config: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling`` of older files.

    defaults: ``rope_theta``, ``partial_rotary_factor`` where the file has none.
    """
    flat = {key: c[key] for key in _ROPE_FIELDS if c.get(key) is not None}
    parameters = {**defaults, **flat, **(c.get("rope_parameters") or {}), **(c.get("rope_scaling") or {})}
    # Phi-3 has it at the top level, where transformers looks first.
    if flat.get("original_max_position_embeddings"):
        parameters["original_max_position_embeddings"] = flat["original_max_position_embeddings"]
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    # Both spellings may be in one file; ``type`` is the older one.
    parameters.pop("type", None)
    if kind not in _ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; only {', '.join(_ROPE_KINDS)}")
    unknown = [key for key, value in parameters.items() if key not in _ROPE_FIELDS and value is not None]
    if unknown:
        raise ValueError(f"rope parameters {', '.join(unknown)} are not supported")
    freeze = lambda v: tuple(v) if isinstance(v, list) else v
    fields = {_ROPE_FIELDS[key]: freeze(value) for key, value in parameters.items() if value is not None}
    # transformers reads only these two for a default rope.
    if kind == "default":
        fields = {key: value for key, value in fields.items() if key in ("theta", "fraction")}
    return Rope(kind=kind, **fields)  # type: ignore[arg-type]


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """The inverse of :func:`rope`: what transformers 5 calls ``rope_parameters``; defaults are left out."""
    plain = Rope()
    out: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    for key, field in _ROPE_FIELDS.items():
        value = getattr(rope, field)
        if value != getattr(plain, field):
            out[key] = list(value) if isinstance(value, tuple) else value
    return out


def rope_fields(rope: Rope) -> dict[str, Any]:
    """``rope_parameters``, and for older readers the ``rope_theta`` and ``rope_scaling`` that say the same."""
    parameters = rope_parameters(rope)
    out: dict[str, Any] = {"rope_parameters": parameters, "rope_theta": rope.theta}
    if rope.kind != "default":
        out["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return out


def exact(to_hf: Callable[[Any], dict], from_hf: Callable[[dict], Any]) -> Callable[[Any], dict]:
    """``to_hf`` that refuses a config its family cannot express, instead of saving another model."""

    def to_hf_exactly(config: Any) -> dict[str, Any]:
        out = to_hf(config)
        restored = from_hf(out)
        fields = [f.name for f in dataclasses.fields(config)]
        differing = [f"{n}={getattr(config, n)!r}" for n in fields if getattr(config, n) != getattr(restored, n)]
        if differing:
            raise ValueError(f"a {config.family} checkpoint cannot say {', '.join(differing)}")
        return out

    return to_hf_exactly
