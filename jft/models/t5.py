"""T5: an encoder and a decoder with relative position biases."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.dot import take, transpose
from jft.kernels.attention import Mask
from jft.models import blocks, core
from jft.models.core import Execution, Hooks, Inputs, Params, Scope, inputs

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class T5Config:
    """T5 (Raffel et al. 2019, arXiv:1910.10683): v1.0 with ``relu``; v1.1 with ``gated`` ``gelu_tanh`` and its own head.

    ``forward`` maps ``tokens [B, S]`` and ``decoder_tokens [B, T]`` (each with its ``segments``) to logits ``[B, T, V]``:
    position t, having seen decoder tokens up to t, predicts the next one, so decoder tokens begin with ``start``.
    Attention scores are not scaled. ``scale_outputs``: hidden states times ``width**-0.5`` before the head (v1.0).
    A packed decoder segment attends to the encoder segment of the same number.
    """

    vocab: int = 32128
    width: int = 512
    head: int = 64
    heads: int = 8
    hidden: int = 2048
    layers: int = 6
    decoder_layers: int = 6
    buckets: int = 32
    max_distance: int = 128
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    scale_outputs: bool = True
    eps: float = 1e-6
    start: int = 0
    family: str = "t5"

    def __post_init__(self) -> None:
        sizes = {"vocab": self.vocab, "layers": self.layers, "decoder_layers": self.decoder_layers}
        for name, value in {**sizes, "heads": self.heads, "head": self.head}.items():
            if value < 1:
                raise ValueError(f"T5Config: {name} is {value}; it must be at least 1")
        if self.activation not in core.ACTIVATIONS:
            raise ValueError(
                f"T5Config: activation {self.activation!r} is unknown; choose from {', '.join(core.ACTIVATIONS)}"
            )
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"T5Config: buckets {self.buckets} must be a multiple of 4, and max_distance {self.max_distance} more "
                "than half of them"
            )

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict:
        """Random parameters with the deviations of the paper's code: queries ``1/sqrt(D K)``, embeddings 1."""
        return blocks.draw(dict(self._leaves()), key, dtype)

    def _leaves(self) -> blocks.Leaves:
        yield from blocks.table("embed", self.vocab, self.width, 1.0)
        for side, layers in (("encoder", self.layers), ("decoder", self.decoder_layers)):
            yield from self._stack_leaves(f"{side}/layers", layers, cross=side == "decoder")
            yield from blocks.norm(f"{side}/final_norm", self.width, bias=False)
            yield from blocks.table(f"{side}/relative", self.buckets, self.heads, self.width**-0.5)
        if not self.tied:
            yield from blocks.linear("head", self.width, self.vocab, bias=False)

    def _stack_leaves(self, prefix: str, layers: int, cross: bool) -> blocks.Leaves:
        inner = self.heads * self.head
        for block in ("attn", "cross") if cross else ("attn",):
            yield from blocks.linear(
                f"{prefix}/{block}/q",
                self.width,
                inner,
                layers=layers,
                bias=False,
                std=(self.width * self.head) ** -0.5,
            )
            for name in ("k", "v"):
                yield from blocks.linear(f"{prefix}/{block}/{name}", self.width, inner, layers=layers, bias=False)
            yield from blocks.linear(f"{prefix}/{block}/o", inner, self.width, layers=layers, bias=False)
            yield from blocks.norm(f"{prefix}/{block}_norm", self.width, layers=layers, bias=False)
        for name in ("gate", "up") if self.gated else ("up",):
            yield from blocks.linear(f"{prefix}/mlp/{name}", self.width, self.hidden, layers=layers, bias=False)
        yield from blocks.linear(f"{prefix}/mlp/down", self.hidden, self.width, layers=layers, bias=False)
        yield from blocks.norm(f"{prefix}/mlp_norm", self.width, layers=layers, bias=False)

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """Logits ``[B, T, V]`` of the decoder; with hooks, also what they read."""
        scope = Scope(execution, hooks)
        return blocks.finish(scope, self.logits(scope, params, self.head_states(scope, params, batch)))

    def head_states(self, scope: Scope, params: Params, batch: Any) -> Array:
        """What :meth:`logits` reads: last hidden states of the decoder ``[B, T, D]``, scaled."""
        encoder_states = self.hidden_states(scope, params, batch)
        h = self._decode(scope, params, inputs(batch, "decoder_"), encoder_states, inputs(batch))
        return h * self.width**-0.5 if self.scale_outputs else h

    def head_params(self, params: Params) -> Params:
        """The part of ``params`` that :meth:`logits` reads."""
        return {"embed": {"table": params["embed"]["table"]}} if self.tied else {"head": params["head"]}

    def logits(self, scope: Scope, params: Params, h: Array) -> Array:
        """The output head on ``h[B, T, D]``."""
        head = {"w": transpose(params["embed"]["table"])} if self.tied else params["head"]
        return scope.dot("head", h, head)

    def hidden_states(self, scope: Scope, params: Params, batch: Any) -> Array:
        """Last hidden states of the encoder ``[B, S, D]``, which is what a classifier pools."""
        text = inputs(batch)
        return self._run(scope, params, "encoder", text.tokens, Mask.within(text.segments))

    def _decode(self, scope: Scope, params: Params, text: Inputs, encoder_states: Array, source: Inputs) -> Array:
        mask, cross_mask = Mask.within(text.segments, causal=True), Mask(text.segments, source.segments)
        return self._run(scope, params, "decoder", text.tokens, mask, encoder_states, cross_mask)

    def _run(
        self,
        scope: Scope,
        params: Params,
        side: str,
        tokens: Array,
        mask: Mask,
        encoder_states: Array | None = None,
        cross_mask: Mask | None = None,
    ) -> Array:
        """One side of the model: embeddings, layers, final norm."""
        prefix, of_side = f"{side}/layers", params[side]
        h = scope.site(f"{side}/embed", take(params["embed"]["table"], tokens, scope.execution.dtype))
        # One table for all layers of a side: computed once, outside the scan.
        bias = self._bias(
            of_side["relative"]["table"], tokens.shape[1], bidirectional=encoder_states is None, dtype=h.dtype
        )

        def normed(x: Array, scales: Params) -> Array:
            return core.rms_norm(x, scales, self.eps)

        def layer(scope: Scope, h: Array, p: Params, _: Any) -> Array:
            def attend(block: str, x: Array, mask: Mask | None, **options: Any) -> Array:
                return blocks.attend(
                    scope, f"{prefix}/{block}", x, p[block], mask, heads=self.heads, scale=1.0, **options
                )

            def step(block: str, h: Array, run: Any) -> Array:
                return blocks.add(scope, f"{prefix}/{block}", h, run, normed, p[f"{block}_norm"], False)

            h = step("attn", scope.site(f"{prefix}/in", h), lambda x: attend("attn", x, mask, bias=bias))
            if encoder_states is not None:
                h = step("cross", h, lambda x: attend("cross", x, cross_mask, source=encoder_states))
            return step("mlp", h, lambda x: blocks.mlp(scope, f"{prefix}/mlp", x, p["mlp"], self.activation))

        h = scope.layers(prefix, layer, h, of_side["layers"])
        return scope.site(f"{side}/final", normed(h, of_side["final_norm"]))

    def _bias(self, table: Any, length: int, bidirectional: bool, dtype: Any) -> Array:
        """``[H, T, T]``: the bias of key k for query q depends on ``k - q`` alone, also within packed segments."""
        # 2 T - 1 distances are looked up, not T x T pairs.
        distances = np.arange(1 - length, length)
        per_distance = take(
            table, jnp.asarray(bucket(distances, self.buckets, self.max_distance, bidirectional)), dtype
        )
        index = jnp.arange(length)
        return per_distance[index[None, :] - index[:, None] + length - 1].transpose(2, 0, 1)

    def head_defaults(self) -> tuple[str, str]:
        """Pooling and dense layer of a classifier: the mean of the encoder's states."""
        return "mean", "none"


def bucket(distance: np.ndarray, buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """The row of the relative position table for each ``key - query`` distance: int32, same shape.

    Half of the buckets are exact, the others logarithmic up to ``max_distance``, beyond which all is one. If
    bidirectional, keys that come later have the upper half; else they share bucket 0.
    """
    if bidirectional:
        buckets //= 2
        offset, distance = np.where(distance > 0, buckets, 0), np.abs(distance)
    else:
        offset, distance = np.zeros_like(distance), np.maximum(-distance, 0)
    exact = buckets // 2
    # float32, step by step as in the paper's code: the rounding decides which bucket a boundary falls into
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = (ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int64)
    far = np.minimum(exact + steps, buckets - 1)
    return (offset + np.where(distance < exact, distance, far)).astype(np.int32)
