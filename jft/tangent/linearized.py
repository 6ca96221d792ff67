"""`linearize`: a model as a function that is linear in the change of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jft import delta, tree
from jft.models.core import takes_structured
from jft.names import nearest
from jft.tangent import lean
from jft.tangent.forward import entered, pair, together

Direction = dict[str, lean.Change]


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
        return pair(self.function, self.build, self.leans(self.direction(tau)), batch, self.until)

    def leans(self, direction: Direction) -> dict[str, lean.Lean]:
        """The weights that move, by path."""
        flat = tree.flatten(self.params)
        return {p: c.lean(flat[p], self._structured(p)) for p, c in direction.items()}

    def build(self, weights: Mapping[str, Any]) -> Any:
        """The parameters with ``weights`` (by path) in the place of theirs."""
        return tree.like(self.params, {**tree.flatten(self.params), **weights})

    def land(self, value: Any, batch: Any) -> Any:
        """Outputs from a value at the site ``until``, by what follows it at the base; without ``until``, the value itself."""
        return value if self.until is None else entered(self.function, self.params, batch, self.until, value)

    def direction(self, tau: Any) -> Direction:
        """``tau`` in the form whose products are cheapest; pass it to functions under ``jit`` in place of a task vector.

        Raises ``ValueError`` for paths or shapes that the model does not have, and weights that are no numbers with a
        derivative.
        """
        if isinstance(tau, dict) and tau and all(isinstance(c, lean.Change) for c in tau.values()):
            return tau
        flat = tree.flatten(self.params)
        given = dict(tau.items()) if isinstance(tau, delta.TaskVector) else _by_path(tau)
        out: Direction = {}
        for path, value in given.items():
            if path not in flat:
                raise ValueError(f"tau changes {path!r}, which the model does not have{nearest(path, flat)}")
            w = flat[path]
            value = value.resolve(w) if isinstance(value, delta.Encoding) else value
            if tuple(value.shape) != tuple(w.shape):
                raise ValueError(f"tau has {path} of shape {tuple(value.shape)}, and the model of {tuple(w.shape)}")
            if not jnp.issubdtype(w.dtype, jnp.inexact):
                raise ValueError(f"{path} is of dtype {w.dtype}: it has no derivative, so tau cannot change it")
            out[path] = lean.change(value, self._structured(path))
        return out

    def _structured(self, path: str) -> bool:
        return takes_structured(self.function, path)


def _by_path(tau: Any) -> dict[str, Any]:
    """A mapping by path, or a tree shaped like the parameters (parts of it may be missing), by path."""
    if isinstance(tau, Mapping) and any(isinstance(x, delta.Encoding) for x in tau.values()):
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
