"""CLIP: an image tower and a text tower that embed into one space, and the zero-shot classifier made of prompts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jft.dot import take
from jft.kernels.attention import Mask
from jft.models import blocks, core
from jft.models.core import Execution, Hooks, Model, Params, Scope, inputs
from jft.models.split import suffix_input
from jft.models.vision import VisionConfig

Array = jax.Array
# The id in configs older than transformers' correction of it; the true id is then the highest in the vocabulary.
LEGACY_EOS = 2
TOWER = VisionConfig(
    patch=32, activation="quick_gelu", eps=1e-5, patch_bias=False, embed_norm=True, family="clip_vision_model"
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The causal pre-norm text tower of CLIP; a text is represented by its end-of-text token ``eos``.

    eos 2 is that of configs which misstate it: the position of the highest token id is taken then, else that of the
    first ``eos``, as transformers does.
    """

    vocab: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    hidden: int = 2048
    positions: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    eos: int = 49407

    def __post_init__(self) -> None:
        blocks.check_sizes(self, vocab=self.vocab, layers=self.layers, heads=self.heads, positions=self.positions)

    def leaves(self, prefix: str) -> blocks.Leaves:
        """Every parameter under ``prefix``, undrawn."""
        yield from blocks.table(f"{prefix}embed", self.vocab, self.width)
        # 0.02 and 0.01 are the deviations of OpenAI's initialisation.
        yield from blocks.table(f"{prefix}positions", self.positions, self.width, 0.01)
        yield from blocks.layer_leaves(f"{prefix}layers", self.layers, self.width, self.hidden)
        yield from blocks.norm(f"{prefix}final_norm", self.width)

    def hidden_states(self, scope: Scope, params: Params, batch: Any, prefix: str) -> Array:
        """Normalised hidden states ``[B, T, D]``."""
        text = inputs(batch)
        blocks.check_length(text.tokens.shape[1], self.positions, text.plain)
        dtype = scope.execution.dtype
        h = take(params["embed"]["table"], text.tokens, dtype)
        h = scope.site(f"{prefix}embed", h + take(params["positions"]["table"], text.positions, dtype))
        h = blocks.stack(
            scope,
            f"{prefix}layers",
            h,
            params["layers"],
            Mask.within(text.segments, causal=True, segmented=not text.plain),
            heads=self.heads,
            activation=self.activation,
            eps=self.eps,
        )
        return scope.site(f"{prefix}final", core.layer_norm(h, params["final_norm"], self.eps))

    def end(self, tokens: Array) -> Array:
        """Index ``[B]`` of the token that represents each row of ``tokens[B, T]``."""
        # The argmax of a comparison is its first True.
        return jnp.argmax(tokens if self.eos == LEGACY_EOS else tokens == self.eos, axis=-1)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Contrastive language-image pretraining (Radford et al. 2021, arXiv:2103.00020).

    ``forward`` maps ``images [B, H, W, C]`` and/or ``tokens [B, T]`` (one text a row, ending in ``text.eos``) to
    ``{"image": [B, P], "text": [B, P], "logit_scale": []}``: L2-normalised embeddings of what the batch holds, and the natural
    logarithm of the inverse temperature. ``projection`` is P.
    """

    vision: VisionConfig = TOWER
    text: TextConfig = TextConfig()
    projection: int = 512
    family: str = "clip"

    @property
    def longest(self) -> int:
        """Tokens of a text that have a position."""
        return self.text.positions

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict:
        """Random parameters; ``logit_scale`` starts at ``log(1 / 0.07)``."""
        return blocks.draw(dict(self._leaves()), key, dtype)

    def _leaves(self) -> blocks.Leaves:
        yield from self.vision.leaves("vision/")
        yield from self.text.leaves("text/")
        yield from blocks.linear("vision_projection", self.vision.width, self.projection, bias=False)
        yield from blocks.linear("text_projection", self.text.width, self.projection, bias=False)
        # log(1 / 0.07) with the digits of transformers' config.
        yield "logit_scale", blocks.Leaf((), constant=2.6592)

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """Embeddings by name (see the class); with hooks, also what they read. ValueError for a batch with neither."""
        scope = Scope(execution, hooks)
        return blocks.finish(scope, self.outputs(scope, params, batch))

    def outputs(self, scope: Scope, params: Params, batch: Any) -> dict[str, Array]:
        """Embeddings by name, in the scope of a caller."""
        fields = batch if hasattr(batch, "keys") else {"tokens": batch}
        outputs = {"logit_scale": params["logit_scale"]}
        # The suffix of a split model has features in place of images.
        if "images" in fields or suffix_input(scope, "vision/layers") is not None:
            outputs["image"] = self.image_embedding(scope, params, fields)
        if "tokens" in fields:
            outputs["text"] = self.text_embedding(scope, params, fields)
        if len(outputs) == 1:
            raise ValueError(f"the batch has neither 'images' nor 'tokens', only {sorted(fields)}")
        return outputs

    def image_embedding(self, scope: Scope, params: Params, batch: Any) -> Array:
        """``[B, P]``: the class token, projected, of length one."""
        h = self.vision.hidden_states(scope, params["vision"], batch, "vision/")[:, 0]
        return unit(scope.site("features", scope.dot("vision_projection", h, params["vision_projection"])))

    def text_embedding(self, scope: Scope, params: Params, batch: Any) -> Array:
        """``[B, P]``: the end-of-text token, projected, of length one."""
        h = self.text.hidden_states(scope, params["text"], batch, "text/")
        end = self.text.end(inputs(batch).tokens)
        h = jnp.take_along_axis(h, end[:, None, None], axis=1)[:, 0]
        return unit(scope.site("text/features", scope.dot("text_projection", h, params["text_projection"])))

    def head_defaults(self) -> tuple[str, str]:
        """Pooling and dense layer of a classifier: the normalised image embedding itself."""
        return "embedding", "none"


def unit(x: Array) -> Array:
    """``x / |x|`` over the last axis, in float32."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True))).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="model")
def zero_shot_head(model: Model, params: Params, text_tokens: Array) -> dict[str, Array]:
    """A classifier of image embeddings made of prompts: ``{"w": [P, C], "b": [C]}`` (zero), float32.

    text_tokens ``[C, N, T]``: N prompts for each of C classes. Column c of ``w`` is the mean of the N unit text
    embeddings of class c, scaled to length ``exp(logit_scale)``, so that ``image @ w`` are CLIP's logits. Put it under
    ``classifier`` of a :class:`~jft.models.classifier.Classifier` and leave it frozen, as Ilharco et al. 2022
    (arXiv:2212.04089) do. One class is embedded at a time. Raises ValueError for another model or rank.
    """
    config = model.config
    if not isinstance(config, ClipConfig):
        raise ValueError(f"a zero-shot head needs a CLIP model, not {type(config).__name__}")
    if text_tokens.ndim != 3:
        raise ValueError(f"text_tokens must have shape [classes, prompts, T]; got {text_tokens.shape}")

    def one(tokens: Array) -> Array:
        embedded = config.text_embedding(Scope(model.execution), params, {"tokens": tokens})
        return unit(jnp.mean(embedded.astype(jnp.float32), axis=0))

    scale = jnp.exp(params["logit_scale"].astype(jnp.float32))
    w = scale * jax.lax.map(one, text_tokens).T
    return {"w": w, "b": jnp.zeros(w.shape[1], jnp.float32)}
