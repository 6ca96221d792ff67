"""`Calibration`: all that a score may look at, so that scores know nothing of loops, meshes or data pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax

Array = jax.Array
Weights = dict[str, Array]
Per = Literal["batch", "example", "sampled"]
Table = Mapping[str, Sequence[int] | None]


class Calibration(Protocol):
    """A model, its weights, and the training data that comes next.

    Implemented by :class:`jft.train.calibration.RunCalibration`. Every call reads the same batches and does not
    move the training stream. ``paths`` are the candidates, in the order of the parameters; ``params`` all
    weights by path; ``key`` is a PRNG key, from which draws are made per path (:func:`jft.tree.key_for`); ``model`` and
    ``objective`` are those of the run. Results are float32, sharded as the weights are, and are refused (``ValueError``) where
    they are not finite.
    """

    @property
    def paths(self) -> tuple[str, ...]: ...

    @property
    def params(self) -> Mapping[str, Array]: ...

    @property
    def key(self) -> Array: ...

    @property
    def model(self) -> Any: ...

    @property
    def objective(self) -> Any: ...

    def lead(self, path: str) -> int:
        """How many leading axes of a weight only stack independent matrices or vectors: layers, experts."""
        ...

    def gradient(self, batches: int = 1) -> Weights:
        """``{path: mean over the batches of d(loss) / d(w)}`` for the candidates; the loss is that of the step."""
        ...

    def squares(
        self, count: int, per: Per = "example", power: int = 2, tokens: Literal["mean", "sum"] = "mean"
    ) -> Weights:
        """``{path: mean over count draws of |g|^power}``.

        per: ``batch``, g the gradient of a batch's loss; ``example``, of one example's (rows in which nothing counts are
        passed over); ``sampled``, of one example's with its target drawn from the model's own prediction, whose mean square
        is the diagonal of the Fisher information itself. tokens: whether an example's loss is the mean over its target
        tokens or their sum, which is the log-likelihood of the whole target.
        """
        ...

    def fold(self, update: Callable[[Any, Weights], Any], carry: Any, batches: int) -> Any:
        """``carry`` after ``carry = update(carry, gradient of the batch)`` for each batch, compiled; the first is donated."""
        ...

    def sums(self, compute: Callable[..., Any], batches: int, *arguments: Any) -> Any:
        """The float32 sum over batches of the pytrees ``compute(params, batch, *arguments)``, compiled."""
        ...

    def tuned(
        self, steps: int, table: Table | None = None, how: Any = None, penalties: tuple = ()
    ) -> Mapping[str, Array]:
        """``{path: weight}`` of the candidates after ``steps`` of ordinary training from ``params``.

        table: ``{path: layers}`` (None: the whole weight) of the weights that train instead, with those that always train. The
        result is then all weights. how: the parametrisation they train in (:mod:`jft.methods.parametrise`); None for in
        place. penalties: what is added to the loss (:mod:`jft.methods.penalties`).
        """
        ...

    def after(self, steps: int, how: Any = None) -> Calibration:
        """The calibration of a run of ``how`` after ``steps`` steps of its schedule: at its weights, before the next
        batch.
        """
        ...

    def at(self, weights: Mapping[str, Array]) -> Calibration:
        """The same at other weights, by path, of some or all that it has; the data begin where they do here."""
        ...

    def with_objective(self, objective: Any) -> Calibration:
        """The same, with gradients and their powers of another loss (:class:`jft.train.objectives.Objective`)."""
        ...

    def evaluate(self, params: Mapping[str, Array]) -> dict[str, float]:
        """Loss and metrics of weights by path on the run's evaluation data."""
        ...
