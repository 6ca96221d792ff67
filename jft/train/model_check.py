"""Checks of a model, its parameters and the first batch, before anything is compiled: each refusal is one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.models.core import is_jft_model
from jft.train.objectives import Classification, LanguageModel, Regression

# Libraries of modules, and what makes a pair of `apply` and parameters of one (jft.models).
MODULES = {
    "flax.linen": "from_linen(module, variables)",
    "flax.nnx": "from_nnx(module)",
    "equinox": "from_equinox(module)",
}


def check(model: Any, params: Any) -> None:
    """``ValueError`` for arguments in the wrong order, a module in place of its function, and parameters that are no arrays."""
    if isinstance(model, Mapping) and (callable(params) or hasattr(params, "apply")):
        raise ValueError("model and params are in each other's place; it is jft.finetune(model, params, data)")
    for kind in type(model).__mro__:
        for library, adapter in MODULES.items():
            if kind.__module__.startswith(library):
                raise ValueError(
                    f"the model is a module of {library} ({type(model).__name__}), which is no function of (params, batch); "
                    f"give what jft.models.{adapter} returns: apply and params"
                )
    if not callable(model) and not hasattr(model, "apply"):
        raise ValueError(f"the model is a {type(model).__name__}; give a jft model, or a function apply(params, batch)")
    for path, x in tree.flatten(params).items():
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise ValueError(f"params hold a {type(x).__name__} at {path!r}; they are a pytree of arrays")


def classes(model: Any, params: Any, batch: Any, objective: Any) -> int | None:
    """How many classes the outputs for ``batch`` (arrays or shapes) have, where the objective is about classes; else None.

    Raises ``ValueError`` where a model that is not jft's cannot be called so, or gives something else than an array.
    """
    if is_jft_model(model):
        return getattr(model.config, "classes", None) if isinstance(objective, Classification) else None
    # Another objective may take anything.
    if not isinstance(objective, Classification | Regression | LanguageModel):
        return None
    apply = getattr(model, "apply", model)
    try:
        outputs = jax.eval_shape(apply, params, batch)
    # Whatever the user's function raises: it is told with what it was called.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        hint = ""
        if type(error).__name__ == "ModifyScopeVariableError":
            hint = "; statistics of batches cannot change here, so use the running ones (use_running_average=True)"
        fields = {p: f"{np.dtype(x.dtype).name}{list(x.shape)}" for p, x in tree.flatten(batch).items()}
        raise ValueError(
            f"model(params, batch) fails for a batch of {', '.join(f'{p} {x}' for p, x in fields.items())}: "
            f"{type(error).__name__}: {reason}{hint}"
        ) from error
    if not isinstance(outputs, jax.ShapeDtypeStruct) or not outputs.ndim:
        kind = "a number" if isinstance(outputs, jax.ShapeDtypeStruct) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"the model gives {kind}; {type(objective).__name__} takes one array of outputs, so return that alone"
        )
    return outputs.shape[-1] if isinstance(objective, Classification) else None


def check_labels(batch: Any, count: int | None) -> None:
    """``ValueError`` for a label of a host batch that is none of ``count`` classes: its loss would be NaN."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if count is not None and labels is not None and labels.size and labels.max() >= count:
        raise ValueError(
            f"label {labels.max()} is none of the model's {count} classes, 0 to {count - 1}; mend the labels, or give the "
            "model as many classes"
        )


def cause(params: Any, first: bool, accept: bool) -> str:
    """What a loss that is not finite may come from, and what to do. first: at the first step. accept: there is a checkpoint."""
    for path, x in tree.flatten(params).items():
        # Weights that were given away to be trained in place are gone.
        deleted = isinstance(x, jax.Array) and x.is_deleted()
        if not deleted and jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(x))):
            return f"{path} of the base is not finite itself: load the base again, or in another dtype"
    if first:
        return (
            "No update was made before it, so it is not the learning rate: look at that batch, whether the objective is of "
            "these outputs, and at the dtype"
        )
    way = ", and go on from there with checkpoint.accept=True" if accept else ""
    return f"Look at that batch, lower the learning rate, or clip{way}"
