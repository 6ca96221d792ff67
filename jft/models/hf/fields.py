"""Reading ``config.json``: activations by either name, and features that are refused."""

from __future__ import annotations

from typing import Any

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}


def activation(name: str) -> str:
    """jft's name of a transformers activation; ValueError for one that jft does not have."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; jft has {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def activation_name(name: str) -> str:
    """The transformers name of a jft activation."""
    return _NAMES.get(name, name)


def refuse(raw: dict[str, Any], **allowed: tuple[Any, ...]) -> None:
    """ValueError naming a key of ``raw`` whose value is none of those allowed; keys that are absent pass."""
    for key, values in allowed.items():
        if key in raw and raw[key] not in values:
            raise ValueError(f"config.json: {key} = {raw[key]!r} is not supported; only {values[0]!r} is")
