"""Fused attention against the plain one: values and gradients by whatever kernel, and what each refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import parallel
from jft.kernels import fused_attention as fused
from jft.kernels.attention import Mask, attention
from jft.kernels.fused_attention import fused_attention, splash_attention
from jft.models import DecoderConfig, Execution, Model
from jft.models.core import on_mesh

MUTATIONS = [
    ("jft/kernels/fused_attention.py", "(int(mask.window) - 1, 0)", "(int(mask.window), 0)"),
    ("jft/kernels/fused_attention.py", 'rules["mask"] = mask.dense()[:, None]', "pass"),
    ("jft/kernels/fused_attention.py", "if mask.segmented or not named:", "if True:"),
    ("jft/kernels/fused_attention.py", "(window - 1, 0 if causal else window - 1)", "(window - 1, window - 1)"),
    ("jft/kernels/fused_attention.py", "(window - 1, 0 if causal", "(window, 0 if causal"),
    ("jft/kernels/fused_attention.py", "segments = jnp.pad(segments, ((0, 0), (0, missing)))",
     "segments = jnp.pad(segments, ((0, 0), (0, missing)), constant_values=1)"),
    ("jft/kernels/fused_attention.py", "attn_logits_soft_cap=softcap", "attn_logits_soft_cap=None"),
    ("jft/kernels/fused_attention.py", "each = PartitionSpec(rows, None, heads, None)",
     "each = PartitionSpec(None, None, None, None)"),
    ("jft/tangent/linearization.py", "    check_forward_mode(model_of(apply))\n", ""),
]  # fmt: skip

B, T, H, G, K = 2, 21, 4, 2, 8
SEGMENTS = np.array([[1] * 5 + [2] * 9 + [3] * 7, [0] * 4 + [1] * 12 + [0] * 5], np.int32)
SOURCE = np.array([[1] * 3 + [2] * 10, [1] * 6 + [0] * 7], np.int32)  # no key for queries of segment 3
ALONE = np.ones((1, T), np.int32)
within = functools.partial(Mask.within, ALONE, segmented=False)

# name: mask, keys, key-value heads, whether with a bias
CASES = {
    "bidirectional": (None, T, G, False),
    "causal": (within(causal=True), T, G, False),
    "causal, of segments that are one": (Mask.within(ALONE, causal=True), T, H, False),
    "causal packed": (Mask.within(SEGMENTS, causal=True), T, 1, False),
    "causal window": (within(causal=True, window=3), T, G, False),
    "causal packed window": (Mask.within(SEGMENTS, causal=True, window=3), T, G, False),
    "window": (within(window=4), T, G, False),
    "traced window": (within(causal=True, window=np.array(6)), T, H, False),
    "segments and bias": (Mask.within(SEGMENTS), T, H, True),
    "cross": (Mask(SEGMENTS, SOURCE), 13, H, False),
}


def drawn(mask, keys, groups, dtype, tokens=T):
    """q, k, v, bias, scale, and a cotangent that is zero at padding."""
    rng = np.random.default_rng(0)
    shapes = (B, tokens, H, K), (B, keys, groups, K), (B, keys, groups, K), (H, tokens, keys)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), dtype)
    pull = draw(shapes[0])
    if mask is not None:
        pull = pull * (mask.q_segments > 0)[..., None, None].astype(dtype)
    return tuple(map(draw, shapes)), pull


def gradients(of, point, pull, mask):
    """The value where it is of a token, and the cotangents of q, k, v (and bias)."""

    def run(point, pull):
        value, back = jax.vjp(of, *point)
        real = 1 if mask is None else (mask.q_segments > 0)[..., None, None]
        return value * real, back(pull)

    return jax.jit(run)(point, pull)


def close(found, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance * np.abs(b).max()
        ),
        found,
        expected,
    )


def compared(kernel, mask, point, pull, biased=False, scale=0.3, softcap=None):
    """What ``kernel`` and plain attention give."""

    def of(function, q, k, v, bias):
        return function(q, k, v, mask, scale=scale, softcap=softcap, **({"bias": bias} if biased else {}))

    return [gradients(functools.partial(of, f), point, pull, mask) for f in (kernel, attention)]


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_attention(case):
    """Not in float64: the library's softmax is in float32 always."""
    mask, keys, groups, biased = CASES[case]
    close(*compared(fused_attention, mask, *drawn(mask, keys, groups, jnp.float32), biased), 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_arguments_for_cudnn(case, monkeypatch):
    """The kernel itself is of a GPU; what it is told means the same to the form that runs here."""
    mask, keys, groups, biased = CASES[case]
    library, told = jax.nn.dot_product_attention, {}

    def recorded(*arguments, implementation, **options):
        told.update(options, implementation=implementation)
        return library(*arguments, implementation="xla", **options)

    monkeypatch.setattr(fused, "_platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    found, expected = compared(fused_attention, mask, *drawn(mask, keys, groups, jnp.bfloat16), biased)
    close(found, expected, 0.05)
    assert told["implementation"] == "cudnn"
    # A dense mask is as large as the scores of a head, so none where names say it all.
    assert ("mask" in told) == (case not in ("bidirectional", "causal", "causal window"))
    assert told.get("is_causal", False) == case.startswith(("causal", "traced"))
    fused_attention(*drawn(mask, keys, groups, jnp.float32)[0][:3], mask, scale=0.3)
    assert told["implementation"] == "xla"


def test_a_scale_that_is_traced():
    point, pull = drawn(None, T, G, jnp.float32)
    found, expected = compared(fused_attention, None, point, pull, scale=jnp.asarray(0.4, jnp.float32))
    close(found, expected, 2e-5)


SPLASH = {
    "bidirectional": (None, G, None),
    "causal": (within(causal=True), G, None),
    "causal packed": (Mask.within(SEGMENTS, causal=True), 1, 1.5),
    "causal packed window": (Mask.within(SEGMENTS, causal=True, window=3), G, None),
    "window": (within(window=4), H, None),
    "segments": (Mask.within(SEGMENTS), H, None),
}


@pytest.mark.parametrize("case", SPLASH)
def test_splash_attention(case):
    mask, groups, softcap = SPLASH[case]
    kernel = functools.partial(splash_attention, interpret=True)
    found, expected = compared(kernel, mask, *drawn(mask, T, groups, jnp.float32), softcap=softcap)
    close(found, expected, 2e-5)


def test_splash_attention_of_several_blocks():
    mask = Mask.within(np.repeat(np.array([[1, 2, 3]], np.int32), 128, axis=1), causal=True, window=150)
    kernel = functools.partial(splash_attention, interpret=True)
    found, expected = compared(kernel, mask, *drawn(mask, 384, G, jnp.float32, tokens=384))
    close(found, expected, 2e-5)


def test_splash_attention_on_a_mesh():
    """Every device has its rows and heads, and no array is gathered."""
    mesh = parallel.make_mesh({"data": 2, "tensor": 2}, devices=jax.devices()[:4])
    mask = Mask.within(SEGMENTS, causal=True)
    point, pull = drawn(mask, T, G, jnp.float32)

    def kernel(*arguments, **options):
        with on_mesh(mesh):
            return splash_attention(*arguments, **options, interpret=True)

    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    # The tracer of an abstract mesh takes its devices from the arguments.
    found, expected = compared(kernel, mask, jax.device_put(point, place()), jax.device_put(pull, place("data")))
    close(found, expected, 2e-5)
    each = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place("data", None, "tensor")) for x in point[:3]]
    run = jax.jit(lambda q, k, v: kernel(q, k, v, within(causal=True), scale=0.3))
    assert "all-gather" not in run.lower(*each).compile().as_text()
    # Heads that do not divide lie on all devices, rows too.
    odd = jax.device_put([x[:1, :, :1] for x in point[:3]], place())
    found = jax.jit(lambda *x: kernel(*x, within(causal=True), scale=0.3))(*odd)
    close(found, attention(*odd, within(causal=True), scale=0.3), 2e-5)


def test_refusals(monkeypatch):
    point, _ = drawn(None, T, G, jnp.float32)
    q, k, v, bias = point
    with pytest.raises(ValueError, match=r"no softcap|has no a softcap of the scores \(2.0\) on cpu; use"):
        fused_attention(q, k, v, None, scale=1.0, softcap=2.0)
    monkeypatch.setattr(fused, "_platform", lambda: "tpu")
    with pytest.raises(ValueError, match="bias of the scores"):
        fused_attention(q, k, v, None, scale=1.0, bias=bias)
    with pytest.raises(ValueError, match="windows that differ between layers"):
        fused_attention(q, k, v, within(window=jnp.asarray(3)), scale=1.0)
    with pytest.raises(ValueError, match="cross attention"):
        fused_attention(q, k[:, :13], v[:, :13], None, scale=1.0)


DECODER = DecoderConfig(vocab=31, width=24, layers=2, heads=4, kv_heads=2, hidden=40)


def test_a_linearized_model_is_refused():
    model = Model(DECODER, Execution(attention="fused"))
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="attention='fused' has no derivative in forward mode"):
        jft.method("linearized").plan(params, model)
    with pytest.raises(ValueError, match="attention='fused' has no derivative in forward mode"):
        jft.linearize(model.apply, params)(params, np.ones((1, 4), np.int32))


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_compiled_for_tpus(shape):
    """A step on four v5e chips has the kernels, forward and backward, and no array of scores."""
    pytest.importorskip("libtpu")
    mesh = parallel.topology_mesh("v5e:2x2", shape)
    config = DecoderConfig(vocab=256, width=512, layers=2, heads=8, kv_heads=4, hidden=512)

    def program(kind):
        model = Model(config, Execution(attention=kind, dtype=jnp.bfloat16))
        params = model.abstract(jnp.bfloat16)
        places = parallel.shardings(params, mesh)
        params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, places)
        tokens = jax.ShapeDtypeStruct((8, 1152), jnp.int32, sharding=parallel.batch_sharding(mesh))

        def loss(params, tokens):
            with on_mesh(mesh):
                return jnp.mean(jnp.square(model.apply(params, {"tokens": tokens, "segments": tokens})))

        return jax.jit(jax.grad(loss)).lower(params, tokens).compile()

    kernels = program("fused").as_text()
    assert all(name in kernels for name in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"))
    scores = re.compile(r"\[[\d,]*1152,1152\]")
    assert not scores.search(kernels) and scores.search(program("plain").as_text())
