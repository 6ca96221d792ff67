"""GGUF files as checkpoints: the `config.json` that their metadata says, and the tensors of each parameter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jft.gguf import File, GgufError, read
from jft.models.decoder import DecoderConfig
from jft.models.hf.checkpoint import Entry, LoadError
from jft.models.hf.mapping import Family, Source, transposed
from jft.models.hf.registry import family_named
from jft.models.rope import Rope
from jft.names import nearest

# Of Llama 3, whose files hold the factors alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_MODULES = {
    "embed": "token_embd",
    "positions": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
    "layers/attn_norm": "attn_norm",
    "layers/attn_post_norm": "post_attention_norm",
    "layers/mlp_norm": "ffn_norm",
    "layers/mlp_post_norm": "post_ffw_norm",
    "layers/attn/q": "attn_q",
    "layers/attn/k": "attn_k",
    "layers/attn/v": "attn_v",
    "layers/attn/o": "attn_output",
    "layers/attn/q_norm": "attn_q_norm",
    "layers/attn/k_norm": "attn_k_norm",
    "layers/mlp/gate": "ffn_gate",
    "layers/mlp/up": "ffn_up",
    "layers/mlp/down": "ffn_down",
    "layers/mlp/router": "ffn_gate_inp",
    "layers/mlp/experts/gate": "ffn_gate_exps",
    "layers/mlp/experts/up": "ffn_up_exps",
    "layers/mlp/experts/down": "ffn_down_exps",
}
_LEAVES = {"w": "weight", "b": "bias", "scale": "weight", "bias": "bias", "table": "weight"}


class GgufCheckpoint:
    """The tensors of a GGUF file under their names there, in float32; as :class:`jft.models.hf.checkpoint.Checkpoint`.

    offset: what the file's norms have beyond the parameters: llama.cpp writes ``1 + scale`` where Gemma stores ``scale``.
    """

    def __init__(self, file: File):
        self.file, self.directory, self.description, self.offset = file, file.path, file.path, 0.0
        # As floating point, whatever they are quantised to: `tensor` gives no other.
        self.entries = {name: Entry(file.path, "F32", file.shape(name), 0, 0) for name in file.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> np.ndarray:
        """The tensor, dequantised."""
        try:
            value = self.file.tensor(name)
        except GgufError as error:
            raise LoadError(str(error)) from None
        return value - np.float32(self.offset) if self.offset and name.endswith("norm.weight") else value

    def release(self, name: str) -> None:
        """Nothing: the dequantised copy is gone with its last reader."""


def open_gguf(path: Path) -> tuple[Family, dict[str, Any], GgufCheckpoint]:
    """``(family, description, checkpoint)`` of a GGUF file: the description is what its ``config.json`` would be.

    Raises :class:`LoadError` for a file that is cut, no GGUF file, or of an architecture or feature that jft does not have.
    """
    try:
        file = read(path)
        architecture = file.architecture
        if architecture not in _ARCHITECTURES:
            near = nearest(architecture, _ARCHITECTURES, cutoff=0.5, hint="nearest: {}; ")
            raise GgufError(
                f"{path}: architecture {architecture!r} is not one that jft reads from GGUF files; {near}known: "
                f"{', '.join(_ARCHITECTURES)}"
            )
        description = _ARCHITECTURES[architecture](_Fields(file))
    except GgufError as error:
        raise LoadError(str(error)) from None
    checkpoint = GgufCheckpoint(file)
    family = family_named(description["model_type"])
    # Gemma's, whatever its version.
    checkpoint.offset = float(description["model_type"].startswith("gemma"))
    table = functools.partial(_table, permuted=architecture == "llama")
    return (
        dataclasses.replace(family, table=table, ignored=(r"rope_(freqs|factors_(long|short))\.weight",)),
        (description),
        checkpoint,
    )


class _Fields:
    """The metadata of a file under the prefix of its architecture."""

    def __init__(self, file: File):
        self.file = file

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.get(f"{self.file.architecture}.{key}", default)

    def number(self, key: str) -> Any:
        """One number for all layers, which must be there."""
        value = self.file.value(f"{self.file.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise GgufError(
                    f"{self.file.path}: {key} differs from layer to layer ({value}); one number is supported"
                )
            return value[0]
        return value

    def real(self, key: str, default: float) -> float:
        """A number that the file has in float32, as it was written before: 1e-5, not 9.99999975e-06."""
        value = self.get(key)
        return default if value is None else float(str(np.float32(value)))

    def optional(self, key: str) -> Any:
        return self.number(key) if self.get(key) is not None else None

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors


def _common(f: _Fields, model_type: str) -> dict[str, Any]:
    """The entries of ``config.json`` that Llama's descendants share."""
    width, heads = f.number("embedding_length"), f.number("attention.head_count")
    head_size = f.optional("attention.key_length") or width // heads
    if f.get("attention.value_length", head_size) != head_size:
        raise GgufError(f"{f.file.path}: values of another size than keys are not supported")
    return {
        "model_type": model_type,
        "vocab_size": f.file.shape("token_embd.weight")[0],
        "hidden_size": width,
        "num_hidden_layers": f.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": f.optional("attention.head_count_kv") or heads,
        "head_dim": head_size,
        "intermediate_size": f.optional("feed_forward_length"),
        "max_position_embeddings": f.number("context_length"),
        "rms_norm_eps": f.real("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": not f.has("output.weight"),
        "attention_bias": f.has("blk.0.attn_q.bias"),
        "rope_parameters": _rope(f, head_size),
        **_special_tokens(f),
    }


def _special_tokens(f: _Fields) -> dict[str, Any]:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: f.file.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}


def _rope(f: _Fields, head_size: int) -> dict[str, Any]:
    """``rope_parameters``, from the metadata and, for Llama 3 and Phi-3, the tensors of factors."""
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": f.real("rope.freq_base", 10_000.0)}
    turning = f.optional("rope.dimension_count") or head_size
    if turning != head_size:
        out["partial_rotary_factor"] = turning / head_size
    kind = f.get("rope.scaling.type", "none")
    original = f.get("rope.scaling.original_context_length")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise GgufError(f"{f.file.path}: rope scaling {kind!r} is not supported; only none, linear, yarn and longrope")
    if f.has("rope_factors_long.weight"):
        for name in ("short", "long"):
            out[f"{name}_factor"] = f.file.tensor(f"rope_factors_{name}.weight").tolist()
        return out | {"rope_type": "longrope", "original_max_position_embeddings": original}
    if f.has("rope_freqs.weight"):
        return out | _llama3(f, Rope(theta=out["rope_theta"]), turning)
    if kind in ("linear", "yarn"):
        out |= {"rope_type": kind, "factor": f.get("rope.scaling.factor")}
        if kind == "yarn":
            out["original_max_position_embeddings"] = original
            out["attention_factor"] = f.get("rope.scaling.attn_factor")
    return {key: value for key, value in out.items() if value is not None}


def _llama3(f: _Fields, plain: Rope, turning: int) -> dict[str, Any]:
    """Llama 3's scaling, whose result the file holds as one factor for each frequency; refused where it is another's."""
    factors = f.file.tensor("rope_freqs.weight").reshape(-1)
    factor = float(factors.max())
    low, high, original = _LLAMA3.values()
    turns = original * plain.theta ** -(np.arange(0, turning, 2) / turning) / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / (keep + (1 - keep) / factor)
    if len(factors) != len(expected) or not np.allclose(factors, expected, rtol=1e-3):
        raise GgufError(f"{f.file.path}: rope_freqs.weight are not the factors of Llama 3's scaling; not supported")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _llama(f: _Fields) -> dict[str, Any]:
    # Mixtral's files say llama, and so do Mistral's, which have no window there.
    experts = f.optional("expert_count")
    if not experts:
        return _common(f, "llama")
    return {
        **_common(f, "mixtral"),
        "num_local_experts": experts,
        "num_experts_per_tok": f.number("expert_used_count"),
    }


def _family(model_type: str, **extra: Callable[[_Fields], Any]) -> Callable[[_Fields], dict[str, Any]]:
    """A reader of a family of Llama's descendants, with what only it has."""
    return lambda f: {**_common(f, model_type), **{key: value(f) for key, value in extra.items()}}


_MOE = {
    "num_experts": lambda f: f.number("expert_count"),
    "num_experts_per_tok": lambda f: f.number("expert_used_count"),
}


def _gemma_scale(layers: int) -> Callable[[_Fields], float]:
    """The size of heads, but for the largest of the family (27B, by its ``layers``), which has width / heads."""

    def scale(f: _Fields) -> float:
        if f.number("block_count") == layers:
            return f.number("embedding_length") / f.number("attention.head_count")
        return f.number("attention.key_length")

    return scale


def _gemma3(f: _Fields) -> dict[str, Any]:
    out = {**_common(f, "gemma3_text"), "sliding_window": f.number("attention.sliding_window")}
    parameters = out.pop("rope_parameters")
    local = {"rope_type": "default", "rope_theta": f.real("rope.freq_base_swa", 10_000.0)}
    nested = {"full_attention": parameters, "sliding_attention": local}
    return {**out, "query_pre_attn_scalar": _gemma_scale(62)(f), "rope_parameters": nested}


def _gpt2(f: _Fields) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": f.file.shape("token_embd.weight")[0],
        "n_embd": f.number("embedding_length"),
        "n_layer": f.number("block_count"),
        "n_head": f.number("attention.head_count"),
        "n_inner": f.number("feed_forward_length"),
        "n_positions": f.number("context_length"),
        "layer_norm_epsilon": f.real("attention.layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": not f.has("output.weight"),
        **_special_tokens(f),
    }


def _neox(f: _Fields) -> dict[str, Any]:
    out = _common(f, "gpt_neox")
    rope = out["rope_parameters"]
    # NeoX turns a quarter by default, so a full rotation has to be said.
    out["rope_parameters"] = {"partial_rotary_factor": 1.0, **rope}
    return {
        **out,
        "layer_norm_eps": f.real("attention.layer_norm_epsilon", 1e-5),
        "use_parallel_residual": f.get("use_parallel_residual", True),
        "attention_bias": f.has("blk.0.attn_qkv.bias"),
    }


_ARCHITECTURES: dict[str, Callable[[_Fields], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _family("qwen2"),
    "qwen3": _family("qwen3"),
    "qwen3moe": _family(
        "qwen3_moe",
        moe_intermediate_size=lambda f: f.number("expert_feed_forward_length"),
        norm_topk_prob=lambda f: True,
        **_MOE,
    ),
    "gemma": _family("gemma"),
    "gemma2": _family(
        "gemma2",
        sliding_window=lambda f: f.number("attention.sliding_window"),
        attn_logit_softcapping=lambda f: f.get("attn_logit_softcapping"),
        final_logit_softcapping=lambda f: f.get("final_logit_softcapping"),
        query_pre_attn_scalar=_gemma_scale(46),
    ),
    "gemma3": _gemma3,
    "olmo2": _family("olmo2"),
    "olmoe": _family("olmoe", clip_qkv=lambda f: f.get("attention.clamp_kqv"), **_MOE),
    "phi3": _family(
        "phi3",
        sliding_window=lambda f: f.get("attention.sliding_window") or None,
        # Where Phi-3 has it, and looks for it first.
        original_max_position_embeddings=lambda f: f.get(
            "rope.scaling.original_context_length", f.number("context_length")
        ),
    ),
    "gpt2": _gpt2,
    "gptneox": _neox,
}


def _table(config: DecoderConfig, permuted: bool) -> dict[str, Source]:
    """Every parameter's tensor. permuted: rows of q and k are in the order of llama.cpp's rotary embedding."""
    table = {}
    for path, shape in config.shapes().items():
        module, leaf = path.rsplit("/", 1)
        layered = path.startswith("layers/")
        name = f"{'blk.{layer}.' if layered else ''}{_MODULES[module]}.{_LEAVES[leaf]}"
        shape = shape[layered:]
        if leaf == "w":
            view: Callable = transposed if len(shape) == 2 else _matrices_transposed
            table[path] = Source(name, (*shape[:-2], *shape[:-3:-1]), view)
        else:
            table[path] = Source(name, shape)
        heads = {"layers/attn/q": config.heads, "layers/attn/k": config.kv_heads}.get(module)
        if permuted and heads and leaf in ("w", "b"):
            view = functools.partial(_unpermuted, heads=heads)
            table[path] = dataclasses.replace(table[path], view=view, out=_merged)
    if config.family in ("phi3", "gpt2", "gpt_neox"):
        sizes = (config.heads * config.head_size, *[config.kv_heads * config.head_size] * 2)
        _fuse(table, "attn_qkv", ("attn/q", "attn/k", "attn/v"), sizes)
    if config.family == "phi3":
        _fuse(table, "ffn_up", ("mlp/gate", "mlp/up"), (config.hidden, config.hidden))
    return table


def _fuse(table: dict[str, Source], name: str, parts: tuple[str, ...], rows: tuple[int, ...]) -> None:
    """Several parameters as the rows of one tensor, one below the other."""
    for i, part in enumerate(parts):
        for leaf, suffix in (("w", "weight"), ("b", "bias")):
            path = f"layers/{part}/{leaf}"
            if path in table:
                view = functools.partial(_rows, start=sum(rows[:i]), stop=sum(rows[: i + 1]))
                table[path] = Source(f"blk.{{layer}}.{name}.{suffix}", (sum(rows), *table[path].shape[1:]), view)


def _rows(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    return x[start:stop].T


def _matrices_transposed(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def _unpermuted(x: np.ndarray, heads: int) -> np.ndarray:
    """``[H K, D]`` to ``[D, H, 2, K / 2]``, or ``[H K]`` to ``[H, 2, K / 2]``: pairs that turn together stand side by side."""
    parts = np.swapaxes(x.reshape(heads, -1, 2, *x.shape[1:]), 1, 2)
    return np.moveaxis(parts, -1, 0) if x.ndim == 2 else parts


def _merged(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-3], -1)
