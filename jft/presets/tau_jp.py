"""tau-Jp: linearized fine-tuning whose change moves no output on other tasks' data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft import files
from jft.methods.card import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.tree import Patterns, patterns

Form = Literal["squared", "norm"]

CARD = Card(
    formula="loss + weight * mean over other tasks and examples of |J(x; theta0) tau|, a batch of each task at each step",
    follows=(
        "The code, which takes the norm; form='squared' is the penalty as arXiv:2602.17385 tells it, whose Kronecker factors "
        "(preset tak) stand for it. The paper's own text was not at hand."
    ),
    code="katoro8989/tau-Jp_Task_Arithmetic@53f4276, finetune_reg_strict.py; linearize.py:dp",
    departs=(
        "Batches are drawn with replacement (code: in order, from step penalty_iter on); at tau = 0 the norm has derivative 0. "
        "The default weight is a choice of ours."
    ),
    check="value and gradient of both forms against a dense Jacobian in float64",
    defaults={"form": ("-", "norm")},
)


# Compared by identity: arrays have no hash.
@dataclasses.dataclass(frozen=True, eq=False)
class JacobianProduct:
    """``weight * mean over tasks of E |J(x) tau|`` (``squared``: of ``|J(x) tau|^2``) on one batch of each task.

    tasks: for each a pytree of arrays ``[batches, B, ...]``, of which a step draws one; without a key the first. model: whose
    ``apply`` is differentiated; known from the plan.
    """

    weight: float
    tasks: tuple[Any, ...]
    form: Form = "norm"
    model: Any = None
    random = True

    def __post_init__(self) -> None:
        """Refuse a form that is not known."""
        if self.form not in ("squared", "norm"):
            raise ValueError(f"form is {self.form!r}; choose squared or norm")

    def fitted(self, params: Any, model: Any) -> JacobianProduct:
        """The same with the model."""
        if not self.tasks:
            raise ValueError("no data of another task; give data=, .npz files of stacked batches")
        return dataclasses.replace(self, model=model)

    def __call__(
        self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any], key: jax.Array | None = None
    ) -> jax.Array:
        if plan.method.forward != "linearized":
            raise ValueError("J(theta0) tau is of a linearized model; add forward='linearized'")
        apply = getattr(self.model, "apply", self.model)
        total = jnp.float32(0)
        for index, task in enumerate(self.tasks):
            count = jax.tree.leaves(task)[0].shape[0]
            at = 0 if key is None else jax.random.randint(jax.random.fold_in(key, index), (), 0, count)
            moved = plan.derivative(apply, kept, trained, jax.tree.map(lambda x, at=at: jnp.asarray(x)[at], task))
            squares = jnp.sum(jnp.square(moved.astype(jnp.float32)), axis=tuple(range(1, moved.ndim)))
            total = total + jnp.mean(squares if self.form == "squared" else _root(squares))
        return self.weight / len(self.tasks) * total


def _root(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0, where tau starts."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


@register("tau_jp", paper="Yoshida et al. 2025, ICLR", card=CARD)
def tau_jp(data: Patterns = (), weight: float = 1.0, form: Form = "norm") -> Method:
    """Train the linearized model where moving its outputs on other tasks' inputs costs ``weight * |J(x) tau|``.

    data: for each other task an ``.npz`` file, its arrays the fields of a batch, stacked ``[batches, B, ...]``; no targets are
    needed. form: the ``norm``, or ``squared``.
    """
    tasks = [files.read_npz(path) for path in patterns(data)]
    return Method(Select(), InPlace(), penalties=(JacobianProduct(weight, tuple(tasks), form),), forward="linearized")
