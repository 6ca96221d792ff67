"""`linearize`: a model as a function that is linear in the change of its weights, and the forward pass of one.

A linearized model's weights are :class:`jft.delta.Changed` and held: their value is that of the base, and their derivative the
change. One pass gives the outputs at the base and their derivative along the change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta, tree
from jft.delta import changed
from jft.models.core import Hooks, is_jft_model, model_of, takes_structured
from jft.models.logits import Logits
from jft.names import nearest

Apply = Callable[..., Any]
Build = Callable[[Mapping[str, Any]], Any]
Tangents = Mapping[str, Any]
Direction = dict[str, delta.Change]


@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """``f_lin(tau, batch) = f(theta0, batch) + J(theta0, batch) tau``: see :func:`linearize`."""

    function: Callable[..., Any]
    params: Any
    until: str | None = None

    def __call__(self, tau: Any, batch: Any) -> Any:
        """Outputs for ``batch`` at the change ``tau``."""
        return self.land(together(*self.parts(tau, batch)), batch)

    def parts(self, tau: Any, batch: Any) -> tuple[Any, Any]:
        """``(f(theta0), J tau)`` at the outputs, or at the site ``until``; one pass gives both."""
        return pair(self.function, self.build, self.tangents(self.direction(tau)), batch, self.until)

    def tangents(self, direction: Direction) -> dict[str, delta.Changed]:
        """The weights that move, by path."""
        flat = tree.flatten(self.params)
        return {p: delta.Changed(flat[p], c, held=True) for p, c in direction.items()}

    def build(self, weights: Mapping[str, Any]) -> Any:
        """The parameters with ``weights`` (by path) in the place of theirs, structured where the model takes them so."""
        structured = {p: changed.as_seen(w, takes_structured(self.function, p)) for p, w in weights.items()}
        return tree.like(self.params, {**tree.flatten(self.params), **structured})

    def land(self, value: Any, batch: Any) -> Any:
        """Outputs from a value at the site ``until``, by what follows it at the base; without ``until``, the value itself."""
        return value if self.until is None else entered(self.function, self.params, batch, self.until, value)

    def direction(self, tau: Any) -> Direction:
        """``tau`` in the form whose products are cheapest; pass it to functions under ``jit`` in place of a task vector.

        Raises ``ValueError`` for paths or shapes that the model does not have, and weights that are no numbers with a
        derivative.
        """
        flat = tree.flatten(self.params)
        changes = dict(tau.items()) if isinstance(tau, delta.TaskVector) else _by_path(tau)
        out: Direction = {}
        for path, value in changes.items():
            if path not in flat:
                raise ValueError(f"tau changes {path!r}, which the model does not have{nearest(path, flat)}")
            w = flat[path]
            if isinstance(value, delta.Selected):  # prepared already
                out[path] = value
                continue
            value = value.resolve(w) if isinstance(value, delta.Encoding) else delta.Dense(jnp.asarray(value))
            if tuple(value.shape) != tuple(w.shape):
                raise ValueError(f"tau has {path} of shape {tuple(value.shape)}, and the model of {tuple(w.shape)}")
            if not jnp.issubdtype(w.dtype, jnp.inexact):
                raise ValueError(f"{path} is of dtype {w.dtype}: it has no derivative, so tau cannot change it")
            structured = takes_structured(self.function, path)
            # A function that takes plain arrays needs a plain tangent.
            out[path] = value.stacked() if structured else delta.Dense(value.dense())
        return out


def _by_path(tau: Any) -> dict[str, Any]:
    """A mapping by path, or a tree shaped like the parameters (parts of it may be missing), by path."""
    # Encodings are pytrees: flattening a tree of them would go into them.
    if isinstance(tau, Mapping) and any(isinstance(x, delta.Encoding | delta.Change) for x in tau.values()):
        return dict(tau)
    return tree.flatten(tau)


def linearize(apply: Callable[..., Any], params: Any, until: str | None = None) -> Linearized:
    """``f_lin(tau, batch) = f(batch; theta0) + J(theta0, batch) tau``, the model's first-order expansion at ``params``.

    apply: a jft model's ``apply``, or any pure ``apply(params, batch)``. tau: a :class:`jft.TaskVector`, ``{path: encoding
    or array}``, or a tree like ``params`` of which parts may be missing (they do not move). Paths join, never order. With
    jft's models a sparse or low-rank tau costs products of what it holds; see :meth:`Linearized.direction` for ``jit``.
    until: the name of a site of a jft model, ``features`` say: linear up to there (the encoder), and what follows (the
    head) evaluated at the value there, as in the paper. Dropout does not exist in ``apply``, and buffers are constants.

    Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827.
    """
    return Linearized(apply, params, until)


def pair(apply: Apply, build: Build, tangents: Tangents, batch: Any, until: str | None = None) -> tuple[Any, Any]:
    """``(f(theta0), J v)``: outputs at the base, and their derivative along the changes of ``tangents``; one primal pass.

    tangents: ``{path: weight}``, :class:`jft.delta.Changed` and held, or runs of such. build: parameters from those, so that
    ``x v`` costs what v holds. Differentiated in the changes, the pass is transposed once, at the base: there is no
    derivative of second order. until: the name of a site of a jft model (``features``, ``final``, ...): outputs are the
    value there.
    """
    check_forward_mode(model_of(apply))
    point, direction, at = changed.directions(dict(tangents))
    return jax.jvp(lambda point: outputs(apply, build(at(point)), batch, until), (point,), (direction,))


def check_forward_mode(model: Any) -> None:
    """Refuse a model that runs by kernels without a derivative in forward mode, which a linearized pass is made of."""
    if is_jft_model(model) and model.execution.attention == "fused":
        raise ValueError(
            "attention='fused' has no derivative in forward mode, which forward='linearized' and jft.linearize take; use "
            "attention='blockwise' or 'plain'"
        )


def outputs(apply: Apply, params: Any, batch: Any, until: str | None = None) -> Any:
    """Outputs of the model for ``batch``, or its value at the site ``until``."""
    return apply(params, batch) if until is None else _read(apply, params, batch, until)


def together(base: Any, moved: Any) -> Any:
    """``f(theta0) + J v``; integers stay as they are."""
    # The tangents of integers are float0, which cannot be added.
    return jax.tree.map(lambda y, dy: y if dy.dtype == jax.dtypes.float0 else y + dy.astype(y.dtype), base, moved)


def forward(
    apply: Apply, build: Build, tangents: Tangents, batch: Any, until: str | None = None, after: Any = None
) -> Any:
    """``f(theta0) + J v``: see :func:`pair`. With ``until``, what follows that site is evaluated at this value.

    after: the parameters of what follows the site.
    """
    if until is None and getattr(apply, "chunk", None):
        return _in_chunks(apply, build, tangents, batch)
    site = getattr(model_of(apply), "product_head", None)
    if until is None and site is not None:
        return _through_head(apply, build, tangents, batch, site)
    value = together(*pair(apply, build, tangents, batch, until))
    return value if until is None else entered(apply, after, batch, until, value)


def _through_head(apply: Apply, build: Build, tangents: Tangents, batch: Any, site: str) -> Any:
    """:func:`forward` of a model that ends in one product: ``(h + dh) W + h dW`` in place of ``h W + dh W + h dW``.

    With many outputs (a vocabulary) the head is most of what a pass holds at once, and a good part of its cost.
    """
    head = getattr(apply, "head", model_of(apply).head)
    return _product(head, build, tangents, *pair(apply, build, tangents, batch, site))


def _in_chunks(apply: Any, build: Build, tangents: Tangents, batch: Any) -> Logits:
    """:func:`forward` of an ``apply`` whose outputs are :class:`~jft.models.logits.Logits`."""
    model = model_of(apply)
    states = pair(lambda params, batch: apply(params, batch).states, build, tangents, batch)
    # All others would be arguments of every chunk, and get a gradient of zeros from each.
    reads = jax.tree.leaves(model.head_params(tree.unflatten({p: p for p in tree.flatten(model.abstract())})))
    moving = {p: w for p, w in tangents.items() if p in reads}

    def head(moving: Tangents, states: tuple[Any, Any]) -> Any:
        if model.product_head is not None:
            return _product(apply.head, build, moving, *states)
        h, dh = states
        point, direction, at = changed.directions(dict(moving))
        along = lambda point, h: apply.head(build(at(point)), h)
        return together(*jax.jvp(along, (point, h), (direction, dh)))

    return Logits(states, moving, head, apply.chunk)


def _product(head: Apply, build: Build, tangents: Tangents, h: Any, dh: Any) -> Any:
    """A head that is one product W, linearized: ``(h + dh) W + h dW``."""
    base = build(jax.tree.map(changed.base, dict(tangents), is_leaf=changed.is_changed))
    _, from_head = pair(head, build, tangents, h)
    return head(base, h + dh) + from_head


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
    # Inside the scan a site has one value per layer, at which no pass can end.
    if until not in reads or tree.stack_of(until):
        known = ", ".join(dict.fromkeys(n for n in names if not tree.stack_of(n)))
        raise ValueError(f"the model has no site {until!r} outside its layers; it has: {known}")
    return reads[until]
