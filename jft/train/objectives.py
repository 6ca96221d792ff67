"""Objectives: from outputs and a batch to a sum of losses, the weight it is over, and sums of metrics.

Losses are *sums*; the step divides once, by the weight of the whole global batch. So gradient accumulation, packing and
sharding change nothing: a token counts the same wherever it stands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jft.models.logits import Logits, scan_chunks
from jft.names import nearest

Array = jax.Array
Batch = Any


@runtime_checkable
class Objective(Protocol):
    """The interface of an objective to the step, evaluation and metrics. Objectives are hashable values.

    splits: whether the loss of a batch is the sum of its examples' losses, so that microbatches add up. One that also has
    ``sampled_loss(key, outputs, batch)`` can be asked for its true Fisher information (:mod:`jft.select.scores`), one with
    ``weights(batch, xp)`` says how much each prediction counts (:mod:`jft.analysis` compares predictions one by one), one with
    ``counts(outputs, batch)`` gives evaluation more sums, of any shape, for ``report`` to make metrics of, one with a true
    ``chunks`` takes :class:`jft.models.logits.Logits` where others take arrays.
    """

    splits: ClassVar[bool]

    def weight(self, batch: Batch, xp: Any = jnp) -> Any:
        """Total weight of a batch (target tokens, or examples), computed with ``xp``: ``numpy`` or ``jax.numpy``."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
        """``(sum of losses, weight, sums of metrics)``, float32 scalars."""
        ...

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The metrics of evaluation, from means over all batches."""
        ...


def _field(batch: Batch, name: str) -> Any:
    """``batch[name]``; an array alone is its tokens. A missing field is refused with those that are there."""
    if not isinstance(batch, Mapping):
        batch = {"tokens": batch}
    if name not in batch:
        raise ValueError(f"the objective needs batch[{name!r}]; the batch has {', '.join(sorted(batch))}")
    return batch[name]


def _optional(batch: Batch, name: str) -> Any:
    return batch.get(name) if isinstance(batch, Mapping) else None


def _next(x: Any, xp: Any) -> Any:
    """``x[:, t + 1]`` at ``t``, zero at the end: the shift is on the targets, so the logits are never copied."""
    # Not `roll`: the first token must not become a target of the last position.
    return xp.concatenate([x[:, 1:], xp.zeros_like(x[:, :1])], axis=1)


def _targets(segments: Any, batch: Batch, xp: Any) -> Any:
    """Weight of the target ``tokens[t + 1]`` at each ``t``: both in one segment, wanted by ``loss_mask``, in a valid row."""
    mask, valid = _optional(batch, "loss_mask"), _optional(batch, "valid")
    # Zero at the end is padding, so the last position never has a target.
    ahead = _next(segments, xp)
    weights = ((segments == ahead) & (ahead > 0)).astype("float32")
    weights = weights if mask is None else weights * _next(mask, xp).astype("float32")
    return weights if valid is None else weights * valid[:, None].astype("float32")


def per_position(function: Callable[..., Any], *values: Any) -> Any:
    """``function(*values)`` where that is of each position by itself, without the logits of all positions at once.

    values: arrays ``[B, T, ...]`` and :class:`~jft.models.logits.Logits`; function gets them as arrays ``[B, t, ...]`` with t
    up to T, and gives such arrays. Without logits that are still to be computed among them that is one call.
    """
    chunked = any(isinstance(value, Logits) for value in values)
    return scan_chunks(function, *values) if chunked else function(*values)


def token_nll(logits: Array, targets: Array) -> tuple[Array, Array]:
    """``(logsumexp(logits) - logits[target], logsumexp)`` in float32, for logits ``[..., V]`` and targets ``[...]``.

    The casts fuse into the reductions: no float32 copy of the logits is held.
    """
    partition = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    # Before the cast, so that one value for each target is cast and not all logits.
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return partition - target_logits.astype(jnp.float32), partition


def _sampled(key: Array, outputs: Any, weights: Array) -> tuple[Array, Array]:
    """``(sum of -log p(y), weight)`` with each target y drawn from ``softmax(outputs)``, for Fisher information.

    Every prediction has a key of its own, by its place in ``weights``: draws are the same whole and in chunks.
    """

    def losses(logits: Array, index: Array) -> Array:
        # Drawn targets are constants of the gradient: it is that of -log p at these targets.
        constant = jax.lax.stop_gradient(logits.astype(jnp.float32))
        draw = lambda i, z: jax.random.categorical(jax.random.fold_in(key, i), z)
        return token_nll(logits, jnp.vectorize(draw, signature="(),(v)->()")(index, constant))[0]

    index = jnp.arange(weights.size).reshape(weights.shape)
    return jnp.sum(weights * per_position(losses, outputs, index)), jnp.sum(weights)


def _soft_cross_entropy(outputs: Any, reference: Any, weights: Array) -> tuple[Array, Array, dict[str, Array]]:
    """Weighted cross entropy of ``outputs`` to the predictions ``softmax(reference)``; both are logits."""

    def losses(logits: Array, reference: Array) -> Array:
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        # Cross entropy, not KL: they differ by the entropy of the reference, which has no gradient.
        return -jnp.sum(jax.nn.softmax(reference.astype(jnp.float32)) * log_p, axis=-1)

    return jnp.sum(weights * per_position(losses, outputs, reference)), jnp.sum(weights), {}


def _hits(logits: Array, targets: Array) -> Array:
    """``argmax(logits) == targets``, as no logit being higher than the target's: a reduction of bits, which XLA's CPU
    backend fuses and vectorises (12 to 15 times as fast as its argmax). Of equal logits the first counts.
    """
    index, classes = targets[..., None], jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    target_logits = jnp.take_along_axis(logits, index, axis=-1)
    # Not `>`: a logit that is no number beats all others.
    higher = ~(logits <= target_logits) | ((logits == target_logits) & (classes < index))
    # take_along_axis takes -1 for the last class, of which a label -1 is none.
    return ((targets >= 0) & ~jnp.any(higher, axis=-1)).astype(jnp.float32)


def _sums(nll: Array, partition: Array, hits: Array, weights: Array, z_loss: float) -> tuple[Array, Array, dict]:
    loss = jnp.sum(weights * nll)
    sums = {"accuracy": jnp.sum(weights * hits)}
    if z_loss:
        # Perplexity is of the loss without the z term.
        sums["nll"] = loss
        loss = loss + z_loss * jnp.sum(weights * jnp.square(partition))
    return loss, jnp.sum(weights), sums


@dataclasses.dataclass(frozen=True)
class _NextToken:
    """Cross entropy of logits ``[B, T, V]`` to the next token of ``field``, by the weights that subclasses give targets."""

    z_loss: float = 0.0
    splits: ClassVar[bool] = True
    chunks: ClassVar[bool] = True
    field: ClassVar[str]

    def weights(self, batch: Batch, xp: Any = jnp) -> Any:
        """Weight of each position's target, float32 ``[B, T]``; the last position has none."""
        return _targets(self._segments(batch, xp), batch, xp)

    def _segments(self, batch: Batch, xp: Any) -> Any:
        """Which positions belong together, int32 ``[B, T]``; 0 is padding."""
        raise NotImplementedError

    def weight(self, batch: Batch, xp: Any = jnp) -> Any:
        return xp.sum(self.weights(batch, xp))

    def loss(self, outputs: Any, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
        targets = _next(_field(batch, self.field), jnp)
        each = lambda logits, targets: (*token_nll(logits, targets), _hits(logits, targets))
        nll, partition, hits = per_position(each, outputs, targets)
        return _sums(nll, partition, hits, self.weights(batch), self.z_loss)

    def toward(self, outputs: Any, reference: Any, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
        """The loss with the predictions of ``reference`` (outputs of another model) as soft targets."""
        return _soft_cross_entropy(outputs, reference, self.weights(batch))

    def sampled_loss(self, key: Array, outputs: Any, batch: Batch) -> tuple[Array, Array]:
        """``(sum of losses, weight)`` with targets drawn from the model's own prediction; inputs stay as they are."""
        return _sampled(key, outputs, self.weights(batch))

    def report(self, means: dict[str, float]) -> dict[str, float]:
        nll = means.get("nll", means["loss"])
        # exp(710) overflows a float, which Python raises on.
        return {**means, "perplexity": math.exp(nll) if nll < 700 else math.inf}


class LanguageModel(_NextToken):
    """Next-token cross entropy: logits at ``t`` predict ``tokens[t + 1]``.

    It counts where both stand in the same segment (``segments``, 0 = padding) and ``loss_mask[t + 1]`` is set, weighted by it;
    rows with ``valid`` false do not count.
    z_loss adds ``z_loss * logsumexp(logits)**2`` (Chowdhery et al. 2022, arXiv:2204.02311, use 1e-4).
    """

    field = "tokens"

    def _segments(self, batch: Batch, xp: Any) -> Any:
        tokens, segments = _field(batch, "tokens"), _optional(batch, "segments")
        return xp.ones(tokens.shape, "int32") if segments is None else segments


class Seq2Seq(_NextToken):
    """Cross entropy of an encoder-decoder: decoder logits at ``t`` predict ``decoder_tokens[t + 1]``.

    ``decoder_tokens`` are the decoder's input, start token first. Padding is ignored: ``decoder_segments == 0``, or
    without segments the id 0 after the start. loss_mask, [B, T] like them, and z_loss as in :class:`LanguageModel`.
    """

    field = "decoder_tokens"

    def _segments(self, batch: Batch, xp: Any) -> Any:
        tokens, segments = _field(batch, "decoder_tokens"), _optional(batch, "decoder_segments")
        if segments is None:
            # T5's start token has the id of padding.
            start = xp.arange(tokens.shape[1]) == 0
            segments = ((tokens != 0) | start).astype("int32")
        return segments


def _examples(batch: Batch, key: str, xp: Any) -> Any:
    """Weight of each example: 1, or 0 where ``valid`` says it fills up the last batch."""
    valid = _optional(batch, "valid")
    rows = _field(batch, key).shape[0]
    return xp.ones((rows,), "float32") if valid is None else valid.astype("float32")


def _of_classes(hits: np.ndarray, predicted: np.ndarray, there: np.ndarray) -> dict[str, float]:
    """F1 and Matthews' coefficient from the shares of examples, by class."""
    both = predicted + there
    each = 2 * hits / np.where(both > 0, both, 1)
    f1 = each[1] if len(each) == 2 else each[both > 0].mean()
    spread = (1 - np.sum(predicted**2)) * (1 - np.sum(there**2))
    # Of one class alone, predicted or there, it is 0 by convention.
    matthews = (np.sum(hits) - np.sum(predicted * there)) / math.sqrt(spread) if spread > 1e-12 else 0.0
    return {"f1": float(f1), "matthews": float(matthews)}


@dataclasses.dataclass(frozen=True)
class Classification:
    """Cross entropy of logits ``[B, C]`` with ``labels[B]``; examples with ``valid`` false do not count.

    label_smoothing s mixes the target with the uniform distribution: ``(1 - s) * onehot + s / C`` (Szegedy et al. 2015,
    arXiv:1512.00567).
    """

    label_smoothing: float = 0.0
    splits: ClassVar[bool] = True

    def weights(self, batch: Batch, xp: Any = jnp) -> Any:
        """Weight of each example, float32 ``[B]``."""
        return _examples(batch, "labels", xp)

    def weight(self, batch: Batch, xp: Any = jnp) -> Any:
        weights, labels = self.weights(batch, xp), batch["labels"]
        if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"labels of a classification are integers, one for each example, not {labels.dtype}{list(labels.shape)}; "
                "of one-hot rows take labels.argmax(-1)"
            )
        # Under jit no value can be looked at; the host checks every batch before the step.
        if xp is not jnp:  # on the host: indexing would take -1 for the last class
            below = batch["labels"][(batch["labels"] < 0) & (weights > 0)]
            if below.size:
                raise ValueError(
                    f"label {below[0]} is no class; examples without a label (-1 in many test splits) cannot be used here"
                )
        return xp.sum(weights)

    def loss(self, outputs: Any, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
        labels, weights = _field(batch, "labels"), _examples(batch, "labels", jnp)
        losses, partition = token_nll(outputs, labels)
        if self.label_smoothing:
            # The mean over classes of -log p, without an array of log p.
            uniform = partition - jnp.mean(outputs.astype(jnp.float32), axis=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * uniform
        return _sums(losses, partition, _hits(outputs, labels), weights, 0.0)

    def toward(self, outputs: Any, reference: Any, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
        """The loss with the predictions of ``reference`` (outputs of another model) as soft targets."""
        return _soft_cross_entropy(outputs, reference, _examples(batch, "labels", jnp))

    def sampled_loss(self, key: Array, outputs: Any, batch: Batch) -> tuple[Array, Array]:
        """``(sum of losses, weight)`` with targets drawn from the model's own prediction; no smoothing."""
        return _sampled(key, outputs, _examples(batch, "labels", jnp))

    def counts(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """By class ``[3, C]``: how often it was predicted rightly, predicted, and there."""
        labels, classes = _field(batch, "labels"), outputs.shape[-1]
        predicted, there = (jax.nn.one_hot(x, classes) for x in (jnp.argmax(outputs, axis=-1), labels))
        weights = self.weights(batch)[:, None]
        return {"by_class": jnp.stack([jnp.sum(weights * x, axis=0) for x in (predicted * there, predicted, there)])}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Adds ``f1`` (of two classes that of the second, else the mean over all that occur) and ``matthews``, the
        correlation coefficient of Matthews 1975, for more classes that of Gorodkin 2004.
        """
        out = dict(means)
        by_class = out.pop("by_class", None)
        return out if by_class is None else {**out, **_of_classes(*np.asarray(by_class, np.float64))}


@dataclasses.dataclass(frozen=True)
class Regression:
    """Squared error of outputs ``[B, 1]`` to ``labels[B]``, float; examples with ``valid`` false do not count.

    Evaluation reports Pearson's correlation as well.
    """

    splits: ClassVar[bool] = True

    def weights(self, batch: Batch, xp: Any = jnp) -> Any:
        """Weight of each example, float32 ``[B]``."""
        return _examples(batch, "labels", xp)

    def weight(self, batch: Batch, xp: Any = jnp) -> Any:
        if _field(batch, "labels").ndim != 1:
            raise ValueError(
                f"labels of a regression are one number for each example, not {batch['labels'].shape}; one-hot rows of a "
                "classification become integers by labels.argmax(-1)"
            )
        return xp.sum(self.weights(batch, xp))

    def _pair(self, outputs: Any, batch: Batch) -> tuple[Array, Array]:
        if outputs.ndim != 2 or outputs.shape[-1] != 1:
            raise ValueError(
                f"a regression takes outputs [B, 1], got {outputs.shape}; use a classifier of 1 class, or "
                "integer labels for a classification"
            )
        return outputs[:, 0].astype(jnp.float32), _field(batch, "labels").astype(jnp.float32)

    def loss(self, outputs: Any, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
        x, y = self._pair(outputs, batch)
        weights = self.weights(batch)
        return jnp.sum(weights * jnp.square(x - y)), jnp.sum(weights), {}

    def counts(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Sums of x, y, x^2, y^2 and xy."""
        x, y = self._pair(outputs, batch)
        return {"moments": jnp.stack([x, y, x * x, y * y, x * y]) @ self.weights(batch)}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        out = dict(means)
        if (moments := out.pop("moments", None)) is not None:
            x, y, xx, yy, xy = map(float, moments)  # type: ignore[call-overload]  # five numbers
            spread = max(xx - x * x, 0) * max(yy - y * y, 0)
            # Of predictions that are all equal there is no correlation.
            out["pearson"] = (xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0
        return out


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """CLIP's symmetric InfoNCE over the global batch (Radford et al. 2021, arXiv:2103.00020).

    outputs: ``image[B, P]`` and ``text[B, P]``, L2-normalised, and ``logit_scale``, the natural logarithm of the inverse
    temperature. Every example is a negative of every other, so microbatches would be another loss: it does not split.
    """

    splits: ClassVar[bool] = False

    def weight(self, batch: Batch, xp: Any = jnp) -> Any:
        return xp.sum(_examples(batch, "images", xp))

    def loss(self, outputs: Any, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
        image, text = (outputs[k].astype(jnp.float32) for k in ("image", "text"))
        weights = _examples(batch, "images", jnp)
        logits = jnp.exp(outputs["logit_scale"].astype(jnp.float32)) * image @ text.T
        targets = jnp.arange(logits.shape[0])
        # Rows that fill up a batch are no negatives either. Not -inf, whose differences are NaN.
        absent = jnp.where(weights > 0, 0.0, -1e30)
        by_image, by_text = logits + absent[None, :], logits.T + absent[None, :]
        losses = (token_nll(by_image, targets)[0] + token_nll(by_text, targets)[0]) / 2
        losses = jnp.where(weights > 0, losses, 0.0)
        # Without z_loss the partition is not read, so `losses` stands in for it.
        return _sums(losses, losses, _hits(by_image, targets), weights, 0.0)

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means


objectives: dict[str, type] = {
    "lm": LanguageModel,
    "classification": Classification,
    "regression": Regression,
    "contrastive": Contrastive,
    "seq2seq": Seq2Seq,
}


def infer(batch: Batch) -> Objective:
    """The objective of a batch by its fields: labels (integers, or numbers), an image with a text, decoder tokens or tokens."""
    fields = set(batch) if isinstance(batch, Mapping) else {"tokens"}
    if "labels" in fields:
        fractional = jnp.issubdtype(getattr(batch["labels"], "dtype", np.int32), jnp.floating)
        return Regression() if fractional else Classification()
    # After labels: a labelled image may have a caption as well.
    if {"images", "tokens"} <= fields:
        return Contrastive()
    if "decoder_tokens" in fields:
        return Seq2Seq()
    if "tokens" in fields:
        return LanguageModel()
    raise ValueError(f"no objective fits a batch of {', '.join(sorted(fields))}; give one ({', '.join(objectives)})")


def objective(value: Any) -> Any:
    """An objective from its name, from ``{"name": ..., **options}``, or itself. Unknown names and options are refused."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        # A runtime check of a protocol looks at names alone, so any class with these methods will do.
        if isinstance(value, Objective):
            return value
        raise ValueError(f"objective is {value!r}; give a name ({', '.join(objectives)}) or an Objective")
    options = dict(value)
    name = options.pop("name", None)
    if name not in objectives:
        hint = nearest(name, objectives)
        raise ValueError(f"objective {name!r} is unknown{hint}; choose one of {', '.join(objectives)}")
    known = [f.name for f in dataclasses.fields(objectives[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"objective {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    return objectives[name](**options)


@dataclasses.dataclass(frozen=True)
class TowardBase:
    """``given`` with the base's predictions as targets; outputs are pairs ``(model's, base's)``."""

    given: Any

    splits: ClassVar[bool] = True

    def weight(self, batch: Batch, xp: Any = jnp) -> Any:
        return self.given.weight(batch, xp)

    def loss(self, outputs: Any, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
        if not hasattr(self.given, "toward"):
            raise ValueError(f"{type(self.given).__name__} has no loss toward another model's predictions")
        return self.given.toward(*outputs, batch)

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means
