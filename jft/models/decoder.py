"""Decoder language models, dense and mixtures of experts, from GPT-2 to Gemma 3, as one description."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft import tree
from jft.dot import take, transpose
from jft.kernels.attention import Mask
from jft.models import core
from jft.models.core import ACTIVATIONS, Execution, Hooks, Inputs, Params, Scope, inputs, layer_norm, rms_norm
from jft.models.memory import Memory, remember
from jft.models.moe import Experts, moe
from jft.models.rope import Rope, rotate
from jft.models.split import collect, cut, stack_scope

Array = jax.Array
# The window of layers without one: in a scan every layer needs a number, beyond any length and within int32.
UNLIMITED = 2**30


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder language model; the defaults are those of a Llama (Touvron et al. 2023, arXiv:2302.13971).

    Sizes: vocab V, width D, layers L, heads H; kv_heads G (default H) shared by H / G queries each; head_size K (default
    D / H); hidden F (default 8/3 D rounded up to a multiple of 64, or 4 D without a gate).

    Norms: ``norm`` rms or layer, ``norm_offset`` o for ``(o + scale)`` in rms; ``norm_place`` pre (before a block), post
    (on what a block adds: OLMo 2) or both (Gemma 2). ``parallel``: attention and MLP read the same residual (NeoX).

    MLP: ``down(act(gate x) * up x)``, or ``down(act(up x))`` without ``gated``; ``experts`` makes it a mixture. ``memory``
    replaces it in the layers it names by a lookup in a table; these layers are a stack of their own, ``memory/layers``,
    so that neither kind holds parameters of the other, and ``layers`` are the remaining ones.

    Attention: ``qkv_bias``, ``out_bias``; ``qk_norm`` head (an rms norm over each head of q and k, Qwen 3) or full (over
    all heads at once, OLMo 2); ``clip_qkv`` c clips them to [-c, c]; scores are scaled by ``attention_scale`` (default
    1/sqrt(K)), by 1/(layer + 1) with ``scale_by_layer``, and capped by ``attention_softcap``. ``windows``: each layer sees
    the last w tokens, itself included; an int for all layers or one per layer, None for no limit.

    Positions: ``rope``, or with None a learned table of ``max_positions`` rows. ``local_rope`` is that of layers with a
    window, where they have their own (Gemma 3).

    Ends: ``embed_scale`` multiplies embeddings by sqrt(D); ``tied`` uses the embedding as output head; ``logit_softcap``.

    family: the Hugging Face ``model_type`` under which the model is saved; with a memory always ``memory``, which has none,
    so that saving one is refused. special_tokens: (name, id) pairs of
    ``config.json`` such as ("eos_token_id", 2), kept for saving. init_std: of normal draws; ``init_residual`` divides that
    of what writes to the residual stream by sqrt(2 L) (GPT-2).
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int = 0
    head_size: int = 0
    hidden: int = 0
    max_positions: int = 2048
    family: str = "llama"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_place: Literal["pre", "post", "both"] = "pre"
    parallel: bool = False
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    experts: Experts | None = None
    memory: Memory | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None
    attention_scale: float | None = None
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    windows: int | tuple[int | None, ...] | None = None
    rope: Rope | None = Rope()
    local_rope: Rope | None = None
    embed_scale: bool = False
    tied: bool = False
    logit_softcap: float | None = None
    init_std: float = 0.02
    init_residual: bool = False
    special_tokens: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Defaults for the sizes that are 0; ``ValueError`` for what does not fit together."""
        # The config is frozen; here is the one moment before anybody reads it.
        fill = lambda name, value: object.__setattr__(self, name, getattr(self, name) or value)
        for name in ("vocab", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.head_size and self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}; set head_size")
        fill("kv_heads", self.heads)
        fill("head_size", self.width // self.heads)
        fill("hidden", 64 * math.ceil(8 * self.width / 3 / 64) if self.gated else 4 * self.width)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if self.experts and (self.mlp_bias or not self.gated):
            raise ValueError("experts are gated and have no bias; set gated=True, mlp_bias=False")
        if self.memory:
            if self.memory.layers[-1] >= self.layers or len(self.memory.layers) == self.layers:
                raise ValueError(
                    f"memory layers {self.memory.layers} of {self.layers} layers: name some of 0 to {self.layers - 1}, not all"
                )
            object.__setattr__(self, "family", "memory")
        windows = (self.windows,) * self.layers if isinstance(self.windows, int) else self.windows
        if windows is not None and len(windows) != self.layers:
            raise ValueError(f"windows has {len(windows)} entries for {self.layers} layers")
        # No window in any layer is None, so that configs which mean the same are equal.
        object.__setattr__(self, "windows", tuple(windows) if windows and any(windows) else None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter path and its shape."""
        D, V, K = self.width, self.vocab, self.head_size
        out: dict[str, tuple[int, ...]] = {"embed/table": (V, D)}
        if self.rope is None:
            out["positions/table"] = (self.max_positions, D)
        layer = self._layer_shapes(D, self.heads * K, self.kv_heads * K)
        memory_layers = len(self.memory.layers) if self.memory else 0
        out |= {f"layers/{path}": (self.layers - memory_layers, *shape) for path, shape in layer.items()}
        if self.memory:
            layer = {path: shape for path, shape in layer.items() if not path.startswith("mlp/")}
            layer |= self.memory.shapes(D)
            out |= {f"memory/layers/{path}": (memory_layers, *shape) for path, shape in layer.items()}
            out["memory/table"] = (self.memory.slots, self.memory.value_size or D)
        out |= self._norm_shapes("final_norm", D)
        return out if self.tied else out | {"head/w": (D, V)}

    def _norm_shapes(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}/{leaf}": (size,) for leaf in (("scale", "bias") if self.norm == "layer" else ("scale",))}

    def _layer_shapes(self, D: int, Q: int, KV: int) -> dict[str, tuple[int, ...]]:
        out: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int, bias: bool) -> None:
            out[f"{name}/w"] = (rows, columns)
            if bias:
                out[f"{name}/b"] = (columns,)

        for block in ("attn", "mlp"):
            if self.norm_place != "post":
                out.update(self._norm_shapes(f"{block}_norm", D))
            if self.norm_place != "pre":
                out.update(self._norm_shapes(f"{block}_post_norm", D))
        for name, columns in (("q", Q), ("k", KV), ("v", KV)):
            linear(f"attn/{name}", D, columns, self.qkv_bias)
        linear("attn/o", Q, D, self.out_bias)
        if self.qk_norm != "none":
            head = self.qk_norm == "head"
            out["attn/q_norm/scale"], out["attn/k_norm/scale"] = ((self.head_size if head else n,) for n in (Q, KV))
        if self.experts:
            E, F = self.experts.count, self.experts.hidden
            out |= {"mlp/router/w": (D, E), "mlp/experts/gate/w": (E, D, F), "mlp/experts/up/w": (E, D, F)}
            return out | {"mlp/experts/down/w": (E, F, D)}
        for name in ("gate", "up") if self.gated else ("up",):
            linear(f"mlp/{name}", D, self.hidden, self.mlp_bias)
        linear("mlp/down", self.hidden, D, self.mlp_bias)
        return out

    def init(self, key: Array, dtype: Any = jnp.float32) -> dict:
        """Random parameters: matrices and tables normal with ``init_std``, norms the identity, biases zero.

        Keys and values of a memory are normal with deviation 1 / sqrt(their size), as theirs are.
        """

        def draw(path: str, shape: tuple[int, ...]) -> Array:
            leaf = path.rsplit("/", 1)[-1]
            if leaf == "scale":
                # The identity: Gemma's norms multiply by 1 + scale.
                return jnp.full(shape, 1.0 - self.norm_offset, dtype)
            if leaf in ("b", "bias"):
                return jnp.zeros(shape, dtype)
            if leaf == "keys" or path == "memory/table":
                size = self.memory.key_size if leaf == "keys" else shape[-1]  # type: ignore[union-attr]
                return (size**-0.5 * jax.random.normal(tree.key_for(key, path), shape, jnp.float32)).astype(dtype)
            # ``down/w`` of experts too: whatever writes to the residual stream.
            residual = self.init_residual and path.endswith(("attn/o/w", "down/w"))
            std = self.init_std / math.sqrt(2 * self.layers) if residual else self.init_std
            return (std * jax.random.normal(tree.key_for(key, path), shape, jnp.float32)).astype(dtype)

        return tree.unflatten({path: draw(path, shape) for path, shape in self.shapes().items()})

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None) -> Any:
        """Logits ``[B, T, V]`` in ``execution.dtype``; with hooks ``(logits, reads)``.

        batch: int tokens ``[B, T]``, or a dict with ``tokens`` and optionally ``segments`` and ``positions``
        (:func:`jft.models.core.inputs`). Sites: ``embed``, ``layers/in``, ``layers/attn/out``, ``layers/mlp/out``, ``final``.
        """
        scope = Scope(execution, hooks)
        logits = self.outputs(scope, params, batch)
        return logits if hooks is None else (logits, scope.reads)

    def outputs(self, scope: Scope, params: Params, batch: Any) -> Array:
        """Logits ``[B, T, V]``, in the scope of a caller."""
        return self.logits(scope, params, self.hidden_states(scope, params, batch))

    def hidden_states(self, scope: Scope, params: Params, batch: Any) -> Array:
        """The input of the output head: the last layer's residual stream after the final norm, ``[B, T, D]``."""
        text = inputs(batch)
        h = scope.site("embed", self._embed(scope, params, text))
        constants = _LayerConstants.of(self, text)

        def layer(scope: Scope, h: Array, params: Params, xs: Any) -> Array:
            return self._layer(scope, h, params, xs, constants)

        if self.memory:
            h = self._with_memory(scope, layer, h, params, constants)
        else:
            h = scope.layers("layers", layer, h, params["layers"], self._per_layer())
        return scope.site("final", self._norm(h, params["final_norm"]))

    def head_states(self, scope: Scope, params: Params, batch: Any) -> Array:
        """What :meth:`logits` reads, ``[B, T, D]``."""
        return self.hidden_states(scope, params, batch)

    def head_params(self, params: Params) -> Params:
        """The part of ``params`` that :meth:`logits` reads."""
        return {"embed": {"table": params["embed"]["table"]}} if self.tied else {"head": params["head"]}

    def _with_memory(self, scope: Scope, layer: Any, h: Array, params: Params, constants: _LayerConstants) -> Array:
        """The layers in order, those with a memory scanned apart from the others, run by run."""
        assert self.memory is not None
        table, xs = params["memory"]["table"], self._per_layer()

        def memory_layer(scope: Scope, h: Array, params: Params, xs: Any) -> Array:
            return self._layer(scope, h, params, xs, constants, "memory/layers", table)

        pieces = []
        for has_memory, first, start, stop in self.memory.pieces(self.layers):
            prefix, body = ("memory/layers", memory_layer) if has_memory else ("layers", layer)
            stack = params["memory"]["layers"] if has_memory else params["layers"]
            pieces.append(stack_scope(scope, prefix, start, stop))
            layer_xs = cut(xs, first, first + stop - start)
            h = pieces[-1].layers(prefix, body, h, cut(stack, start, stop), layer_xs)
        collect(scope, pieces)
        return h

    @property
    def product_head(self) -> str | None:
        """The site after which :meth:`logits` is one product, linear in what enters it and in its weights; or None."""
        return "final" if self.logit_softcap is None else None

    def logits(self, scope: Scope, params: Params, h: Array) -> Array:
        """The output head on ``h[B, T, D]``."""
        head = {"w": transpose(params["embed"]["table"])} if self.tied else params["head"]
        return _softcap(scope.dot("head", h, head), self.logit_softcap)

    @property
    def longest(self) -> int | None:
        """Tokens of a sequence that have a position; None with rotary ones, which have no end."""
        return None if self.rope is not None else self.max_positions

    def _embed(self, scope: Scope, params: Params, text: Inputs) -> Array:
        dtype = scope.execution.dtype
        h = take(params["embed"]["table"], text.tokens, dtype)
        if self.embed_scale:
            # Rounded to the activations' dtype first, as transformers does: bfloat16 has no sqrt(D) of most widths.
            h = h * jnp.asarray(math.sqrt(self.width), dtype)
        if self.rope is not None:
            return h
        # Positions in the batch are traced values, which cannot be compared here.
        if text.plain and text.tokens.shape[1] > self.max_positions:
            raise ValueError(f"{text.tokens.shape[1]} tokens, but the model has {self.max_positions} learned positions")
        return h + take(params["positions"]["table"], text.positions, dtype)

    def _per_layer(self) -> dict[str, Array]:
        """Values that differ from layer to layer and are no parameters, stacked for the scan."""
        xs: dict[str, Array] = {}
        # One window for all layers stays a static number (see below); only different ones go through the scan.
        if self.windows is not None and len(set(self.windows)) > 1:  # type: ignore[arg-type]
            xs["window"] = jnp.asarray([w or UNLIMITED for w in self.windows], jnp.int32)  # type: ignore[union-attr]
        if self.local_rope is not None:
            # Which of the two rotary tables a layer reads; a layer's kind must be an array in a scan.
            xs["local"] = jnp.asarray([w is not None for w in self.windows or (None,) * self.layers])  # type: ignore[union-attr]
        if self.scale_by_layer:
            xs["scale"] = 1 / jnp.arange(1, self.layers + 1, dtype=jnp.float32)
        return xs

    def _norm(self, h: Array, params: Params) -> Array:
        if self.norm == "layer":
            return layer_norm(h, params, self.norm_eps)
        return rms_norm(h, params, self.norm_eps, self.norm_offset)

    def _layer(
        self,
        scope: Scope,
        h: Array,
        params: Params,
        xs: dict[str, Array],
        constants: _LayerConstants,
        prefix: str = "layers",
        table: Any = None,
    ) -> Array:
        def block(name: str, h: Array, fn: Any) -> Array:
            x = h if self.norm_place == "post" else self._norm(h, params[f"{name}_norm"])
            y = fn(scope, x)
            y = y if self.norm_place == "pre" else self._norm(y, params[f"{name}_post_norm"])
            return scope.site(f"{prefix}/{name}/out", y)

        h = scope.site(f"{prefix}/in", h)
        attn_out = block("attn", h, lambda s, x: self._attend(s, f"{prefix}/attn", x, params["attn"], xs, constants))
        memory = self.memory
        if memory is None or table is None:
            mlp = lambda s, x: self._mlp(s, f"{prefix}/mlp", x, params["mlp"])
        else:
            mlp = lambda s, x: remember(s, f"{prefix}/mlp", x, params["mlp"], table, memory)
        if self.parallel:
            return h + attn_out + block("mlp", h, mlp)
        h = h + attn_out
        return h + block("mlp", h, mlp)

    def _attend(
        self, scope: Scope, name: str, x: Array, params: Params, xs: dict[str, Array], constants: _LayerConstants
    ) -> Array:
        q, k, v = (scope.dot(f"{name}/{part}", x, params[part]) for part in ("q", "k", "v"))
        # OLMoE clips after its norm over all heads; a norm per head (Qwen 3) has to follow the split into heads.
        if self.qk_norm == "full":
            q, k = self._qk_norm(q, k, params)
        if self.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -self.clip_qkv, self.clip_qkv) for y in (q, k, v))
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_size) for y in (q, k, v))
        if self.qk_norm == "head":
            q, k = self._qk_norm(q, k, params)
        if self.rope is not None:
            tables = constants.rope(xs.get("local"))
            q, k = rotate(q, tables), rotate(k, tables)
        scale = self.attention_scale if self.attention_scale is not None else self.head_size**-0.5
        out = scope.attention(
            q,
            k,
            v,
            constants.mask_for(xs.get("window")),
            scale=scale * xs.get("scale", 1.0),
            softcap=self.attention_softcap,
        )
        return scope.dot(f"{name}/o", out.reshape(*out.shape[:2], -1), params["o"])

    def _qk_norm(self, q: Array, k: Array, params: Params) -> tuple[Array, Array]:
        norm = lambda x, name: rms_norm(x, params[name], self.norm_eps, self.norm_offset)
        return norm(q, "q_norm"), norm(k, "k_norm")

    def _mlp(self, scope: Scope, name: str, x: Array, params: Params) -> Array:
        act = ACTIVATIONS[self.activation]
        if self.experts:
            return moe(scope, name, x, params, self.experts, act)
        up = scope.dot(f"{name}/up", x, params["up"])
        hidden = (
            core.gated(act, scope.dot(f"{name}/gate", x, params["gate"]), up)
            if self.gated
            else core.recomputed(act)(up)
        )
        return scope.dot(f"{name}/down", hidden, params["down"])


@dataclasses.dataclass(frozen=True)
class _LayerConstants:
    """Values that all layers read and none changes: computed once, outside the scan."""

    mask: Mask
    ropes: tuple[tuple[Array, Array], ...]

    @classmethod
    def of(cls, config: DecoderConfig, text: Inputs) -> _LayerConstants:
        windows = set(config.windows or (None,))  # type: ignore[arg-type]
        window = windows.pop() if len(windows) == 1 else None
        # Order and windows count tokens of the row, as transformers does, so explicit positions only steer the embedding.
        mask = Mask.within(text.segments, causal=True, window=window, segmented=not text.plain)
        ropes = [
            rope.tables(text.positions, text.segments, config.head_size, config.max_positions)
            for rope in (config.rope, config.local_rope)
            if rope is not None
        ]
        return cls(mask, tuple(ropes))

    def mask_for(self, window: Array | None) -> Mask:
        return self.mask if window is None else dataclasses.replace(self.mask, window=window)

    def rope(self, local: Array | None) -> tuple[Array, Array]:
        if local is None:
            return self.ropes[0]
        # A layer's kind is a traced value in the scan, so both tables exist and one is taken.
        cos, sin = (jnp.where(local, of_local, of_global) for of_global, of_local in zip(*self.ropes, strict=True))
        return cos, sin


def _softcap(x: Array, cap: float | None) -> Array:
    if cap is None:
        return x
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (cap * jnp.tanh(y / cap)).astype(x.dtype)
