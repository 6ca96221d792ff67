"""A tiny model of every architecture family with a batch, and a preset of every family of parametrisations."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.models import Classifier, ClipConfig, DecoderConfig, EncoderConfig, Execution, Model, T5Config, VisionConfig
from jft.models.clip import TextConfig
from jft.models.moe import Experts
from tests.train import tools

RNG = np.random.default_rng(0)
TOKENS = np.concatenate([RNG.integers(0, 9, (2, 4)), [[9], [9]]], axis=1).astype(np.int32)
LABELS = np.array([0, 2], np.int32)
IMAGES = RNG.standard_normal((2, 8, 8, 1)).astype(np.float32)
_TOWER = {"width": 8, "layers": 2, "heads": 2, "hidden": 12}
_DECODER = {"vocab": 11, "kv_heads": 1, "head_size": 4, **_TOWER}
_VISION = {"image": 8, "patch": 4, "channels": 1, **_TOWER}
_MIXTURE = DecoderConfig(**_DECODER, experts=Experts(3, 2, 4))
_CLIP = ClipConfig(
    vision=VisionConfig(**_VISION, patch_bias=False, embed_norm=True),
    text=TextConfig(vocab=11, positions=6, eos=9, **_TOWER),
    projection=4,
)
_T5 = T5Config(vocab=11, width=8, head=4, heads=2, hidden=12, layers=2, decoder_layers=2, buckets=4, max_distance=8)
ENCODER = Classifier(EncoderConfig(vocab=11, positions=6, **_TOWER), classes=3)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """config: of a jft model, None for a function of the user's own. objective: its name."""

    config: Any
    batch: dict[str, np.ndarray]
    objective: str
    execution: Execution = Execution()

    @functools.cached_property
    def model(self):
        return tools.apply if self.config is None else Model(self.config, self.execution)

    @functools.cached_property
    def params(self):
        """No term near zero, so that every derivative counts."""
        shapes = tools.parameters() if self.config is None else Model(self.config).abstract()
        rng = np.random.default_rng(1)
        draw = lambda p, x: np.float32(0.4 * rng.standard_normal(x.shape) + p.endswith("scale"))
        return jax.device_put(tree.map_with_path(draw, shapes))


ARCHITECTURES = {
    "decoder": Architecture(DecoderConfig(**_DECODER), {"tokens": TOKENS}, "lm"),
    "tied head": Architecture(DecoderConfig(**_DECODER, tied=True), {"tokens": TOKENS}, "lm"),
    "dense experts": Architecture(_MIXTURE, {"tokens": TOKENS}, "lm"),
    "ragged experts": Architecture(_MIXTURE, {"tokens": TOKENS}, "lm", Execution(experts="ragged")),
    "encoder": Architecture(ENCODER, {"tokens": TOKENS, "labels": LABELS}, "classification"),
    "vision": Architecture(
        Classifier(VisionConfig(**_VISION), classes=3), {"images": IMAGES, "labels": LABELS}, "classification"
    ),
    "clip": Architecture(_CLIP, {"images": IMAGES, "tokens": TOKENS}, "contrastive"),
    "t5": Architecture(_T5, {"tokens": TOKENS, "decoder_tokens": TOKENS}, "seq2seq"),
    "function": Architecture(None, tools.batches(1, 2)[0], "classification"),
}
FAMILIES = {
    "full": {"name": "full"},
    "entries": {"name": "super_tuning", "sparsity": 0.8},
    "blocks": {"name": "block_sparse", "density": 0.3, "block": (4, 4), "score": "random"},
    "slices": {"name": "s2ft", "o": 0.5, "down": 0.3},
    "lora": {"name": "lora", "rank": 2},
    "lora, b alone": {"name": "l_lora", "rank": 2, "include": ""},
    "diagonal blocks": {"name": "diablo", "blocks": 2},
    "masks": {"name": "masking"},
    "gates": {"name": "finegates"},
    "layers": {"name": "last_k_layers", "k": 1},
}
FORWARDS = ("standard", "linearized")
_NO_LAYERS = "carry no layer numbers"


def refused(architecture, family, forward):
    """What the error says of a combination that cannot be; None of one that runs."""
    if architecture == "function":
        own = {
            "slices": "matches no weight",
            "diagonal blocks": r"\(16, 3\) has no 2 diagonal blocks",
            "layers": _NO_LAYERS,
        }
        if family in own:
            return own[family]
    return "Gates keeps no base to linearize" if (family, forward) == ("gates", "linearized") else None


def in_float64(architecture):
    """``(model, params)`` in float64, under ``enable_x64``."""
    one = ARCHITECTURES[architecture]
    execution = dataclasses.replace(one.execution, dtype=jnp.float64)
    return Model(one.config, execution), jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), one.params)
