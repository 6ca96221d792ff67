"""A classifier whose classes are texts, encoded as it runs: CLIP on labelled images, both towers free to train."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.models import blocks
from jft.models.core import Execution, Hooks, Params, Scope

Array = jax.Array
NEVER = -1e30
"""The logit of a class that a batch leaves out: finite, so that no gradient is undefined, and of no weight."""


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Inputs of a text tower for C classes, one text each: ``tokens [C, T]``, and the features of a prefix.

    Equal, and of equal hash, if its contents are.
    """

    arrays: Mapping[str, Any]

    # cached_property writes to ``__dict__``, past what ``frozen`` forbids.
    @functools.cached_property
    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        for name, x in sorted(self.arrays.items()):
            x = np.asarray(x)
            digest.update(f"{name}:{x.shape}:{x.dtype};".encode() + x.tobytes())
        return digest.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Texts) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)


@dataclasses.dataclass(frozen=True)
class PromptClassifier:
    """``exp(logit_scale) image text^T``: logits ``[B, C]`` of images for the classes that ``texts`` describe.

    clip: a ``ClipConfig``, or the config of its suffix (:func:`jft.models.split.split`), with texts from the same prefix:
    ``Texts(prefix(params, {"tokens": tokens}))``. The parameters are those of CLIP.

    count: where a batch says by ``classes`` bool ``[B, C]`` which classes it is told apart from
    (:func:`jft.select.classes.with_classes`; all rows equal), only these, exactly ``count``, are encoded and compared with;
    the logits of others are -1e30. 0, or a batch without: all classes.
    """

    clip: Any
    texts: Texts
    count: int = 0

    def __post_init__(self) -> None:
        """``ValueError`` for a model without two towers, or a count beyond the classes."""
        if not hasattr(self.clip, "text_embedding"):
            raise ValueError(f"classes are texts for CLIP; a {type(self.clip).__name__} reads no images with texts")
        if not 0 <= self.count <= self.classes:
            raise ValueError(
                f"count is {self.count} of {self.classes} classes; choose 1 to {self.classes}, or 0 for all"
            )

    @property
    def classes(self) -> int:
        """C."""
        return len(self.texts.arrays["tokens"])

    @property
    def family(self) -> str:
        """A name that no checkpoint has: save the parameters with the CLIP model."""
        return f"prompts of {self.clip.family}"

    def init(self, key: Array, dtype: Any) -> dict:
        """CLIP's parameters."""
        return self.clip.init(key, dtype)

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """Logits ``[B, C]``, float32; with hooks, also what they read."""
        scope = Scope(execution, hooks)
        return blocks.finish(scope, self.outputs(scope, params, batch))

    def outputs(self, scope: Scope, params: Params, batch: Any) -> Array:
        """Logits ``[B, C]``, in the scope of a caller."""
        fields = batch if hasattr(batch, "keys") else {"images": batch}
        image = self.clip.image_embedding(scope, params, fields)
        scale = jnp.exp(params["logit_scale"].astype(jnp.float32))
        texts = {name: jnp.asarray(x) for name, x in self.texts.arrays.items()}
        if not self.count or "classes" not in fields:
            return scale * _compare(image, self.clip.text_embedding(scope, params, texts))
        # ``size``: shapes under jit are fixed. The fill is no class, so what is computed for it is dropped below.
        (class_ids,) = jnp.nonzero(jnp.any(fields["classes"], axis=0), size=self.count, fill_value=self.classes)
        # clip: the fill is out of range, and what is encoded for it must still be a text.
        texts = {name: jnp.take(x, class_ids, axis=0, mode="clip") for name, x in texts.items()}
        logits = scale * _compare(image, self.clip.text_embedding(scope, params, texts))
        return jnp.full((len(image), self.classes), NEVER, logits.dtype).at[:, class_ids].set(logits, mode="drop")


def _compare(image: Array, text: Array) -> Array:
    return jnp.einsum("bp,cp->bc", image, text, preferred_element_type=jnp.float32)
