"""Optimizers from a config: a transformation of gradients, and the learning rate over time.

The learning rate is kept apart from the rest: it enters the compiled step as a number, so that a sweep over rates, schedules
and lengths compiles once. Any ``optax.GradientTransformation`` (which carries its own rate) may be used instead.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jft import tree
from jft.delta import Leaf, Matrices

Decays = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Stacks = Callable[[Mapping[str, Any]], Mapping[str, Any]]
SCHEDULES = ("constant", "linear", "cosine")
NAMES = ("adamw", "adam", "sgd", "lion", "adafactor", "muon")
# What decays by default is neither a bias nor a norm, whether jft or another library named it.
UNDECAYED = re.compile(r"(?:^|/)(?:b|bias|scale|gamma|beta|logit_scale)$|norm", re.IGNORECASE)
# Muon is for matrices that map activations to activations; Jordan et al. leave tables and the head to AdamW.
TABLES = re.compile(r"(?:^|/)(?:table|embedding|cls|head/w)$|embed", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer by name, with its schedule.

    name: adamw, adam (without decay), sgd, lion, adafactor or muon (matrices, each layer's by itself, scaled by
    sqrt(max(1, out / in)); tables, biases and norms by AdamW with Nesterov momentum; Jordan et al. 2024). Where parts of
    weights train, each block is a matrix, and so are the rows, or columns, that train of one weight, by their own shape;
    single entries, and gates on channels or layers, are none and go by that AdamW.
    lr: the peak learning rate. weight_decay: decoupled and toward zero for every optimizer:
    ``value -= lr * weight_decay * value`` for the values that train; for LoRA these are the factors, so the *weight* is pulled
    to the base. decay: patterns of paths that decay; none: everything but biases and norms.
    b1, b2, eps: of adam, adamw, lion (b1, b2) and muon's AdamW. momentum: of sgd and muon.
    schedule: what follows ``warmup`` steps of linear rise: constant, or linear or cosine down to ``end * lr`` at the last step.
    clip: largest global norm of the gradient over what trains; 0 for none.
    """

    name: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    decay_to: str = "zero"
    decay: tuple[str, ...] = ()
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    schedule: str = "constant"
    warmup: int = 0
    end: float = 0.0
    clip: float = 1.0

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(
                f"optimizer {self.name!r} is unknown; choose one of {', '.join(NAMES)}, or pass any optax one"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        if self.decay_to not in ("zero", "base"):
            raise ValueError(f"optimizer.decay_to is {self.decay_to!r}; weights decay to 'zero' or to 'base'")
        if self.name == "adam" and self.weight_decay:
            raise ValueError(
                "adam has no weight decay here; adamw with the same settings decays toward zero, decoupled"
            )
        # `not >`, so that NaN is refused as well.
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"optimizer.lr is {self.lr}; it must be positive and finite")
        if min(self.weight_decay, self.warmup, self.clip) < 0:
            raise ValueError(f"weight_decay, warmup and clip cannot be negative: {self}")
        for name in ("b1", "b2", "momentum"):
            # Shares of what is remembered; at 1 nothing is ever learned, beyond it sums explode.
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not self.eps >= 0 or not 0 <= self.end < math.inf:
            raise ValueError(
                f"optimizer.eps is {self.eps} and optimizer.end {self.end}; neither can be negative or NaN"
            )

    @property
    def to_base(self) -> bool:
        """Whether the step must know how far values are from the base."""
        return self.decay_to == "base" and self.weight_decay > 0

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of update ``step`` (from 0) out of ``steps``."""
        if step < self.warmup:
            # step + 1: a first update at rate 0 would be a step for nothing.
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        # At 1 from there on, where a run goes on beyond `steps`; a warmup as long as the run must not divide by 0.
        progress = min((step - self.warmup) / max(steps - self.warmup, 1), 1.0)
        remaining = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (self.end + (1 - self.end) * remaining)

    def unscheduled(self) -> Optimizer:
        """The same without what enters the compiled step as a number, so that it is equal for all rates and schedules."""
        # All of them at one fixed value, so that recipes compare equal.
        return dataclasses.replace(self, lr=1.0, schedule="constant", warmup=0, end=0.0)

    def decayed(self, shapes: Mapping[str, Any]) -> frozenset[str]:
        """The paths that decay, of weights with these shapes."""
        if not self.weight_decay:
            return frozenset()
        if self.decay:
            return frozenset(tree.matching(shapes, self.decay, "optimizer.decay"))
        # Vectors have one axis, but those of stacked layers two: hence the names too.
        return frozenset(p for p, x in shapes.items() if len(x.shape) > 1 and not UNDECAYED.search(p))

    def transform(
        self, decays: Decays | None = None, matrices: Stacks | None = None, aged: bool = False
    ) -> optax.GradientTransformationExtraArgs:
        """Gradient to update, sign flipped, for a learning rate of 1. Trees are ``{path: pytree}``.

        decays: ``decays(values)`` says of each leaf whether it is under weight decay; None for all. matrices:
        ``matrices(values)`` says of each leaf what matrices it stacks (:meth:`jft.methods.Plan.matrices`); by default the
        last two axes are one.
        aged: Adam corrects the bias of each value's moments by the steps that this value has been trained for.
        """
        # Decay comes after the direction, which decouples it; the rate comes last, in the step.
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        parts.append(self._direction(matrices or _by_shape, aged))
        if self.weight_decay:
            to_zero = optax.add_decayed_weights(self.weight_decay, mask=decays)
            parts.append(_decay_to_base(self.weight_decay, decays) if self.to_base else to_zero)
        return optax.chain(*parts, optax.scale(-1.0))

    def _direction(self, matrices: Stacks, aged: bool) -> optax.GradientTransformation:
        if self.name in ("adam", "adamw"):
            if aged:
                return scale_by_aged_adam(self.b1, self.b2, self.eps)
            return optax.scale_by_adam(self.b1, self.b2, self.eps)
        if self.name == "sgd":
            return optax.trace(self.momentum) if self.momentum else optax.identity()
        if self.name == "lion":
            return optax.scale_by_lion(self.b1, self.b2)
        if self.name == "adafactor":
            # Its own chain ends in a sign flip; ours follows, so undo it.
            return optax.chain(optax.adafactor(learning_rate=None), optax.scale(-1.0))
        axes = functools.partial(_matrix_axes, matrices)
        # Of optax's muon the sign is flipped too, hence the chain. Its own decay stays off: ours follows for every optimizer.
        muon = optax.contrib.muon(
            1.0,
            beta=self.momentum,
            eps=self.eps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            muon_weight_dimension_numbers=axes,
        )
        return optax.chain(muon, optax.scale(-1.0))


@dataclasses.dataclass(frozen=True)
# A subclass, since the loop passes its own `steps`, which are those of the short run.
class Beginning(Optimizer):
    """An optimizer for the first steps of a run of ``of`` steps: its rates are those of that run."""

    of: int = 1

    def rate(self, step: int, steps: int) -> float:
        return super().rate(step, self.of)

    def unscheduled(self) -> Optimizer:
        # `of` changes rates alone, so it must not make programs differ.
        return dataclasses.replace(super().unscheduled(), of=1)  # type: ignore[call-arg]


def beginning(optimizer: Optimizer | Given, of: int) -> Optimizer | Given:
    """``optimizer`` for the first steps of a run of ``of``; an optax transformation counts its steps by itself."""
    if isinstance(optimizer, Given):
        return optimizer
    # Not `asdict`: a Beginning has `of` as well.
    return Beginning(**{f.name: getattr(optimizer, f.name) for f in dataclasses.fields(Optimizer)}, of=of)


class AgedAdamState(NamedTuple):
    """Adam's moments, and for each value how many gradients they have seen, float32."""

    age: Any
    mu: Any
    nu: Any


def scale_by_aged_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose bias correction goes by each value's own age: one that joins late starts as all did at first.

    ``m / (1 - b1^age) / (sqrt(v / (1 - b2^age)) + eps)``; equal to Adam where all have one age (Ansell et al. 2024,
    arXiv:2401.16405, for selections that change).
    """

    def init(values: Any) -> AgedAdamState:
        return AgedAdamState(*(jax.tree.map(jnp.zeros_like, values) for _ in range(3)))

    def update(gradient: Any, state: AgedAdamState, params: Any = None) -> tuple[Any, AgedAdamState]:
        age = jax.tree.map(lambda a: a + 1, state.age)
        mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, gradient, state.mu)
        nu = jax.tree.map(lambda g, v: (1 - b2) * (g * g) + b2 * v, gradient, state.nu)

        def direction(a: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            # `age` is at least 1 here, so no divisor is 0.
            return m / (1 - b1**a) / (jnp.sqrt(v / (1 - b2**a)) + eps)

        return jax.tree.map(direction, age, mu, nu), AgedAdamState(age, mu, nu)

    return optax.GradientTransformation(init, update)


def _decay_to_base(weight: float, decays: Decays | None) -> optax.GradientTransformationExtraArgs:
    """Adds ``weight * change``, the values' distance from the base, which ``change()`` of the step gives."""

    # `change` is a function, so that the distance is computed only where it is used.
    def update(updates: Any, state: Any, params: Any = None, *, change: Any, **_: Any) -> tuple[Any, Any]:
        mask = decays(updates) if decays else jax.tree.map(lambda _: True, updates)
        moved = jax.tree.map(lambda u, c, d: u + weight * c if d else u, updates, change(), mask)
        return moved, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _by_shape(values: Any) -> Any:
    return jax.tree.map(lambda x: Leaf().stacked_matrices(x.ndim), values)


def _matrix_axes(matrices: Stacks, values: Mapping[str, Any]) -> dict[str, Any]:
    """Which axes muon takes as matrices, None for a leaf without: no embeddings, norms or biases."""

    def axes(path: str, stacked: Matrices | None) -> Any:
        # By name too: stacked vectors have the shape of a matrix.
        if stacked is None or UNDECAYED.search(path) or TABLES.search(path):
            return None
        return optax.contrib.MuonDimensionNumbers(stacked.inputs, stacked.outputs)

    stacks = matrices(values).items()
    # None is a leaf here: it says that a value is no matrix.
    return {p: jax.tree.map(functools.partial(axes, p), x, is_leaf=lambda y: y is None) for p, x in stacks}


@dataclasses.dataclass(frozen=True)
class Given:
    """An ``optax.GradientTransformation`` used as it is: its own learning rate, its own decay."""

    given: optax.GradientTransformation
    to_base = False

    def rate(self, step: int, steps: int) -> float:
        # Its rate is inside it; the step multiplies by this one.
        return 1.0

    def unscheduled(self) -> Given:
        return self

    def decayed(self, shapes: Mapping[str, Any]) -> frozenset[str]:
        return frozenset()


def optimizer(value: Any) -> Optimizer | Given:
    """An :class:`Optimizer` from None (the defaults), a name, a mapping of its fields, or an optax transformation."""
    if value is None:
        return Optimizer()
    if isinstance(value, Optimizer | Given):
        return value
    if isinstance(value, str):
        return Optimizer(value)
    if isinstance(value, Mapping):
        known = {f.name for f in dataclasses.fields(Optimizer)}
        for key in value:
            if key not in known:
                raise ValueError(f"optimizer has no option {key!r}; it has: {', '.join(sorted(known))}")
        # A config file has lists, and an optimizer is hashed with its recipe.
        options: dict[str, Any] = {k: tuple(v) if k == "decay" else v for k, v in value.items()}
        return Optimizer(**options)
    # By duck type: optax has several such classes, and other libraries have theirs.
    if hasattr(value, "init") and hasattr(value, "update"):
        return Given(value)
    raise ValueError(
        f"optimizer is {value!r}; give a name ({', '.join(NAMES)}), its options, or an optax transformation"
    )
