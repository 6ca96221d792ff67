"""The linearized forward pass: a model's outputs and their derivative along a change of its weights, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft.models.core import Hooks, is_jft_model, model_of
from jft.tangent.lean import Lean
from jft.tree import stack_of

Apply = Callable[..., Any]
Build = Callable[[Mapping[str, Any]], Any]


def pair(
    apply: Apply, build: Build, leans: Mapping[str, Lean], batch: Any, until: str | None = None
) -> tuple[Any, Any]:
    """``(f(theta0), J v)``: outputs at the base, and their derivative along the directions of ``leans``; one primal pass.

    build: parameters from ``{path: weight}``, whose weights may be structured, so that ``x v`` costs what v holds.
    Differentiated in the directions, the pass is transposed once, at the base: there is no derivative of second order.
    until: the name of a site of a jft model (``features``, ``final``, ...): outputs are the value there.
    """

    point = {path: lean.point for path, lean in leans.items()}
    direction = {path: lean.direction for path, lean in leans.items()}
    direction = jax.tree.map(lambda v, p: v.astype(jnp.result_type(p)), direction, point)
    return jax.jvp(function_of(apply, build, leans, batch, until), (point,), (direction,))


def function_of(
    apply: Apply, build: Build, leans: Mapping[str, Lean], batch: Any, until: str | None = None
) -> Callable[[Mapping[str, Any]], Any]:
    """What :func:`pair` differentiates: outputs for ``batch`` as a function of ``{path: point}``, taken at ``lean.point``."""

    def outputs(values: Mapping[str, Any]) -> Any:
        params = build({path: leans[path].bind(value) for path, value in values.items()})
        return apply(params, batch) if until is None else _read(apply, params, batch, until)

    return outputs


def together(outputs: Any, moved: Any) -> Any:
    """``f(theta0) + J v``; what is no floating-point number does not move."""
    return jax.tree.map(lambda y, dy: y if dy.dtype == jax.dtypes.float0 else y + dy.astype(y.dtype), outputs, moved)


def forward(
    apply: Apply, build: Build, leans: Mapping[str, Lean], batch: Any, until: str | None = None, after: Any = None
) -> Any:
    """``f(theta0) + J v``: see :func:`pair`. With ``until``, what follows that site is evaluated at this value.

    after: the parameters of what follows the site.
    """
    site = getattr(model_of(apply), "product_head", None)
    if until is None and site is not None:
        return _through_head(apply, build, leans, batch, site)
    found = together(*pair(apply, build, leans, batch, until))
    return found if until is None else entered(apply, after, batch, until, found)


def _through_head(apply: Apply, build: Build, leans: Mapping[str, Lean], batch: Any, site: str) -> Any:
    """:func:`forward` of a model that ends in one product: ``(h + dh) W + h dW`` in place of ``h W + dh W + h dW``.

    With many outputs (a vocabulary) the head is most of what a pass holds at once, and a good part of its cost.
    """
    head = getattr(apply, "head", model_of(apply).head)
    h, dh = pair(apply, build, leans, batch, site)
    base = build({path: lean.bind(lean.point) for path, lean in leans.items()})
    _, moved = pair(head, build, leans, h)
    return head(base, h + dh) + moved


def entered(apply: Apply, params: Any, batch: Any, at: str, value: Any) -> Any:
    """Outputs of a jft model whose value at the site ``at`` is this one."""
    # The pass before the site is traced and, since nothing reads it, dropped by XLA.
    hooks = Hooks(value=lambda name, h, state: (h if name != at else state, None), state={at: value})
    return apply(params, batch, hooks=hooks)[0]


def _read(apply: Apply, params: Any, batch: Any, until: str) -> Any:
    """The value at the site ``until``."""
    if not is_jft_model(model_of(apply)):
        raise ValueError(
            f"until={until!r} names a site of jft's own models, and this apply takes no hooks: linearize all of it, or give "
            "linearize the part that is to be linear"
        )
    names: list[str] = []

    def value(name: str, h: Any, state: Any) -> tuple[Any, Any]:
        names.append(name)
        return h, h if name == until else None

    _, reads = apply(params, batch, hooks=Hooks(value=value))
    if until not in reads or stack_of(until):
        known = ", ".join(dict.fromkeys(n for n in names if not stack_of(n)))
        raise ValueError(f"the model has no site {until!r} outside its layers; it has: {known}")
    return reads[until]
