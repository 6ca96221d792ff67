"""Vision transformers: ViT, and the image tower of CLIP."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.dot import take
from jft.models import blocks, core, token_merging
from jft.models.core import Execution, Hooks, Params, Scope
from jft.models.split import suffix_input

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A pre-norm vision transformer with a class token (Dosovitskiy et al. 2020, arXiv:2010.11929).

    ``forward`` maps images ``[B, H, W, C]`` to normalised hidden states ``[B, 1 + H W / p^2, D]``, the class token first.
    ``image`` and ``patch`` are side lengths in pixels; images of other sizes that ``patch`` divides are taken with their
    position embeddings interpolated (bicubic, as transformers' ``interpolate_pos_encoding``). ``embed_norm``: a norm
    before the first layer, and ``patch_bias`` False: CLIP. ``pooler``: a dense layer with tanh, read by classifiers only.
    ``selection``: tokens are merged on the way, so that fewer come out; the parameters are the same.
    """

    image: int = 224
    patch: int = 16
    channels: int = 3
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "gelu"
    eps: float = 1e-12
    qkv_bias: bool = True
    patch_bias: bool = True
    embed_norm: bool = False
    pooler: bool = False
    family: str = "vit"
    selection: token_merging.TokenSelection | None = None

    def __post_init__(self) -> None:
        blocks.check_sizes(self, layers=self.layers, heads=self.heads, patch=self.patch, channels=self.channels)
        if self.image < self.patch or self.image % self.patch:
            raise ValueError(f"VisionConfig: image {self.image} is not a positive multiple of patch {self.patch}")

        if self.selection and self.selection.layers[-1] >= self.layers - 1:
            raise ValueError(
                f"VisionConfig: tokens are selected after layers {self.selection.layers} of {self.layers}; "
                f"choose from 0 to {self.layers - 2}, which have layers behind them"
            )

    @property
    def side(self) -> int:
        """Patches along one side of the image."""
        return self.image // self.patch

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict:
        """Random parameters: matrices ``N(0, 1/in)``, positions and class token ``N(0, 0.02^2)``, norms one, biases zero."""
        return blocks.draw(dict(self.leaves()), key, dtype)

    def leaves(self, prefix: str = "") -> blocks.Leaves:
        """Every parameter under ``prefix``, undrawn."""
        pixels = self.patch * self.patch * self.channels
        yield from blocks.linear(f"{prefix}patch", pixels, self.width, bias=self.patch_bias)
        yield f"{prefix}cls", blocks.Leaf((self.width,), 0.02)
        yield from blocks.table(f"{prefix}positions", self.side**2 + 1, self.width)
        if self.embed_norm:
            yield from blocks.norm(f"{prefix}embed_norm", self.width)
        yield from blocks.layer_leaves(f"{prefix}layers", self.layers, self.width, self.hidden, qkv_bias=self.qkv_bias)
        yield from blocks.norm(f"{prefix}final_norm", self.width)
        if self.pooler:
            yield from blocks.linear(f"{prefix}pooler", self.width, self.width)

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """Last hidden states ``[B, N, D]``; with hooks, also what they read. An array is a batch of images."""
        scope = Scope(execution, hooks)
        return blocks.finish(scope, self.outputs(scope, params, batch))

    def outputs(self, scope: Scope, params: Params, batch: Any) -> Array:
        """Last hidden states ``[B, N, D]``, in the scope of a caller."""
        return self.hidden_states(scope, params, batch)

    def hidden_states(self, scope: Scope, params: Params, batch: Any, prefix: str = "") -> Array:
        """Normalised hidden states ``[B, N, D]``; ``prefix`` is that of the names. ValueError for images that do not fit."""
        h = suffix_input(scope, f"{prefix}layers")
        if h is None:
            h = scope.site(f"{prefix}embed", self._embed(scope, params, batch, prefix))
        options: dict[str, Any] = {"heads": self.heads, "activation": self.activation, "eps": self.eps}
        if self.selection is None:
            h = blocks.stack(scope, f"{prefix}layers", h, params["layers"], None, **options)
        else:
            h = token_merging.stack(scope, f"{prefix}layers", h, params["layers"], self.selection, **options)
        return scope.site(f"{prefix}final", core.layer_norm(h, params["final_norm"], self.eps))

    def _embed(self, scope: Scope, params: Params, batch: Any, prefix: str) -> Array:
        images = self._images(batch)
        h = scope.dot(f"{prefix}patch", patches(images, self.patch).astype(scope.execution.dtype), params["patch"])
        cls = jnp.broadcast_to(params["cls"].astype(h.dtype), (h.shape[0], 1, self.width))
        h = jnp.concatenate([cls, h], axis=1)
        h = h + self._positions(params["positions"]["table"], images.shape[1:3], h.dtype)
        return core.layer_norm(h, params["embed_norm"], self.eps) if self.embed_norm else h

    def _images(self, batch: Any) -> Array:
        fields = batch if hasattr(batch, "keys") else {"images": batch}
        if "images" not in fields:
            raise ValueError(f"the batch has no 'images', only {sorted(fields)}")
        images = jnp.asarray(fields["images"])
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise ValueError(f"images must have shape [B, H, W, {self.channels}]; got {images.shape}")
        # Integers are pixels that nobody has scaled yet.
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be floating point (scaled and normalised); got {images.dtype}")
        if images.shape[1] % self.patch or images.shape[2] % self.patch:
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels cannot be cut into patches of {self.patch}"
            )
        return images

    def _positions(self, table: Any, size: tuple[int, ...], dtype: Any) -> Array:
        rows, columns = size[0] // self.patch, size[1] // self.patch
        learned = take(table, jnp.arange(self.side**2 + 1), dtype)
        if (rows, columns) == (self.side, self.side):
            return learned
        # The class token's position is not on the grid.
        grid = learned[1:].reshape(self.side, self.side, self.width)
        vertical, horizontal = (jnp.asarray(bicubic(n, self.side), dtype) for n in (rows, columns))
        resized = jnp.einsum("rh,cw,hwd->rcd", vertical, horizontal, grid).reshape(rows * columns, self.width)
        return jnp.concatenate([learned[:1], resized])

    def head_defaults(self) -> tuple[str, str]:
        """Pooling and dense layer of a classifier: the class token, as transformers' ViT classifies."""
        return "cls", "none"


def patches(images: Array, patch: int) -> Array:
    """``[B, H, W, C] -> [B, HW/p^2, p*p*C]``: times ``w`` this is the convolution of stride p (row-major, channel last)."""
    B, H, W, C = images.shape
    grid = images.reshape(B, H // patch, patch, W // patch, patch, C)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(B, (H // patch) * (W // patch), patch * patch * C)


def bicubic(new: int, old: int, a: float = -0.75) -> np.ndarray:
    """The matrix ``[new, old]`` of cubic convolution with half-pixel centres and repeated edges (Keys 1981).

    ``a = -0.75`` is torch's kernel; ``jax.image.resize`` has -0.5 and other edges, hence not the same positions.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(centre).astype(int) + tap
        x = np.abs(centre - index)
        # The two pieces of Keys' kernel: within one pixel, and from one to two.
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        # add.at, as at a repeated edge several taps fall on one pixel.
        np.add.at(matrix, (np.arange(new), index.clip(0, old - 1)), np.where(x <= 1, near, far))
    return matrix
