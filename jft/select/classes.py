"""Classes that a batch is contrasted with: its labels, and others drawn by how easily they are mistaken for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def kept_ranks(key: Array, classes: int, ratio: float = 0.5, most: int = 50, decay: float = 0.3) -> np.ndarray:
    """Mask ``[C]`` of the ranks of similarity that are contrasted with, drawn once for a whole run.

    The n = min(ceil(ratio C), most) best surely. The others with probability ``(e^(-x / decay) - e^(-5 / decay)) / (1 - e^(-5 /
    decay))``, x evenly spaced from 0 to 5: the density of the exponential distribution, scaled to [0, 1], so that rank n + 1
    is always there and the last never. Defaults as in the code of skip tuning (Wu et al. 2024, arXiv:2412.11509). Raises
    ``ValueError`` for a ratio outside (0, 1], and others that are not positive.
    """
    if not 0 < ratio <= 1 or most < 1 or not decay > 0:
        raise ValueError(
            f"ratio={ratio}, most={most}, decay={decay}; ratio is in (0, 1], most at least 1, decay positive"
        )
    sure = min(math.ceil(ratio * classes), most)
    density = np.exp(-np.linspace(0.0, 5.0, classes - sure) / decay)
    spread = np.ptp(density) if density.size else 0.0
    # One class besides the sure ones has no density to be scaled; there the code's 0 / 0 leaves it out.
    chance = (density - density.min()) / spread if spread else np.zeros_like(density)
    # Uniforms are below 1, so ranks with chance 1 are always there.
    mask = np.asarray(jax.random.uniform(key, (classes,))) < np.concatenate([np.ones(sure), chance])
    return np.asarray(mask, bool)


def likely_classes(kept: np.ndarray, similarity: Array, labels: Array) -> tuple[Array, Array]:
    """``(classes int32 [k], targets int32 [B])``: a batch's classes with likely confusers, ascending; its labels there.

    kept: bool ``[C]``, of :func:`kept_ranks`, k of them true. similarity ``[B, C]``: of each image to each class (for CLIP, the
    logits of the model before training, cached; the authors' code takes the image as it is by now). labels int ``[B]``.
    Classes are ranked by their largest similarity to an image of the batch, the labels before all others (ties: the lower
    class).

    The class-wise skipping of skip tuning (Wu et al. 2024, arXiv:2412.11509): texts of other classes are neither encoded nor
    compared with. Shapes are static. Raises ``ValueError`` where B different labels might not all be kept.
    """
    images, total = similarity.shape
    kept = np.asarray(kept, bool)
    # `argmin` of bools is the first False: how many ranks are kept without a gap.
    sure = total if kept.all() else int(np.argmin(kept))
    if kept.shape != (total,) or min(images, total) > sure:
        raise ValueError(
            f"{images} images of {total} classes, of whose ranks the first {sure} are kept ({kept.shape[0]} in all); keep "
            f"{min(images, total)} surely (ratio, most), so that every label of a batch has its place"
        )
    # Labels rank before all others, whatever the similarity says.
    own = jnp.zeros(total, bool).at[labels].set(True)
    best = jnp.where(own, jnp.inf, jnp.max(jnp.asarray(similarity, jnp.float32), axis=0))
    order = jnp.argsort(-best, stable=True)
    classes = jnp.sort(order[np.flatnonzero(kept)]).astype(jnp.int32)
    # The classes ascend, so a search gives the new number of each label.
    return classes, jnp.searchsorted(classes, labels).astype(jnp.int32)


def with_classes(
    batches: Iterable[Any], key: Array, ratio: float = 0.5, most: int = 50, decay: float = 0.3
) -> Iterator[dict[str, Any]]:
    """The batches with ``classes`` bool ``[B, C]`` in place of ``similarity [B, C]``: those it is contrasted with.

    Ranks are drawn once, by :func:`kept_ranks` with these arguments, the classes of every batch by :func:`likely_classes`:
    as many in each, ``kept_ranks(...).sum()``. All rows of a batch are equal, so that they split and shard as its examples
    do.
    """
    choose: Any = None
    for batch in batches:
        # At the first batch, which tells the number of classes. Compiled once: all batches have one shape.
        if choose is None:
            kept = kept_ranks(key, batch["similarity"].shape[1], ratio, most, decay)
            choose = jax.jit(lambda similarity, labels, kept=kept: likely_classes(kept, similarity, labels)[0])
        rest = {name: x for name, x in batch.items() if name != "similarity"}
        mask = np.zeros(batch["similarity"].shape[1], bool)
        mask[np.asarray(choose(batch["similarity"], batch["labels"]))] = True
        # One row that all share: nothing is copied.
        yield rest | {"classes": np.broadcast_to(mask, batch["similarity"].shape)}
