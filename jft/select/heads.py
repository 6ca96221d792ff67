"""Scores of attention heads: gradients of gates on their outputs, and the effect of patching them on the right answer.

A head's output is its slice of the input of the product ``attn/o`` (``cross/o``): ``x[B, T, H K]``. Results are by the
name of that product, ``{"layers/attn/o": [L, H]}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft.dot import dot
from jft.models.core import Hooks
from jft.select.activations import hookable
from jft.select.calibration import Calibration

Array = jax.Array
Groups = tuple[tuple[str, int, int], ...]
"""(product, layers L, groups of equal width that its input falls into) each."""


def _outputs(calibration: Calibration) -> Groups:
    """The products that attention heads write into."""
    config = getattr(hookable(calibration).config, "backbone", calibration.model.config)
    products = []
    for path, w in calibration.params.items():
        if path.endswith(("attn/o/w", "cross/o/w")):
            # CLIP has two towers, each with its number of heads.
            tower = getattr(config, path.split("/")[0], None)
            products.append((path.removesuffix("/w"), w.shape[0], getattr(tower, "heads", None) or config.heads))
    if not products:
        raise ValueError("the model has no attention heads to score: no weight ends in attn/o/w")
    return tuple(products)


def _mlps(calibration: Calibration) -> Groups:
    """The products that MLPs write into, as one group each."""
    ends = "mlp/down/w"
    return tuple((p.removesuffix("/w"), w.shape[0], 1) for p, w in calibration.params.items() if p.endswith(ends))


def _weights(objective: Any, batch: Any) -> Array:
    """Weight of each row's loss, ``[B]``."""
    # Scalars of a batch belong to all rows.
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, batch)
    ranks = jax.tree.map(lambda x: x.ndim, batch)
    # Objectives weigh batches, so a row is one of size 1.
    one = lambda row: objective.weight(jax.tree.map(lambda x, n: x[None] if n else x, row, ranks))
    return jax.vmap(one, in_axes=(axes,))(batch)


@dataclasses.dataclass(frozen=True)
class _Gates:
    """Sums over rows of ``|d(the row's mean loss) / d(gate)|``, and how many rows count."""

    model: Any
    objective: Any
    groups: Groups

    def __call__(self, params: Any, batch: Any) -> Any:
        weights = _weights(self.objective, batch)
        counts = weights > 0

        def product(name: str, x: Array, w: Any, gates: Any) -> tuple[Array, Any]:
            # State comes by the product's name; others have none.
            if gates is None:
                return dot(x, w), None
            heads = x.reshape(*x.shape[:2], gates.shape[1], -1) * gates[:, None, :, None].astype(x.dtype)
            return dot(heads.reshape(x.shape), w), None

        def loss(gates: Any) -> Array:
            outputs, _ = self.model.apply(params, batch, Hooks(product=product, state=gates))
            # The sum of losses: rows do not share a divisor, so gradients of gates stay by row.
            return self.objective.loss(outputs, batch)[0]

        # A gate for each row: one backward pass gives the gradient of every example, since examples do not mix.
        ones = {name: jnp.ones((layers, len(weights), heads), jnp.float32) for name, layers, heads in self.groups}
        # The mean loss of each row; the inner `where` keeps 1 / 0 out.
        scale = jnp.where(counts, 1 / jnp.where(counts, weights, 1.0), 0.0)
        gradients = {name: jnp.einsum("lbh,b->lh", jnp.abs(g), scale) for name, g in jax.grad(loss)(ones).items()}
        return gradients, jnp.sum(counts)


def gates(calibration: Calibration, batches: int) -> dict[str, Array]:
    """``E |d(loss) / d(gate)|`` at gate 1 on each head's output: its importance to first order, ``{name: [L, H]}``.

    The mean over examples of the absolute gradient of the example's mean loss (Michel et al. 2019, arXiv:1905.10650),
    exact, by one backward pass a batch.
    """
    if not calibration.objective.splits:
        raise ValueError(
            f"{type(calibration.objective).__name__} compares examples with each other, so one has no gradient"
        )
    gradients, count = calibration.sums(
        _Gates(hookable(calibration), calibration.objective, _outputs(calibration)), batches
    )
    return {name: x / count for name, x in gradients.items()}


def answers(objective: Any, outputs: Array, batch: Any) -> tuple[Array, Array]:
    """``(sum of the logits of the right answers, weight)``: of labels ``[B]``, or of next tokens where targets are."""
    fields = batch if isinstance(batch, Mapping) else {"tokens": batch}
    if "labels" in fields:
        targets, weights = fields["labels"], _weights(objective, batch)
    else:
        tokens = fields["decoder_tokens"] if "decoder_tokens" in fields else fields["tokens"]
        # The last position has no target, and its weight is 0.
        targets, weights = jnp.roll(tokens, -1, axis=1), objective.weights(batch)
    logits = jnp.take_along_axis(outputs.astype(jnp.float32), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * logits), jnp.sum(weights)


def rolled(batch: Any) -> Any:
    """Each row with the next one's contents: the plainest counterfactual, another example of the data."""
    return jax.tree.map(lambda x: jnp.roll(x, -1, axis=0) if x.ndim else x, batch)


@dataclasses.dataclass(frozen=True)
class _Patches:
    """Sums of the right answers' logits as they are and with each group patched in turn, and the weight of them."""

    model: Any
    objective: Any
    counterfactual: Callable[[Any], Any] | None
    heads: Groups
    mlps: Groups
    freeze: bool

    def __call__(self, params: Any, batch: Any) -> Any:
        names = {name for name, _, _ in self.heads + self.mlps}

        def read(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
            return dot(x, w), x if name in names else None

        # One clean pass for all patches of a batch.
        outputs, clean = self.model.apply(params, batch, Hooks(product=read))
        if self.counterfactual is None:
            other = jax.tree.map(jnp.zeros_like, clean)
        else:
            other = self.model.apply(params, self.counterfactual(batch), Hooks(product=read))[1]
        # Never MLPs: they carry a patch onward.
        frozen = {name for name, _, _ in self.heads} if self.freeze else set()

        def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
            if state is None:
                return dot(x, w), None
            mask, patch, clean_input = state
            base = (x if clean_input is None else clean_input).reshape(*x.shape[:2], mask.shape[0], -1)
            edited = jnp.where(mask[:, None], patch.reshape(base.shape), base)
            return dot(edited.reshape(x.shape), w), None

        def patched(masks: Any) -> Array:
            state = {n: (masks[n], other[n], clean[n] if n in frozen else None) for n in names}
            outputs, _ = self.model.apply(params, batch, Hooks(product=product, state=state))
            return answers(self.objective, outputs, batch)[0]

        shapes = {name: (layers, groups) for name, layers, groups in self.heads + self.mlps}
        no_masks = {name: jnp.zeros(shape, bool) for name, shape in shapes.items()}
        logits = {}
        for name, shape in shapes.items():
            size = shape[0] * shape[1]
            # Bound as default arguments: a closure would see the loop's variables as they change.
            one = lambda i, name=name, shape=shape, size=size: patched(
                no_masks | {name: (jnp.arange(size) == i).reshape(shape)}
            )
            # One patch after the other: the memory of one forward pass.
            logits[name] = jax.lax.map(one, jnp.arange(size)).reshape(shape)
        total, weight = answers(self.objective, outputs, batch)
        return logits, total, weight


def patching(
    calibration: Calibration,
    batches: int,
    counterfactual: Callable[[Any], Any] | None = rolled,
    *,
    freeze: bool = True,
    mlps: bool = False,
) -> dict[str, Array]:
    """The fall of the right answer's logit when one head has the output of another example: ``{name: [L, H]}``.

    The mean over targets of ``logit - logit with that head's output replaced`` by the one it has on
    ``counterfactual(batch)``, a batch of the same shapes (None: by zero). freeze: all other heads keep their outputs on
    the batch itself and MLPs are computed anew, so that only paths which pass through no other head count (path
    patching, Wang et al. 2023, arXiv:2211.00593); else everything later is (activation patching). Zhang et al. 2024,
    arXiv:2409.01659, fine-tune the few heads found so. mlps: score each MLP as a whole as well, ``{"layers/mlp/down":
    [L, 1]}``. A forward pass for each head and batch. counterfactual is compiled: a function of arrays.
    """
    if not calibration.objective.splits:
        raise ValueError(f"{type(calibration.objective).__name__} has no answer whose logit could fall")
    mlp_groups = _mlps(calibration) if mlps else ()
    compute = _Patches(
        hookable(calibration), calibration.objective, counterfactual, _outputs(calibration), mlp_groups, freeze
    )
    logits, total, weight = calibration.sums(compute, batches)
    return {name: (total - x) / weight for name, x in logits.items()}
