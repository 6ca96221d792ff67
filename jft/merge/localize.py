"""Localize-and-Stitch and grafting: the few entries of a task vector that carry its task, and merging by them alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.compiled import program_cache
from jft.delta import Dense, TaskVector
from jft.delta import manifest as manifests
from jft.merge import learned
from jft.merge.registry import register
from jft.merge.rule import Pass, Rule, Tensor, Vectors, in_range, listed
from jft.merge.ties import disjoint_mean, ranks_of_tensor, trimmed_by_model
from jft.select.threshold import top

Array = jax.Array
Masks = dict[str, Array]


@register(paper="He et al. 2024, arXiv:2408.13656")
def stitch(*, density: Any = 1.0) -> Rule:
    """``sum_i w_i tau_i / n`` entry by entry, n the number of task vectors that change the entry.

    density: each vector is first reduced to its ``int(n density)`` entries of largest magnitude in the whole model, and those
    equal to the last: dataless Localize-and-Stitch, with 0.05 for language models and 0.1 for CLIP. 1: vectors that
    :func:`localize` has reduced. An entry that a mask keeps and training did not change counts as not kept.
    """
    in_range("density", density, 0, 1)
    whole = bool(np.all(np.asarray(density) == 1.0))
    return Rule(
        merge=_stitch,
        options={"whole": whole},
        parameters={} if whole else {"density": density},
        passes=() if whole else (Pass(ranks=ranks_of_tensor),),
        elementwise=True,
    )


def _stitch(tensor: Tensor, whole: bool) -> Array:
    deltas = tensor.deltas if whole else trimmed_by_model(tensor)
    return disjoint_mean(tensor, deltas, deltas != 0, "count")


def localize(
    tau: TaskVector,
    *,
    base: Any,
    objective: learned.Objective,
    batches: Sequence[Any],
    data: str,
    density: float = 0.01,
    bias: float = 5.0,
    learning_rate: float = 1e7,
    strength: float = 1.0,
    regulariser: Literal["paper", "released"] = "paper",
    steps: int = 10,
    score: Callable[[Any], float] | None = None,
) -> TaskVector:
    """``tau`` where the logit of a learned mask is above zero, and zero elsewhere: Localize of arXiv:2408.13656.

    Logits S start at ``bias`` on the ``int(n density)`` entries of largest magnitude and at ``-bias`` elsewhere. A step is
    one of gradient descent on the mean of the objective over all ``batches``, at ``base + sigmoid(S) tau``:

    ``S <- S - learning_rate d(objective)/dS - strength d|sigmoid(S)|_1/dS``,

    so that the L1 norm of the mask, which the paper penalises, has the factor ``strength / learning_rate``. regulariser:
    ``released``: the code uiuctml/Localize-and-Stitch adds ``strength sign(S) sigmoid'(S)`` instead (0 counts as negative),
    which drives logits away from zero, those of kept entries up; the line of the paper stands there as a comment. Its
    objective is the sum over batches, not the mean. Defaults are those of its script for CLIP, but for the density: 1% in the
    paper, 1e-5 there. score: ``score(params) -> float``, higher is better: the mask with the best score of ``base + [S > 0]
    tau`` is kept, of the start and all steps, instead of the last. data: a name for what the batches hold, for the manifest.

    Raises ``ValueError`` for options out of range and an objective that is not finite.
    """
    learned.check_data(data)
    in_range("density", density, 0, 1)
    if regulariser not in ("paper", "released"):
        raise ValueError(f"regulariser is {regulariser!r}; choose paper or released")
    if not bias > 0 or steps < 0:
        raise ValueError(f"bias must be above 0 and steps at least 0, not {bias} and {steps}")
    manifests.verify(tau.manifest, base)
    learned.shapes_of([tau])
    batches = list(batches)
    if steps and not batches:
        raise ValueError("there are no batches to learn a mask on")
    magnitudes = {path: jnp.abs(delta.dense().astype(jnp.float32)) for path, delta in tau.items()}
    kept = top(magnitudes, int(density * sum(map(tree.size, magnitudes.values()))))
    logits = {path: jnp.where(mask, bias, -bias).astype(jnp.float32) for path, mask in kept.items()}
    del magnitudes, kept
    descent = _descent(objective, learning_rate, strength, regulariser)
    best = (score(_masked(base, tau, _masks(logits))), _masks(logits)) if score else None
    losses: list[float] = []
    for _ in range(steps):
        # Without its manifest, which is static: that of another task would be another program.
        logits, loss = descent.step(logits, TaskVector(tau.deltas), base, batches)
        if not math.isfinite(loss):
            raise ValueError(f"the objective is {loss} at step {len(losses)}; look at batches and learning rate")
        losses.append(loss)
        if score and best is not None:
            now = score(_masked(base, tau, _masks(logits)))
            best = (now, _masks(logits)) if now > best[0] else best
    masks = _masks(logits) if best is None else best[1]
    deltas = {path: Dense(jnp.where(mask, tau[path].dense(), 0)) for path, mask in masks.items()}
    note: dict[str, Any] = {"density": density, "bias": bias, "learning_rate": learning_rate, "strength": strength}
    note |= {"regulariser": regulariser, "steps": steps, "losses": losses}
    note |= {"entries": sum(int(jnp.sum(m)) for m in masks.values())}
    return TaskVector(deltas, manifests.derive([tau.manifest], "localize", data=data, **note))


def graft(
    tau: TaskVector,
    *,
    base: Any,
    objective: learned.Objective,
    batches: Sequence[Any],
    data: str,
    density: float = 1e-4,
    bias: float = 10.0,
    learning_rate: float = 1e7,
    steps: int = 100,
    score: Callable[[Any], float] | None = None,
) -> TaskVector:
    """Skill localisation by grafting: :func:`localize` without a regulariser (Panigrahi et al. 2023, arXiv:2302.06600).

    The mask of the paper, ``gamma = basepatch + (1 - 2 basepatch) sigmoid(S - bias)`` with S from 0 and the basepatch 1 on
    the entries of largest magnitude, is ``sigmoid`` of a logit that starts at ``bias`` there and at ``-bias`` elsewhere, and
    gradient descent on either is the same. density: of the basepatch; 0.01% of the entries keep over 95% of what fine-tuning
    gained there. score: as the released code does, which keeps the mask of the best accuracy. Options as in :func:`localize`.
    """
    options: dict[str, Any] = {
        "density": density,
        "bias": bias,
        "learning_rate": learning_rate,
        "steps": steps,
        "score": score,
    }
    return localize(tau, base=base, objective=objective, batches=batches, data=data, strength=0.0, **options)


def localize_and_stitch(
    vectors: Vectors,
    *,
    base: Any,
    objectives: Sequence[learned.Objective],
    batches: Sequence[Sequence[Any]],
    data: str,
    weights: Any = None,
    scale: Any = 1.0,
    **options: Any,
) -> TaskVector:
    """:func:`localize` of every vector with its own objective and batches, then :func:`stitch`. He et al. 2024."""
    taus = listed(vectors)
    if not len(taus) == len(objectives) == len(batches):
        counts = f"{len(taus)} vectors, {len(objectives)} objectives and {len(batches)} lists of batches"
        raise ValueError(f"there are {counts}; give one of each per task")
    reduced = [
        localize(tau, base=base, objective=f, batches=b, data=data, **options)
        for tau, f, b in zip(taus, objectives, batches, strict=True)
    ]
    merged: TaskVector = stitch(reduced, weights, scale=scale)
    return merged


class _Descent:
    """Steps of gradient descent on the logits of a mask, compiled."""

    def __init__(self, objective: learned.Objective, learning_rate: float, strength: float, regulariser: str) -> None:
        def loss(logits: Masks, tau: TaskVector, base: Any, batch: Any) -> Array:
            changes = {p: jax.nn.sigmoid(s) * tau[p].dense().astype(jnp.float32) for p, s in logits.items()}
            return objective(learned.added(base, changes), batch)

        def update(logits: Masks, total: Masks, count: int) -> Masks:
            return {
                p: s - learning_rate * total[p] / count - strength * _push(s, regulariser) for p, s in logits.items()
            }

        self._gradient: Callable[..., tuple[Array, Masks]] = jax.jit(jax.value_and_grad(loss))
        # One set of logits, as large as the model, at a time.
        self._update: Callable[..., Masks] = jax.jit(update, donate_argnums=0)

    def step(self, logits: Masks, tau: TaskVector, base: Any, batches: Sequence[Any]) -> tuple[Masks, float]:
        """The logits after one step on all batches, and the mean of the objective before it."""
        total, loss = None, 0.0
        for batch in batches:
            value, gradient = self._gradient(logits, tau, base, batch)
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
            loss += float(value) / len(batches)
        return self._update(logits, total, len(batches)), loss


@program_cache
def _descent(objective: learned.Objective, learning_rate: float, strength: float, regulariser: str) -> _Descent:
    """The same one for equal arguments: the masks of several tasks and densities share its programs."""
    return _Descent(objective, learning_rate, strength, regulariser)


def _push(s: Array, regulariser: str) -> Array:
    slope = jax.nn.sigmoid(s) * jax.nn.sigmoid(-s)
    return slope if regulariser == "paper" else -jnp.where(s > 0, slope, -slope)


def _masks(logits: Masks) -> Masks:
    return {path: s > 0 for path, s in logits.items()}


def _masked(base: Any, tau: TaskVector, masks: Masks) -> Any:
    return learned.added(base, {path: jnp.where(m, tau[path].dense(), 0) for path, m in masks.items()})
