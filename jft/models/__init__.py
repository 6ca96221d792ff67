"""Models as pure functions of parameter trees; loading them from, and saving them to, Hugging Face checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jft.models.classifier import Classifier
from jft.models.core import Execution, Hooks, Model
from jft.models.hf.checkpoint import LoadError
from jft.models.loading import load
from jft.models.saving import save

# Loaded at first use: a run needs one family, and `import jft` none.
_LATE = {
    "ClipConfig": "jft.models.clip",
    "DecoderConfig": "jft.models.decoder",
    "EncoderConfig": "jft.models.encoder",
    "T5Config": "jft.models.t5",
    "VisionConfig": "jft.models.vision",
    "from_equinox": "jft.models.adapters",
    "from_function": "jft.models.adapters",
    "from_linen": "jft.models.adapters",
    "from_nnx": "jft.models.adapters",
    "load_adapter": "jft.models.peft",
    "load_params": "jft.models.parameters",
    "save_adapter": "jft.models.peft",
    "zero_shot_head": "jft.models.clip",
}

if TYPE_CHECKING:
    from jft.models.adapters import from_equinox, from_function, from_linen, from_nnx
    from jft.models.clip import ClipConfig, zero_shot_head
    from jft.models.decoder import DecoderConfig
    from jft.models.encoder import EncoderConfig
    from jft.models.parameters import load_params
    from jft.models.peft import load_adapter, save_adapter
    from jft.models.t5 import T5Config
    from jft.models.vision import VisionConfig

__all__ = [
    "Classifier",
    "ClipConfig",
    "DecoderConfig",
    "EncoderConfig",
    "Execution",
    "Hooks",
    "LoadError",
    "Model",
    "T5Config",
    "VisionConfig",
    "from_equinox",
    "from_function",
    "from_linen",
    "from_nnx",
    "load",
    "load_adapter",
    "load_params",
    "save",
    "save_adapter",
    "zero_shot_head",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'jft.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
