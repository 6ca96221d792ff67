"""Whole models with blockwise attention: the same outputs and derivatives, in a fraction of the memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import parallel
from jft.kernels import fused_attention
from jft.models import ClipConfig, DecoderConfig, EncoderConfig, Execution, Model, T5Config, VisionConfig
from jft.models.clip import TextConfig
from jft.models.core import on_mesh
from jft.models.rope import Rope
from jft.models.token_merging import TokenSelection

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 31, (2, 11)).astype(np.int32)
SEGMENTS = np.array([[1] * 4 + [2] * 7, [1] * 8 + [0] * 3], np.int32)
IMAGES = RNG.standard_normal((2, 12, 12, 3)).astype(np.float32)
TEXT = {"tokens": TOKENS, "segments": SEGMENTS}
DECODER = DecoderConfig(vocab=31, width=24, layers=3, heads=4, kv_heads=2, hidden=40, init_std=0.3)
VISION = VisionConfig(image=12, patch=4, width=16, layers=3, heads=2, hidden=24)
MODELS = {
    "llama": (DECODER, TEXT),
    "gemma": (
        dataclasses.replace(
            DECODER, windows=(3, None, 5), local_rope=Rope(theta=100.0), norm_place="both", attention_softcap=5.0
        ),
        TEXT,
    ),
    "gpt2, one window": (
        dataclasses.replace(DECODER, rope=None, norm="layer", gated=False, scale_by_layer=True, windows=4),
        TOKENS,
    ),
    "bert": (EncoderConfig(vocab=31, width=16, layers=2, heads=2, hidden=24, positions=16), TEXT),
    "vit": (VISION, IMAGES),
    "vit that merges tokens": (dataclasses.replace(VISION, selection=TokenSelection((1,), 0.5)), IMAGES),
    "clip": (
        ClipConfig(VISION, TextConfig(vocab=31, width=16, layers=2, heads=2, hidden=24, positions=16, eos=30), 8),
        {"images": IMAGES, "tokens": TOKENS},
    ),
    "t5": (
        T5Config(
            vocab=31, width=16, head=8, heads=2, hidden=24, layers=2, decoder_layers=2, buckets=8, max_distance=16
        ),
        {**TEXT, "decoder_tokens": TOKENS[:, :7], "decoder_segments": SEGMENTS[:, 2:9]},
    ),
}
BLOCKS = Execution(attention="blockwise", attention_block=4)


def real(name, outputs, batch):
    """A number that depends on every output but those of padding."""
    key = "decoder_segments" if "decoder_segments" in batch else "segments"
    weight = (batch[key] > 0)[..., None] if isinstance(batch, dict) and key in batch else 1.0
    return sum(jnp.sum(weight * jnp.sin(y)) if y.ndim == 3 else jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_same(name):
    config, batch = MODELS[name]
    params = config.init(jax.random.key(0), jnp.float32)
    tau = jax.tree.map(lambda x: 0.1 * np.cos(7.0 * np.asarray(x)), params)

    def run(model):
        def ordinary(params):
            outputs = model.apply(params, batch)
            return real(name, outputs, batch), outputs

        def linearized(tau):
            return real(name, jft.linearize(model.apply, params)(tau, batch), batch)

        return jax.jit(lambda p, t: (jax.value_and_grad(ordinary, has_aux=True)(p), jax.grad(linearized)(t)))

    found, expected = (run(Model(config, execution))(params, tau) for execution in (BLOCKS, Execution()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(b).max())),
        *jax.device_get((found, expected)),
    )


FUSED = Execution(attention="fused")
REFUSED = {"cpu": {"gemma": "a softcap"}, "tpu": {"gemma": "windows that differ", "t5": "a bias"}}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED["cpu"]])
def test_a_fused_model_is_the_same(name):
    config, batch = MODELS[name]
    params = config.init(jax.random.key(0), jnp.float32)

    def run(execution):
        def ordinary(params):
            outputs = Model(config, execution).apply(params, batch)
            return real(name, outputs, batch), outputs

        (value, outputs), gradient = jax.jit(jax.value_and_grad(ordinary, has_aux=True))(params)
        return value, jax.tree.map(lambda y: y * real_positions(y, batch), outputs), gradient

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(b).max())),
        *jax.device_get((run(FUSED), run(Execution()))),
    )


def real_positions(outputs, batch):
    """1 where an output is not of padding, whose value is nobody's."""
    key = "decoder_segments" if "decoder_segments" in batch else "segments"
    given = isinstance(batch, dict) and key in batch and outputs.ndim == 3
    return (batch[key] > 0)[..., None] if given else 1.0


@pytest.mark.parametrize("platform", REFUSED)
def test_models_that_no_kernel_of_a_platform_has(platform, monkeypatch):
    monkeypatch.setattr(fused_attention, "_platform", lambda: platform)
    for name, (config, batch) in MODELS.items():
        shapes = jax.eval_shape(lambda config=config: config.init(jax.random.key(0), jnp.float32))
        run = lambda config=config, batch=batch, shapes=shapes: jax.eval_shape(
            lambda params: Model(config, FUSED).apply(params, batch), shapes
        )
        if name in REFUSED[platform]:
            with pytest.raises(ValueError, match=f"has no {REFUSED[platform][name]}.* on {platform}"):
                run()
        else:
            run()


@pytest.mark.optimized
def test_on_a_mesh_it_is_the_same_and_blocks_exchange_nothing():
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    config = dataclasses.replace(DECODER, width=32, heads=4, hidden=64, vocab=32)
    params = config.init(jax.random.key(0), jnp.float32)
    params = jax.device_put(params, parallel.shardings(params, mesh))
    tokens = RNG.integers(0, 32, (8, 16)).astype(np.int32)
    batch = {"tokens": tokens, "segments": np.where(np.arange(16) < 9, 1, 2) * np.ones_like(tokens)}
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))

    def run(execution):
        def loss(tau, params, batch):
            with on_mesh(mesh):
                return jnp.mean(jnp.sin(jft.linearize(Model(config, execution).apply, params)(tau, batch)))

        compiled = jax.jit(jax.grad(loss)).lower(params, params, batch).compile()
        collectives = re.findall(r"\s(all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text())
        return sorted(collectives), compiled(params, params, batch)

    (found, gradients), (expected, plain) = run(BLOCKS), run(Execution())
    assert found == expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), gradients, plain)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="attention 'flash' is unknown; choose one of plain, blockwise"):
        Execution(attention="flash")
    with pytest.raises(ValueError, match="attention_block is 0"):
        Execution(attention_block=0)


def temporaries(execution, length):
    """Bytes of an ordinary and of a linearized step of a small decoder besides arguments and results, compiled, not run."""
    config = DecoderConfig(vocab=64, width=64, layers=2, heads=4, hidden=128)
    model = Model(config, execution)
    params, batch = model.abstract(), jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(outputs, batch):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[..., None], -1))

    def ordinary(params, batch):
        return loss(model.apply(params, batch), batch)

    def linearized(tau, params, batch):
        return loss(jft.linearize(model.apply, params)(tau, batch), batch)

    steps = jax.jit(jax.grad(ordinary)).lower(params, batch), jax.jit(jax.grad(linearized)).lower(params, params, batch)
    return [step.compile().memory_analysis().temp_size_in_bytes for step in steps]


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("unroll", [1, 0])
def test_memory_of_steps_at_8192_tokens(unroll):
    blocks, plain = (temporaries(Execution(unroll=unroll, attention=kind), 8192) for kind in ("blockwise", "plain"))
    ordinary, linearized = (few / many for few, many in zip(blocks, plain, strict=True))
    print(f"unroll {unroll}: blockwise/plain {ordinary:.4f} ordinary, {linearized:.4f} linearized; {blocks} {plain}")
    assert max(ordinary, linearized) <= 0.05
