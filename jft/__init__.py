"""jft: fine-tune pretrained models in JAX, and do arithmetic with what fine-tuning changed.

The public names load what they need when first used, so that ``import jft`` itself is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jft.version import __version__

# name -> (module, attribute); attribute None: the module itself.
_PUBLIC = {
    "load": ("jft.models", "load"),
    "save": ("jft.models", "save"),
    "Model": ("jft.models", "Model"),
    "TaskVector": ("jft.delta", "TaskVector"),
    "apply": ("jft.delta", "apply"),
    "revert": ("jft.delta", "revert"),
    "linearize": ("jft.tangent", "linearize"),
    "method": ("jft.methods", "method"),
    "finetune": ("jft.train", "finetune"),
    "generate": ("jft.generation", "generate"),
    "merge": ("jft.merge", None),
    "models": ("jft.models", None),
    "data": ("jft.data", None),
    "delta": ("jft.delta", None),
    "methods": ("jft.methods", None),
    "parallel": ("jft.parallel", None),
    "tangent": ("jft.tangent", None),
    "train": ("jft.train", None),
    "tree": ("jft.tree", None),
    "analysis": ("jft.analysis", None),
}
__all__ = ["__version__", *_PUBLIC]

# Type checkers and editors do not run __getattr__; they read these imports instead.
if TYPE_CHECKING:
    import jft.analysis as analysis
    import jft.data as data
    import jft.delta as delta
    import jft.merge as merge
    import jft.methods as methods
    import jft.models as models
    import jft.parallel as parallel
    import jft.tangent as tangent
    import jft.train as train
    import jft.tree as tree
    from jft.delta import TaskVector, apply, revert
    from jft.generation import generate
    from jft.methods import method
    from jft.models import Model, load, save
    from jft.tangent import linearize
    from jft.train.finetune import finetune


# Module-level __getattr__ (PEP 562): called for names that the module does not hold.
def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jft' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
