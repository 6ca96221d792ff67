"""Frozen heads, one for each task: linear probes of the base's features, or CLIP's zero-shot classifiers.

With the head fitted first and then held fixed, fine-tuning moves the encoder alone, and the task vectors of different tasks
live in one space (Ilharco et al. 2022, arXiv:2212.04089). A probe before fine-tuning also keeps features from being
distorted by a random head (Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jft.models.core import Model, Scope

Head = dict[str, Any]
# The bias of a class that only fills up: its probability is exactly zero in float32, and its logit is finite in bfloat16.
FILLER = -1e4


@functools.partial(jax.jit, static_argnames="model")
def _pooled(model: Model, params: Any, batch: Any) -> jax.Array:
    return model.config.pooled(Scope(model.execution), params, batch)


def features(model: Model, params: Any, batches: Iterable[Any], limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The features that the head of a :class:`~jft.models.Classifier` reads, float32 ``[N, D]``, and the labels ``[N]``.

    limit: stop after so many examples; 0 for all. Examples whose ``valid`` is false are left out.
    """
    rows, labels, total = [], [], 0
    for batch in batches:
        real = np.asarray(batch.get("valid", np.ones(len(batch["labels"]), bool)), bool)
        rows.append(np.asarray(_pooled(model, params, batch), np.float32)[real])
        labels.append(np.asarray(batch["labels"])[real])
        total += int(real.sum())
        if limit and total >= limit:
            break
    if not total:
        raise ValueError("the head's training data hold no example")
    return np.concatenate(rows), np.concatenate(labels)


def linear_probe(x: np.ndarray, labels: np.ndarray, classes: int, penalty: float = 1.0) -> Head:
    """Multinomial logistic regression on features ``x[N, D]``: ``{"w": [D, C], "b": [C]}``, float32.

    Minimises ``sum of cross entropies + penalty / 2 * |w|^2`` on standardised features, and folds the standardisation
    into w and b. Raises ``ValueError`` where a class has no example or a label is out of range.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    present = np.unique(labels)
    if len(present) != classes or present[0] < 0 or present[-1] >= classes:
        raise ValueError(f"a probe of {classes} classes needs examples of each; the labels are {present.tolist()}")
    # A constant feature has a deviation of 0.
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
    # Each iteration is a small product: more threads than one spend their time waiting for each other.
    with threadpool_limits(1):
        probe = LogisticRegression(C=1 / penalty, max_iter=10_000).fit((x - mean) / deviation, labels)
    w, b = probe.coef_.T, probe.intercept_
    if classes == 2:  # one column of log-odds: shared out between the two classes
        w, b = np.concatenate([-w, w], axis=1) / 2, np.concatenate([-b, b]) / 2
    w = w / deviation[:, None]
    return {"w": w.astype(np.float32), "b": (b - mean @ w).astype(np.float32)}


def zero_shot(model: Model, params: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> Head:
    """CLIP's classifier from class names and prompt templates (``"a photo of a {}."``); see ``clip.zero_shot_head``."""
    from jft.models.clip import zero_shot_head

    length = model.config.text.positions
    prompts = [[template.format(name.replace("_", " ")) for template in templates] for name in names]
    rows = [[_padded(tokenizer.encode(p, special=True).ids, length) for p in group] for group in prompts]
    return zero_shot_head(model, params, np.asarray(rows, np.int32))


def _padded(ids: np.ndarray, length: int) -> np.ndarray:
    """``ids`` to ``length``: cut before the end-of-text token, or filled with it (the tower never looks past the first)."""
    cut = ids if len(ids) <= length else np.append(ids[: length - 1], ids[-1])
    return np.concatenate([cut, np.full(length - len(cut), ids[-1], ids.dtype)])


def widened(head: Head, classes: int) -> Head:
    """The head with columns added up to ``classes`` that are never predicted: heads of one shape share compiled steps."""
    missing = classes - head["b"].shape[0]
    w, b = np.asarray(head["w"]), np.asarray(head["b"])
    return {
        "w": np.concatenate([w, np.zeros((w.shape[0], missing), w.dtype)], axis=1),
        "b": np.concatenate([b, np.full(missing, FILLER, b.dtype)]),
    }
