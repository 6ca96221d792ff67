"""Small models of every family, in any dtype, with a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.models import Classifier, ClipConfig, DecoderConfig, EncoderConfig, Execution, Model, VisionConfig
from jft.models.clip import TextConfig
from jft.models.moe import Experts

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)


def images(dtype):
    return np.random.default_rng(5).standard_normal((2, 8, 8, 1)).astype(np.float32).astype(dtype)


def _configs():
    vision = VisionConfig(image=8, patch=4, channels=1, width=8, layers=2, heads=2, hidden=12)
    tower = VisionConfig(
        image=8, patch=4, channels=1, width=8, layers=1, heads=2, hidden=12, patch_bias=False, embed_norm=True
    )
    text = TextConfig(vocab=11, width=8, layers=1, heads=2, hidden=12, positions=6, eos=9)
    return {
        "decoder": DecoderConfig(vocab=11, width=8, layers=2, heads=2, kv_heads=1, hidden=12, tied=True),
        "mixture": DecoderConfig(vocab=11, width=8, layers=2, heads=2, kv_heads=1, hidden=12, experts=Experts(3, 2, 6)),
        "encoder": EncoderConfig(vocab=11, width=8, layers=2, heads=2, hidden=12, positions=6),
        "vision": Classifier(vision, classes=3, pool="mean"),
        "clip": ClipConfig(vision=tower, text=text, projection=4),
        "clip_classifier": Classifier(ClipConfig(vision=tower, text=text, projection=4), classes=3),
    }


NAMES = tuple(_configs())


@functools.cache
def _parameters(name):
    """Float32, in NumPy, no term near zero."""
    shapes, rng = tree.flatten(Model(_configs()[name]).abstract()), np.random.default_rng(1)
    values = {p: np.float32(0.4 * rng.standard_normal(x.shape) + p.endswith("scale")) for p, x in shapes.items()}
    return tree.unflatten(values)


# The same object for the same arguments: programs are kept by a model's bound methods, which compare by identity.
_model = functools.cache(lambda name, dtype: Model(_configs()[name], Execution(dtype=dtype)))


def model(name, dtype=jnp.float32):
    """``(model, params, batch)``."""
    params = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), _parameters(name)))
    batch = {}
    if name in ("decoder", "mixture", "encoder", "clip"):
        batch["tokens"] = TOKENS
    if name not in ("decoder", "mixture", "encoder"):
        batch["images"] = images(dtype)
    return _model(name, jnp.dtype(dtype)), params, batch


def draw(params, seed, scale=0.1):
    """A random tree like ``params``: the same values in any dtype, which are those of float32."""
    rng = np.random.default_rng(seed)
    values = lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32).astype(x.dtype)
    return jax.device_put(jax.tree.map(values, params))
